//! A new VM's directory: made aside with everything in it, and given its name in one step, last of all.
//!
//! The directory is what makes the VM: from then on it is published as a VMTarget. `target.yaml` says what its disks
//! are, for whoever starts it, and for snapshots of it while it is stopped.

use std::fs::{File, remove_dir_all};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use freezeframe_api::conditions::reasons;
use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;

use super::Restores;
use super::record::RestoreRecord;
use super::source::failed;
use crate::hypervisor::VmKey;
use crate::hypervisor::target_file::{self, KnownDisk, TargetFile};
use crate::session::outcome::Failure;

fn place(restores: &Restores, vm: &VmKey) -> PathBuf {
    restores.sessions.vm_root.join(&vm.namespace).join(&vm.name)
}

/// What a VM's directory is called before it has its name: no VM's name begins with a dot.
fn aside(record: &RestoreRecord, vm: &VmKey) -> VmKey {
    VmKey { namespace: vm.namespace.clone(), name: format!(".vmrestore-{}", record.order.id()) }
}

/// Makes the VM. May be called again; fails if there is another one of its name.
pub fn publish(restores: &Restores, record: &RestoreRecord, vm: &VmKey) -> Result<(), Failure> {
    if is_ours(restores, record, vm) {
        return Ok(());
    }
    let aside = aside(record, vm);
    let (from, to) = (place(restores, &aside), place(restores, vm));
    remove(&from).map_err(|error| failed(&error))?;
    std::fs::create_dir(&from).map_err(|error| failed(&error))?;
    write(&from.join(target_file::FILE), &content(restores, record)).map_err(|error| failed(&error))?;
    give_owner(restores, record, &from).map_err(|error| failed(&error))?;
    match rustix::fs::renameat_with(CWD, &from, CWD, &to, RenameFlags::NOREPLACE) {
        Ok(()) => sync_parent(&to).map_err(|error| failed(&error)),
        Err(Errno::EXIST | Errno::NOTEMPTY) => {
            Err(Failure::new(reasons::VM_EXISTS, format!("VM {vm} came to be while it was restored")))
        }
        Err(errno) => Err(failed(&errno)),
    }
}

/// Whether a VM is there that this restore made.
pub fn is_published(restores: &Restores, record: &RestoreRecord) -> bool {
    record.order.new_vm.as_ref().is_some_and(|vm| is_ours(restores, record, vm))
}

/// Removes a directory that didn't get its name.
pub fn take_back(restores: &Restores, record: &RestoreRecord) -> Result<(), std::io::Error> {
    record.order.new_vm.as_ref().map_or(Ok(()), |vm| remove(&place(restores, &aside(record, vm))))
}

fn remove(aside: &Path) -> Result<(), std::io::Error> {
    match remove_dir_all(aside) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Its file names the images that the restore made, which no other VM's does.
fn is_ours(restores: &Restores, record: &RestoreRecord, vm: &VmKey) -> bool {
    let found = target_file::read(&restores.sessions.vm_root, vm);
    found.is_ok_and(|found| found.is_some_and(|(file, _)| file.disks == disks(record)))
}

fn disks(record: &RestoreRecord) -> Vec<KnownDisk> {
    let known = |disk: &super::record::DiskRestore| KnownDisk {
        name: disk.disk.clone(),
        path: disk.path.clone(),
        format: disk.format.clone(),
        read_only: false,
    };
    record.disks.iter().map(known).collect()
}

/// Without the old VM's labels: a schedule may go by them.
fn content(restores: &Restores, record: &RestoreRecord) -> TargetFile {
    let boot = target_file::boot_with(&restores.sessions.vm_root, &record.order.vm);
    TargetFile { disks: disks(record), boot, ..TargetFile::default() }
}

/// JSON is YAML.
fn write(path: &Path, content: &TargetFile) -> std::io::Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(&serde_json::to_vec_pretty(content)?)?;
    file.sync_all()
}

/// QEMU makes its sockets there: whoever may do that for the old VM may for the new one.
fn give_owner(restores: &Restores, record: &RestoreRecord, aside: &Path) -> std::io::Result<()> {
    let directory = File::open(aside)?;
    if let Ok(like) = std::fs::metadata(place(restores, &record.order.vm)) {
        fchown(&directory, Some(like.uid()), Some(like.gid()))?;
        directory.set_permissions(std::fs::Permissions::from_mode(like.mode() & 0o7777))?;
    }
    directory.sync_all()
}

fn sync_parent(place: &Path) -> std::io::Result<()> {
    place.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}
