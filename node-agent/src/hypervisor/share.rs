//! Files that share their data until either is written: XFS and btrfs.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{IFlags, OFlags};
use rustix::io::Errno;

use super::image::ImageDirectory;

/// btrfs shares data only between files that are both copied on write or both not.
pub fn match_copy_on_write(like: impl AsFd, made: &OwnedFd) -> Result<(), Errno> {
    let wanted = rustix::fs::ioctl_getflags(like)? & IFlags::NOCOW;
    let found = rustix::fs::ioctl_getflags(made)?;
    if found & IFlags::NOCOW == wanted {
        return Ok(());
    }
    rustix::fs::ioctl_setflags(made, (found - IFlags::NOCOW) | wanted)
}

/// Makes `made`, an empty file, share all data of `source`.
pub fn share(source: impl AsFd, made: &OwnedFd) -> Result<(), Errno> {
    match_copy_on_write(&source, made)?;
    rustix::fs::ioctl_ficlone(made, source)
}

/// Whether a file in `directory` can share the data of `source`: tried on one that never gets a name, since neither the
/// file system's kind nor its device number tells.
#[must_use]
pub fn can_share(source: &Path, from: &ImageDirectory, directory: &ImageDirectory) -> bool {
    let Some(name) = source.file_name().and_then(|name| name.to_str()) else { return false };
    let (Ok(source), Ok(trial)) = (from.open(name, OFlags::RDONLY), directory.unnamed()) else { return false };
    let source = File::from(source);
    // An empty file would share nothing anywhere.
    source.metadata().is_ok_and(|found| found.len() > 0) && share(&source, &trial).is_ok()
}
