//! What the images of a stopped VM's disks are once its snapshot is complete: whoever replaces them later can see that
//! nobody has written to them since.
//!
//! Compared for equality, never with a clock: file systems have clocks of their own, and QEMU writes to an image when it
//! closes it. So it is looked at when our QEMU has ended. A file's change time can't be set back; a rename moves it, but
//! names change hands before. A device has no times, but the kernel counts what is written to it.

use std::fs::File;
use std::path::PathBuf;

use rustix::fs::{AtFlags, OFlags};
use serde::{Deserialize, Serialize};

use crate::drivers::{DiskTask, lvm};
use crate::hypervisor::device::DeviceState;
use crate::hypervisor::image::{FileId, ImageDirectory, ImageError, ImageRoots};

/// One image, as it lay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AtRest {
    /// The disk.
    pub disk: String,
    /// Its image.
    pub image: ImageState,
}

/// What an image is, and all that a write to it changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ImageState {
    /// A file.
    File(FileState),
    /// A logical volume's device, and what the kernel counted of writes to it.
    Device(DeviceState),
}

/// A file, and all that a write to it changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileState {
    /// The file.
    pub id: FileId,
    /// Its length, in bytes.
    size: u64,
    /// When its data changed, in seconds and nanoseconds of the file system's clock.
    modified: (i64, u64),
    /// When it, its names or its owner changed, by the same.
    changed: (i64, u64),
}

impl FileState {
    /// Looks at a file.
    pub fn of(directory: &ImageDirectory, name: &str) -> Result<Self, ImageError> {
        let file = File::from(directory.open(name, OFlags::RDONLY)?);
        let found = rustix::fs::statx(&file, "", AtFlags::EMPTY_PATH, FileId::NEEDS);
        let found = found.map_err(|errno| ImageError::Io {
            doing: "examine",
            path: directory.join(name),
            source: errno.into(),
        })?;
        let time = |time: rustix::fs::StatxTimestamp| (time.tv_sec, time.tv_nsec.into());
        Ok(Self {
            id: FileId::of(&found),
            size: found.stx_size,
            modified: time(found.stx_mtime),
            changed: time(found.stx_ctime),
        })
    }
}

/// The images of the disks that are files or logical volumes. One that can't be looked at is left out, and won't be replaced.
#[must_use]
pub fn look(roots: &ImageRoots, tasks: &[DiskTask]) -> Vec<AtRest> {
    let state = |task: &DiskTask| {
        let file = |path: &PathBuf| {
            let found = roots.directory_of(path).and_then(|(directory, name)| FileState::of(&directory, &name));
            found.map(ImageState::File)
        };
        let device = || Some(DeviceState::of(&lvm::origin(task)?.device).map(ImageState::Device));
        let found = task.path.as_ref().map(file).or_else(device)?;
        let image = found.map_err(|error| tracing::warn!(%error, "an image at rest can't be looked at")).ok()?;
        Some(AtRest { disk: task.disk.clone(), image })
    };
    tasks.iter().filter_map(state).collect()
}
