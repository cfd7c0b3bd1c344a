//! What restores copy from while nobody has the turn of the snapshot's VM for them.
//!
//! A full copy may take hours, in which the VM's snapshots go on: they put layers on top of what is there. The images
//! that are copied are below, and stay as they are for as long as the restore's record says that it copies. So the mark
//! is on disk before the first byte is read, and whatever ends the restore (its end, a failure, its deletion, now or
//! after a restart of the agent) takes it away.

use super::record::RestoreRecord;
use super::source;
use crate::drivers::DiskTask;
use crate::hypervisor::VmKey;
use crate::hypervisor::image::{FileId, ImageError};
use crate::session::Sessions;
use crate::session::journal::{JournalError, SessionRecord};
use crate::session::outcome::Failure;

/// The restores that copy from snapshots of a VM.
pub fn of_vm(sessions: &Sessions, vm: &VmKey) -> Result<Vec<RestoreRecord>, JournalError> {
    let mut restores = sessions.restores.all()?;
    restores.retain(|restore| restore.only_reads() && restore.order.vm == *vm);
    Ok(restores)
}

/// The restore that has a snapshot stay, in words: removing it would write to what is copied, or take it away.
///
/// Removing another snapshot writes to its file and to the image above that one, and renames or unlinks either. Where
/// the image above is copied, so is the file.
pub fn reader_of(sessions: &Sessions, record: &SessionRecord) -> Result<Option<String>, JournalError> {
    let reads = |restore: &RestoreRecord| {
        restore.order.source == record.order.uid || reads_file_of(sessions, restore, record).unwrap_or(true)
    };
    let reader = of_vm(sessions, &record.order.vm)?.into_iter().find(reads);
    Ok(reader.map(|restore| {
        let (namespace, name) = restore.order.restore;
        format!("restore {namespace}/{name} copies from the snapshot's images, and is waited for")
    }))
}

/// What can't be looked at may be the snapshot's: then the restore fails soon, and keeps it no longer.
fn reads_file_of(sessions: &Sessions, restore: &RestoreRecord, record: &SessionRecord) -> Result<bool, Failure> {
    let files = files_of(sessions, &record.tasks).map_err(|error| source::failed(&error))?;
    for disk in restore.disks.iter().filter(|disk| !disk.is_volume()) {
        let read = source::files(&sessions.roots, &disk.source, &disk.source_format)?;
        if read.iter().any(|file| files.contains(file)) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn files_of(sessions: &Sessions, tasks: &[DiskTask]) -> Result<Vec<FileId>, ImageError> {
    let places = tasks.iter().filter_map(|task| sessions.drivers.find(&task.driver)?.place(task));
    let mut files = vec![];
    for path in places.filter(|path| !path.starts_with("/dev")) {
        match source::place(&sessions.roots, &path).and_then(|(directory, name)| directory.id(&name)) {
            Ok(found) => files.extend(found),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(files)
}
