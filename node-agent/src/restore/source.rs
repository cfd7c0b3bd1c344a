//! What a restore starts from: a snapshot's record in the journal, and the images that it names.
//!
//! Paths are the record's, never the API's. The headers of the images were written by QEMU, and QEMU is not trusted:
//! a backing file outside the image roots isn't followed, neither here nor by `qemu-img`.

use std::fs::File;
use std::path::{Path, PathBuf};

use freezeframe_api::conditions::reasons;
use rustix::fs::OFlags;

use super::Restores;
use super::order::RestoreOrder;
use super::record::{DiskRestore, RestoreRecord};
use crate::causes::chain;
use crate::drivers::DiskTask;
use crate::hypervisor::backing::backing_of;
use crate::hypervisor::image::{FileId, ImageDirectory, ImageError, ImageRoots, trusted_directory};
use crate::hypervisor::qcow2::{HeaderError, has_external_data};
use crate::session::journal::{JournalError, SessionRecord, Stage};
use crate::session::outcome::Failure;

/// Formats of images that may have a backing file.
const LAYERED: [&str; 3] = ["qcow2", "qed", "vmdk"];
/// A chain is never deeper than this; a longer one is a loop.
const DEEPEST: usize = 1024;

/// The record of the snapshot that is restored, which must be complete.
pub fn snapshot(restores: &Restores, order: &RestoreOrder) -> Result<SessionRecord, Failure> {
    let unknown = || Failure::refused(reasons::SNAPSHOT_NOT_FOUND, "this node has no record of the snapshot");
    let record = restores.sessions.journal.load(&order.source)?.ok_or_else(unknown)?;
    if record.order.vm != order.vm {
        let message = format!("the snapshot is of VM {}, not of {}", record.order.vm, order.vm);
        return Err(Failure::refused(reasons::SNAPSHOT_NOT_FOUND, message));
    }
    match record.stage {
        // Once its removal was begun, its images may have been written to.
        Stage::Complete if !record.removing => refuse_overwritten(restores, record),
        _ => Err(Failure::refused(reasons::SNAPSHOT_NOT_READY, "the snapshot isn't complete on this node, or is gone")),
    }
}

fn refuse_overwritten(restores: &Restores, record: SessionRecord) -> Result<SessionRecord, Failure> {
    for task in &record.tasks {
        if let Some(why) = restores.sessions.overwritten(task)? {
            return Err(Failure::refused(reasons::SNAPSHOT_NOT_READY, why));
        }
    }
    Ok(record)
}

/// Whether a restore that was begun would still bring back what it was planned for.
pub fn check_unmoved(restores: &Restores, restore: &RestoreRecord) -> Result<(), Failure> {
    let record = snapshot(restores, &restore.order)?;
    let is_at = |disk: &DiskRestore, task: &DiskTask| {
        task.disk == disk.disk && task.artifact.as_ref().is_some_and(|artifact| artifact.handle == disk.source)
    };
    match restore.disks.iter().find(|disk| !record.tasks.iter().any(|task| is_at(disk, task))) {
        None => Ok(()),
        Some(disk) => {
            let message =
                format!("the snapshot's data of disk {} isn't at {} any more", disk.disk, disk.source.display());
            Err(Failure::new(reasons::SNAPSHOT_NOT_READY, message))
        }
    }
}

/// What the restore waits for if the removal of a snapshot of the VM is half done, and may move what this one's record
/// names. One that was kept in the end is not gone on with.
pub fn is_moving(restores: &Restores, order: &RestoreOrder) -> Result<Option<String>, JournalError> {
    let sessions = &restores.sessions;
    let half_removed = |task: &DiskTask| sessions.drivers.find(&task.driver).is_some_and(|d| d.is_half_removed(task));
    let records = sessions.journal.all()?;
    let over = |record: &&SessionRecord| matches!(record.stage, Stage::Removed | Stage::Retained);
    let mut of_vm = records.iter().filter(|record| record.order.vm == order.vm && !over(record));
    let going = of_vm.find(|record| record.tasks.iter().any(half_removed));
    Ok(going.map(|record| format!("snapshot {} of the VM is being deleted", record.order.snapshot.1)))
}

/// The snapshot's disks that the order means.
pub fn select<'a>(record: &'a SessionRecord, order: &RestoreOrder) -> Result<Vec<&'a DiskTask>, Failure> {
    let known = |name: &String| record.tasks.iter().any(|task| task.disk == *name);
    if let Some(missing) = order.include.iter().chain(&order.exclude).find(|name| !known(name)) {
        let names: Vec<_> = record.tasks.iter().map(|task| task.disk.as_str()).collect();
        let message = format!("the snapshot has no disk `{missing}`; it has {}", names.join(", "));
        return Err(Failure::refused(reasons::DISK_NOT_FOUND, message));
    }
    let wanted = |task: &&DiskTask| {
        let included = order.include.is_empty() || order.include.contains(&task.disk);
        included && !order.exclude.contains(&task.disk)
    };
    let tasks: Vec<_> = record.tasks.iter().filter(wanted).collect();
    if tasks.is_empty() {
        return Err(Failure::refused(reasons::NO_DISKS, "the order leaves no disk of the snapshot"));
    }
    Ok(tasks)
}

/// The directory and the name of an image that a driver made: beneath an image root, or where a class keeps copies.
pub fn place(roots: &ImageRoots, image: &Path) -> Result<(ImageDirectory, String), ImageError> {
    match roots.directory_of(image) {
        Err(ImageError::OutsideRoots(_)) => {
            let parent = image.parent().ok_or_else(|| ImageError::NotAFilePath(image.to_owned()))?;
            let name = image.file_name().and_then(|name| name.to_str());
            let name = name.ok_or_else(|| ImageError::NotAFilePath(image.to_owned()))?;
            Ok((trusted_directory(parent)?, name.to_owned()))
        }
        found => found,
    }
}

/// Whether an image of a snapshot has a backing file; it fails unless all that it consists of is where it may be.
pub fn has_backing(roots: &ImageRoots, image: &Path, format: &str) -> Result<bool, Failure> {
    Ok(files(roots, image, format)?.len() > 1)
}

/// The files that an image of a snapshot consists of, its own first; it fails unless all are where they may be.
pub fn files(roots: &ImageRoots, image: &Path, format: &str) -> Result<Vec<FileId>, Failure> {
    let (mut directory, mut name) = place(roots, image).map_err(|error| failed(&error))?;
    let mut found = vec![];
    for _ in 0..DEEPEST {
        let file = directory.id(&name).map_err(|error| failed(&error))?;
        found.push(file.ok_or_else(|| gone(&directory.join(&name)))?);
        let layered = found.len() > 1 || LAYERED.contains(&format);
        let below = if layered { backing(&directory, &name)? } else { None };
        let Some(below) = below else { return Ok(found) };
        (directory, name) = roots.directory_of(&below).map_err(|error| failed(&error))?;
    }
    Err(Failure::new(reasons::RESTORE_FAILED, format!("the chain of {} comes to no end", image.display())))
}

/// The image below another, by its header.
fn backing(directory: &ImageDirectory, name: &str) -> Result<Option<PathBuf>, Failure> {
    let path = directory.join(name);
    let mut file = File::from(directory.open(name, OFlags::RDONLY).map_err(|error| failed(&error))?);
    let bad = |what: &str| Failure::new(reasons::RESTORE_FAILED, format!("{}: {what}", path.display()));
    let below = backing_of(&mut file).map_err(|error| bad(&chain(&error)))?;
    match has_external_data(&mut file) {
        Ok(true) => return Err(bad("has its data in another file")),
        Ok(false) | Err(HeaderError::NotQcow2) => {}
        Err(error) => return Err(bad(&chain(&error))),
    }
    match below {
        // QEMU takes what is before a colon for a protocol.
        Some(backing) if backing.contains(':') => Err(bad("its backing file isn't a path")),
        backing => Ok(backing.map(|backing| directory.path().join(backing))),
    }
}

fn gone(image: &Path) -> Failure {
    Failure::new(reasons::RESTORE_FAILED, format!("{} is gone", image.display()))
}

/// What a user is told of an error in a restore.
pub fn failed(error: &(dyn std::error::Error + 'static)) -> Failure {
    let full = error.downcast_ref::<ImageError>().is_some_and(ImageError::is_no_space);
    Failure::new(if full { reasons::NO_SPACE } else { reasons::RESTORE_FAILED }, chain(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qed_image_has_what_its_header_names_below_it() {
        let directory = tempfile::tempdir().unwrap();
        let roots = ImageRoots::new(vec![directory.path().to_owned()]);
        let path = |name: &str| directory.path().join(name);
        let create = |name: &str, more: &[&str]| {
            let mut command = std::process::Command::new("qemu-img");
            command.args(["create", "-q", "-f", "qed"]).args(more).arg(path(name)).arg("1M");
            assert!(command.status().unwrap().success());
        };
        create("base", &[]);
        create("above", &["-F", "qed", "-b", "base"]);
        create("outside", &["-u", "-F", "raw", "-b", "/etc/hostname"]);
        assert!(!has_backing(&roots, &path("base"), "qed").unwrap());
        assert!(has_backing(&roots, &path("above"), "qed").unwrap());
        assert!(has_backing(&roots, &path("outside"), "qed").is_err());
    }
}
