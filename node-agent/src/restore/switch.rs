//! The new images get the disks' names.
//!
//! In place, one disk's images exchange their names in a single step. Several disks can't: so all old images go away
//! from their names first, and then the new ones come. A VM that is started in between doesn't find one of its disks,
//! whichever it opens first, and never runs on a mixed set. From the first name on there is no way back.
//!
//! Everything is looked up by what the files are, so that it may be called again after a crash.

use freezeframe_api::conditions::reasons;

use super::Restores;
use super::record::{DiskRestore, Method, RestoreRecord};
use super::source::failed;
use super::stop::{hold_images, not_running};
use crate::crash;
use crate::drivers::overlay::dependents;
use crate::hypervisor::image::{FileId, ImageDirectory, ImageError};
use crate::hypervisor::lock::ImageLock;
use crate::session::at_rest::FileState;
use crate::session::journal::{SessionRecord, Stage};
use crate::session::outcome::Failure;

type Result<T> = std::result::Result<T, ImageError>;

/// One disk's files: the names that change hands, and which files they must be.
struct Names {
    directory: ImageDirectory,
    disk: String,
    unfinished: String,
    away: String,
    made: Option<FileId>,
    replaced: Option<FileId>,
}

impl Names {
    fn of(restores: &Restores, disk: &DiskRestore, id: &str) -> Result<Self> {
        let roots = &restores.sessions.roots;
        let (directory, name) = roots.directory_of(&disk.path)?;
        let (_, unfinished) = roots.directory_of(&disk.unfinished(id))?;
        let (_, away) = roots.directory_of(&disk.away(id))?;
        Ok(Self { directory, disk: name, unfinished, away, made: disk.made, replaced: disk.replaced })
    }

    fn is(&self, name: &str, file: Option<FileId>) -> Result<bool> {
        Ok(file.is_some() && self.directory.id(name)? == file)
    }

    fn is_replaced_at(&self, name: &str) -> Result<bool> {
        self.is(name, self.replaced)
    }

    /// Whether a name has changed hands. Another file of the disk's name says nothing of that: it may be anybody's.
    fn has_begun(&self) -> Result<bool> {
        let left = self.is_replaced_at(&self.away)? || self.is_replaced_at(&self.unfinished)?;
        Ok(left || (!self.is(&self.unfinished, self.made)? && !self.is_replaced_at(&self.disk)?))
    }

    /// Whether the new image got the disk's name. It need not have it any more: the VM may have been cut since. But then
    /// another has.
    fn is_finished(&self) -> Result<bool> {
        let left = self.is(&self.unfinished, self.made)? || self.is_replaced_at(&self.disk)?;
        Ok(!left && self.directory.id(&self.disk)?.is_some())
    }
}

fn all(restores: &Restores, record: &RestoreRecord) -> Result<Vec<Names>> {
    let id = record.order.id();
    // A volume has its name from the start.
    let files = record.disks.iter().filter(|disk| disk.method != Method::Volume);
    files.map(|disk| Names::of(restores, disk, &id)).collect()
}

/// Whether a disk's name has changed hands, so that there is no way back.
pub fn has_begun(restores: &Restores, record: &RestoreRecord) -> Result<bool> {
    for names in all(restores, record)? {
        if names.replaced.is_some() && names.has_begun()? {
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
    check_made(restores, record)?;
    let kept = check_kept(restores, record)?;
    for disk in &mut record.disks {
        disk.replaced = Some(check_unchanged(restores, disk, &kept)?);
    }
    Ok(held)
}

/// Sees to it that nobody uses the old images that still have their names, or starts the VM, while others are gone from
/// theirs. Where every disk has its new image the VM may run.
pub async fn hold_the_rest(
    restores: &Restores,
    record: &RestoreRecord,
) -> std::result::Result<Vec<ImageLock>, Failure> {
    if record.order.new_vm.is_some() {
        return Ok(vec![]);
    }
    let all = all(restores, record).map_err(|error| failed(&error))?;
    let mut rest = vec![];
    let mut finished = true;
    for (names, disk) in all.iter().zip(&record.disks) {
        finished &= names.is_finished().map_err(|error| failed(&error))?;
        if names.is_replaced_at(&names.disk).map_err(|error| failed(&error))? {
            rest.push(disk.clone());
        }
    }
    if finished {
        return Ok(vec![]);
    }
    not_running(restores, &record.order.vm).await?;
    let held = hold_images(restores, &rest).await?;
    not_running(restores, &record.order.vm).await?;
    Ok(held)
}

/// Every new image is there to get its disk's name: once old ones are gone from theirs, it would be too late.
fn check_made(restores: &Restores, record: &RestoreRecord) -> std::result::Result<(), Failure> {
    for names in all(restores, record).map_err(|error| failed(&error))? {
        if !names.is(&names.unfinished, names.made).map_err(|error| failed(&error))? {
            let message = format!("{} is gone", names.directory.join(&names.unfinished).display());
            return Err(Failure::new(reasons::RESTORE_FAILED, message));
        }
    }
    Ok(())
}

/// The snapshot of the state before has every disk that is replaced.
fn check_kept(restores: &Restores, record: &RestoreRecord) -> std::result::Result<SessionRecord, Failure> {
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
        if task.path.as_ref() != Some(&disk.path) || task.format != disk.format {
            let now = task.path.as_ref().map_or_else(|| "no file".into(), |path| path.display().to_string());
            let message = format!("disk {} is {now} ({}) now, not {}", disk.disk, task.format, disk.path.display());
            return Err(Failure::new(reasons::VM_CHANGED, message));
        }
    }
    Ok(kept)
}

/// Nothing was written since the state before was kept, and no image needs the one that goes.
fn check_unchanged(
    restores: &Restores,
    disk: &DiskRestore,
    kept: &SessionRecord,
) -> std::result::Result<FileId, Failure> {
    let changed = |what: String| Failure::new(reasons::VM_CHANGED, what);
    let path = disk.path.display();
    let then = kept.at_rest.iter().find(|then| then.disk == disk.disk);
    let unknown = || changed(format!("{path} wasn't at rest all the time while its state was kept"));
    let then = then.ok_or_else(unknown)?.file;
    let (directory, name) = restores.sessions.roots.directory_of(&disk.path).map_err(|error| failed(&error))?;
    let found = match FileState::of(&directory, &name) {
        Err(error) if error.is_not_found() => return Err(changed(format!("{path} is gone"))),
        found => found.map_err(|error| failed(&error))?,
    };
    if found != then {
        return Err(changed(format!(
            "{path} isn't what it was when its state was kept: it was written to, or replaced"
        )));
    }
    let found = found.id;
    match dependents(&directory, found).map_err(|error| failed(&error))?.first() {
        None => Ok(found),
        Some(other) => Err(changed(format!("{other} was made on top of {}", disk.path.display()))),
    }
}

/// Gives every new image its disk's name, and lets go of the old ones. May be called again and again.
pub fn give_names(restores: &Restores, record: &RestoreRecord) -> Result<()> {
    let all = all(restores, record)?;
    match all.as_slice() {
        [one] if one.replaced.is_some() => exchange(one)?,
        _ => {
            for names in &all {
                if names.is_replaced_at(&names.disk)? {
                    names.directory.rename_new(&names.disk, &names.away)?;
                    crash::point("restore-away");
                }
            }
            for names in &all {
                if names.is(&names.unfinished, names.made)? {
                    names.directory.rename_new(&names.unfinished, &names.disk)?;
                    crash::point("restore-switched-one");
                }
            }
        }
    }
    for names in &all {
        if !names.is_finished()? {
            return Err(ImageError::NotRegular(names.directory.join(&names.disk)));
        }
    }
    crash::point("restore-switched");
    for names in &all {
        for old in [&names.away, &names.unfinished] {
            if names.is_replaced_at(old)? {
                names.directory.unlink(old)?;
            }
        }
    }
    Ok(())
}

fn exchange(names: &Names) -> Result<()> {
    if names.is_replaced_at(&names.disk)? && names.is(&names.unfinished, names.made)? {
        names.directory.exchange(&names.disk, &names.unfinished)?;
    }
    Ok(())
}

/// Removes what was made. Only while no disk's name has changed hands: an old image is never touched.
pub fn take_back(restores: &Restores, record: &RestoreRecord) -> Result<()> {
    for names in all(restores, record)? {
        if !names.is_replaced_at(&names.unfinished)? {
            names.directory.unlink(&names.unfinished)?;
        }
        // A new VM's image has its own name from here on.
        if names.replaced.is_none() && record.order.new_vm.is_some() && names.is(&names.disk, names.made)? {
            names.directory.unlink(&names.disk)?;
        }
    }
    Ok(())
}
