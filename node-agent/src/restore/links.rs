//! Which images were made on top of a snapshot's data, so that it must stay.
//!
//! Looked up in the images' headers, in the directories where restores made such: an image may have been deleted, been
//! rebased onto something else, or become the backing file of another since.

use std::fs::File;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::drivers::Drivers;
use crate::hypervisor::backing::backing_of;
use crate::hypervisor::image::{ImageDirectory, ImageError, ImageRoots};
use crate::session::journal::SessionRecord;

/// An image that needs the snapshot's data as it stands; drivers that merge look for themselves.
pub fn image_on_top(
    roots: &ImageRoots,
    drivers: &Drivers,
    record: &SessionRecord,
) -> Result<Option<PathBuf>, ImageError> {
    let merges = |driver: &str| drivers.find(driver).is_some_and(|driver| driver.merges());
    let tasks = record.tasks.iter().filter(|task| !merges(&task.driver));
    let data: Vec<_> = tasks.filter_map(|task| task.artifact.as_ref()).map(|a| a.handle.as_path()).collect();
    for directory in &record.linked_in {
        // Where its file system isn't mounted, it can't be told.
        let Some(directory) = roots.existing_directory(directory)? else { continue };
        if let Some(found) = on_top_in(&directory, &data)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

fn on_top_in(directory: &ImageDirectory, data: &[&Path]) -> Result<Option<PathBuf>, ImageError> {
    for name in directory.names()? {
        // A file that isn't an image, or isn't a file, backs onto nothing; one that can't be read may.
        let file = match directory.open(&name, OFlags::RDONLY) {
            Ok(file) => file,
            Err(error) if error.is_no_image() => continue,
            Err(error) => return Err(error),
        };
        let backing = backing_of(&mut File::from(file)).map_err(|error| directory.unreadable(&name, error))?;
        let below = backing.map(|backing| directory.path().join(backing));
        if below.is_some_and(|below| data.contains(&below.as_path())) {
            return Ok(Some(directory.join(&name)));
        }
    }
    Ok(None)
}
