//! A new VM's directory: made aside with everything in it, and given its name in one step, last of all.
//!
//! The directory is what makes the VM: from then on it is published as a VMTarget. `target.yaml` says what its disks
//! are, for whoever starts it, and for snapshots of it while it is stopped.

use std::fs::{File, remove_dir_all};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use freezeframe_api::conditions::reasons;
use rustix::fs::{AtFlags, CWD, RenameFlags};
use rustix::io::Errno;

use super::Restores;
use super::record::RestoreRecord;
use super::source::failed;
use crate::crash;
use crate::hypervisor::VmKey;
use crate::hypervisor::image::FileId;
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
pub fn publish(restores: &Restores, record: &mut RestoreRecord, vm: &VmKey) -> Result<(), Failure> {
    if is_published(restores, record) {
        return Ok(());
    }
    let (from, to) = (place(restores, &aside(record, vm)), place(restores, vm));
    // The one that is on record goes: it must not be taken for one that got its name.
    if record.directory.take().is_some() {
        restores.journal.save(record)?;
    }
    make(restores, record, &from).map_err(|error| failed(&error))?;
    record.directory = id(&from).map_err(|error| failed(&error))?;
    restores.journal.save(record)?;
    match rustix::fs::renameat_with(CWD, &from, CWD, &to, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        Err(Errno::EXIST | Errno::NOTEMPTY) => {
            return Err(Failure::new(reasons::VM_EXISTS, format!("VM {vm} came to be while it was restored")));
        }
        Err(errno) => return Err(failed(&errno)),
    }
    crash::point("restore-published");
    sync_parent(&to).map_err(|error| failed(&error))
}

/// Makes the directory with everything in it, under a name that makes no VM.
fn make(restores: &Restores, record: &RestoreRecord, aside: &Path) -> std::io::Result<()> {
    remove(aside)?;
    // The namespace's directory too: no VM of it need have run since the node was started.
    std::fs::create_dir_all(aside)?;
    write(&aside.join(target_file::FILE), &content(restores, record))?;
    give_owner(restores, record, aside)
}

/// Whether the restore made its VM, whatever has become of that since: the images are its owner's from then on.
///
/// The directory is known by what it is, and not by what is in it, which its owner may change.
pub fn is_published(restores: &Restores, record: &RestoreRecord) -> bool {
    let (Some(vm), Some(made)) = (&record.order.new_vm, record.directory) else { return false };
    let is_at = |vm: &VmKey| id(&place(restores, vm)).is_ok_and(|found| found == Some(made));
    // Where nothing has the VM's name, a VM root that didn't outlive its node lost the directory, and it is made again.
    let is_there = std::fs::symlink_metadata(place(restores, vm)).is_ok();
    is_at(vm) || (is_there && !is_at(&aside(record, vm)))
}

fn id(directory: &Path) -> std::io::Result<Option<FileId>> {
    match rustix::fs::statx(CWD, directory, AtFlags::SYMLINK_NOFOLLOW, FileId::NEEDS) {
        Ok(found) => Ok(Some(FileId::of(&found))),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
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
