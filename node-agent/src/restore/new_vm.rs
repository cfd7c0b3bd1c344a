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
use serde_json::json;

use super::Restores;
use super::record::RestoreRecord;
use super::source::failed;
use crate::hypervisor::VmKey;
use crate::session::outcome::Failure;

const FILE: &str = "target.yaml";

/// Where a VM's directory is before it has its name: no VM's name begins with a dot.
fn aside(restores: &Restores, record: &RestoreRecord, vm: &VmKey) -> PathBuf {
    restores.sessions.vm_root.join(&vm.namespace).join(format!(".vmrestore-{}", record.order.id()))
}

/// Makes the VM. May be called again; fails if there is another one of its name.
pub fn publish(restores: &Restores, record: &RestoreRecord, vm: &VmKey) -> Result<(), Failure> {
    let place = restores.sessions.vm_root.join(&vm.namespace).join(&vm.name);
    if is_ours(&place, record) {
        return Ok(());
    }
    let aside = aside(restores, record, vm);
    remove(&aside).map_err(|error| failed(&error))?;
    fill(restores, record, &aside).map_err(|error| failed(&error))?;
    match rustix::fs::renameat_with(CWD, &aside, CWD, &place, RenameFlags::NOREPLACE) {
        Ok(()) => sync_parent(&place).map_err(|error| failed(&error)),
        Err(Errno::EXIST | Errno::NOTEMPTY) => {
            Err(Failure::new(reasons::VM_EXISTS, format!("VM {vm} came to be while it was restored")))
        }
        Err(errno) => Err(failed(&errno)),
    }
}

/// Whether a VM is there that this restore made.
pub fn is_published(restores: &Restores, record: &RestoreRecord) -> bool {
    let place = |vm: &VmKey| restores.sessions.vm_root.join(&vm.namespace).join(&vm.name);
    record.order.new_vm.as_ref().is_some_and(|vm| is_ours(&place(vm), record))
}

/// Removes a directory that didn't get its name.
pub fn take_back(restores: &Restores, record: &RestoreRecord) -> Result<(), std::io::Error> {
    record.order.new_vm.as_ref().map_or(Ok(()), |vm| remove(&aside(restores, record, vm)))
}

fn remove(aside: &Path) -> Result<(), std::io::Error> {
    match remove_dir_all(aside) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The first line of the file, which tells whose it is.
fn mark(record: &RestoreRecord) -> String {
    let (namespace, name) = &record.order.restore;
    format!("# Disks of a VM that VMRestore {namespace}/{name} ({}) made.\n", record.order.uid)
}

fn is_ours(place: &Path, record: &RestoreRecord) -> bool {
    std::fs::read_to_string(place.join(FILE)).is_ok_and(|text| text.starts_with(&mark(record)))
}

fn fill(restores: &Restores, record: &RestoreRecord, aside: &Path) -> std::io::Result<()> {
    std::fs::create_dir(aside)?;
    let disks = record.disks.iter().map(|disk| json!({"name": disk.disk, "path": disk.path, "format": disk.format}));
    // JSON is YAML.
    let text = serde_json::to_string_pretty(&json!({"disks": disks.collect::<Vec<_>>()}))?;
    let mut file = File::create_new(aside.join(FILE))?;
    file.write_all(format!("{}{text}\n", mark(record)).as_bytes())?;
    file.sync_all()?;
    // QEMU makes its sockets there: whoever may do that for the old VM may for the new one.
    let source = restores.sessions.vm_root.join(&record.order.vm.namespace).join(&record.order.vm.name);
    let directory = File::open(aside)?;
    if let Ok(like) = std::fs::metadata(source) {
        fchown(&directory, Some(like.uid()), Some(like.gid()))?;
        directory.set_permissions(std::fs::Permissions::from_mode(like.mode() & 0o7777))?;
    }
    directory.sync_all()
}

fn sync_parent(place: &Path) -> std::io::Result<()> {
    place.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}
