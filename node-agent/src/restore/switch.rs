//! The new images get the disks' names.
//!
//! In place, one disk's files exchange their names in a single step. Volumes can't, nor can several disks: so all old
//! images go away from their names first, and then the new ones come. A VM that is started in between doesn't find one of its disks,
//! whichever it opens first, and never runs on a mixed set. From the first new image on there is no way back.
//!
//! Everything is looked up by what the files are, so that it may be called again after a crash.

use std::path::PathBuf;

use freezeframe_api::conditions::reasons;

use super::Restores;
use super::names::{Names, NamesError};
use super::record::{DiskRestore, ImageId, RestoreRecord};
use super::source::failed;
use super::stop::{hold_images, not_running};
use super::volumes::volume_at;
use crate::crash;
use crate::drivers::DiskTask;
use crate::drivers::lvm::{self, commands};
use crate::drivers::overlay::dependents;
use crate::hypervisor::device::DeviceState;
use crate::hypervisor::lock::ImageLock;
use crate::session::at_rest::{FileState, ImageState};
use crate::session::journal::{SessionRecord, Stage};
use crate::session::outcome::Failure;

type Result<T> = std::result::Result<T, NamesError>;

/// The names of all disks.
pub fn all(restores: &Restores, record: &RestoreRecord) -> Result<Vec<Names>> {
    let id = record.order.id();
    record.disks.iter().map(|disk| Names::of(restores, disk, &id)).collect()
}

/// Whether a disk's name has changed hands, so that there is no way back.
pub async fn has_begun(restores: &Restores, record: &RestoreRecord) -> Result<bool> {
    for names in all(restores, record)? {
        if names.replaces() && names.places().await?.has_begun() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Sees to it that what is replaced is kept, that nobody uses it, and that nobody will while the locks live.
pub async fn make_ready(
    restores: &Restores,
    record: &mut RestoreRecord,
) -> std::result::Result<Vec<ImageLock>, Failure> {
    not_running(restores, &record.order.vm).await?;
    let held = hold_images(restores, &record.disks).await?;
    // Once more: a VM that was started before the locks were had has its monitor by now, or fails to open its disks.
    not_running(restores, &record.order.vm).await?;
    check_made(restores, record).await?;
    let kept = check_kept(restores, record)?;
    for disk in &mut record.disks {
        disk.replaced = Some(check_unchanged(restores, disk, &kept).await?);
    }
    Ok(held)
}

/// Every new image is there to get its disk's name: once old ones are gone from theirs, it would be too late.
async fn check_made(restores: &Restores, record: &RestoreRecord) -> std::result::Result<(), Failure> {
    for names in all(restores, record).map_err(|error| failed(&error))? {
        if !names.places().await.map_err(|error| failed(&error))?.made_waits {
            let message = format!("what was made for {names} is gone");
            return Err(Failure::new(reasons::RESTORE_FAILED, message));
        }
    }
    Ok(())
}

/// The snapshot of the state before has every disk that is replaced.
pub fn check_kept(restores: &Restores, record: &RestoreRecord) -> std::result::Result<SessionRecord, Failure> {
    let missing = |what: String| Failure::new(reasons::PRE_RESTORE_FAILED, what);
    let uid = record.order.pre_restore.as_deref();
    let uid = uid.ok_or_else(|| missing("the order names no snapshot of the state before".into()))?;
    let kept = restores.sessions.journal.load(uid)?.filter(|kept| {
        let whole = kept.stage == Stage::Complete && !kept.removing;
        whole && kept.order.vm == record.order.vm && kept.order.uid != record.order.source
    });
    let kept = kept.ok_or_else(|| missing("the snapshot of the state before isn't complete on this node".into()))?;
    for disk in &record.disks {
        let task = kept.tasks.iter().find(|task| task.disk == disk.disk && task.artifact.is_some());
        let task = task.ok_or_else(|| missing(format!("the state before of disk {} isn't kept", disk.disk)))?;
        let now = image_of(task);
        if now.as_ref() != Some(&disk.path) || task.format != disk.format {
            let now = now.map_or_else(|| "no file and no volume".into(), |path| path.display().to_string());
            let message = format!("disk {} is {now} ({}) now, not {}", disk.disk, task.format, disk.path.display());
            return Err(Failure::new(reasons::VM_CHANGED, message));
        }
    }
    Ok(kept)
}

/// Where the image of a disk was when it was cut; a volume by its own name.
fn image_of(task: &DiskTask) -> Option<PathBuf> {
    let volume = || lvm::origin(task).filter(|origin| origin.volume.is_named_by(&origin.device));
    task.path.clone().or_else(|| volume().map(|origin| origin.volume.path()))
}

/// Nothing was written since the state before was kept, and no image needs the one that goes.
pub async fn check_unchanged(
    restores: &Restores,
    disk: &DiskRestore,
    kept: &SessionRecord,
) -> std::result::Result<ImageId, Failure> {
    let changed = |what: String| Failure::new(reasons::VM_CHANGED, what);
    let path = disk.path.display();
    let then = kept.at_rest.iter().find(|then| then.disk == disk.disk);
    let unknown = || changed(format!("{path} wasn't at rest all the time while its state was kept"));
    let then = &then.ok_or_else(unknown)?.image;
    let written =
        || changed(format!("{path} isn't what it was when its state was kept: it was written to, or replaced"));
    if disk.is_volume() {
        let found = DeviceState::of(&disk.path).map_err(|error| failed(&error))?;
        let volume = commands::find(&volume_at(&disk.path)?).await.map_err(|error| failed(&error))?;
        let volume = volume.ok_or_else(|| changed(format!("{path} is gone")))?;
        return if *then == ImageState::Device(found) { Ok(ImageId::Volume(volume.lv_uuid)) } else { Err(written()) };
    }
    let (directory, name) = restores.sessions.roots.directory_of(&disk.path).map_err(|error| failed(&error))?;
    let found = match FileState::of(&directory, &name) {
        Err(error) if error.is_not_found() => return Err(changed(format!("{path} is gone"))),
        found => found.map_err(|error| failed(&error))?,
    };
    if *then != ImageState::File(found) {
        return Err(written());
    }
    let found = found.id;
    match dependents(&directory, found).map_err(|error| failed(&error))?.first() {
        None => Ok(ImageId::File(found)),
        Some(other) => Err(changed(format!("{other} was made on top of {}", disk.path.display()))),
    }
}

/// Gives every new image its disk's name, and lets go of the old ones. May be called again and again.
pub async fn give_names(restores: &Restores, record: &RestoreRecord, held: Vec<ImageLock>) -> Result<()> {
    let all = all(restores, record)?;
    match all.as_slice() {
        [Names::Files(one)] if all[0].replaces() => one.exchange()?,
        _ => {
            for names in &all {
                if names.put_away().await? {
                    crash::point("restore-away");
                }
            }
            for names in &all {
                if names.bring_in().await? {
                    crash::point("restore-switched-one");
                }
            }
        }
    }
    for names in &all {
        if !names.places().await?.is_finished() {
            return Err(NamesError::Lost(names.to_string()));
        }
    }
    crash::point("restore-switched");
    // No disk's name leads to an old image any more, and a volume that is open can't be removed.
    drop(held);
    for names in &all {
        names.let_go().await?;
    }
    Ok(())
}

/// Removes what was made. Only while no disk's name has changed hands: an old image is never touched.
pub async fn take_back(restores: &Restores, record: &RestoreRecord) -> Result<()> {
    for disk in record.disks.iter().filter(|disk| !lies_nowhere(disk)) {
        // A new VM's image has its own name from here on.
        Names::of(restores, disk, &record.order.id())?.take_back(record.order.new_vm.is_some()).await?;
    }
    Ok(())
}

/// Whether not even the directory was made that the image was to be in.
fn lies_nowhere(disk: &DiskRestore) -> bool {
    !disk.is_volume() && disk.made.is_none() && disk.path.parent().is_some_and(|directory| !directory.exists())
}
