//! What an artifact must be before it is called complete, as thoroughly as the class asks.

use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

use freezeframe_api::v1alpha1::Verify;
use rustix::fs::OFlags;

use super::tool::look;
use super::{Artifact, DiskTask, DriverError, Result};
use crate::causes::chain;
use crate::hypervisor::image::{ImageDirectory, ImageError, ImageRoots, trusted_directory};
use crate::hypervisor::qcow2::read_header;

/// What QEMU rounds a raw image's length up to.
const SECTOR: u64 = 512;
/// Bound of a thorough check of the smallest image; a larger one gets so much more.
const SHORTEST: Duration = Duration::from_secs(120);
/// A disk that is read more slowly than this, in bytes a second, is not going to be read.
const SLOWEST: u64 = 1 << 20;
/// `qemu-img check` found clusters that are counted but not used: space is wasted, and the data is right.
const LEAKS: i32 = 3;
/// `qemu-img check` can't check images of this format.
const NOT_CHECKABLE: i32 = 63;

/// Checks a complete disk.
pub(crate) async fn artifact(level: Verify, roots: &ImageRoots, task: &DiskTask) -> Result<()> {
    let Some(artifact) = &task.artifact else { return Ok(()) };
    if level == Verify::None {
        return Ok(());
    }
    let mut found = quick(roots, artifact, task);
    if found.is_ok() && level == Verify::Full {
        found = full(artifact, task).await;
    }
    // Whatever kept us from looking: what wasn't seen to be right isn't called so.
    found.map_err(|error| match error {
        DriverError::Verify(_) | DriverError::Header { .. } => error,
        other => DriverError::Verify(chain(&other)),
    })
}

/// The image is there, in its format, and as large as the disk. A volume is the driver's own to look at, and formats
/// other than raw and qcow2 are only looked for.
fn quick(roots: &ImageRoots, artifact: &Artifact, task: &DiskTask) -> Result<()> {
    let path = artifact.handle.as_path();
    let io = |source| ImageError::Io { doing: "examine", path: path.to_owned(), source };
    if std::fs::metadata(path).map_err(io)?.file_type().is_block_device() {
        return Ok(());
    }
    let (directory, name) = directory_of(roots, path)?;
    let mut file = File::from(directory.open(&name, OFlags::RDONLY)?);
    let size = match artifact.format.as_str() {
        "qcow2" => {
            let header = read_header(&mut file);
            header.map_err(|source| DriverError::Header { path: path.to_owned(), source })?.virtual_size
        }
        "raw" => file.metadata().map_err(io)?.len().next_multiple_of(SECTOR),
        _ => return Ok(()),
    };
    if size == task.size {
        return Ok(());
    }
    Err(DriverError::Verify(format!("disk {}: {} has {size} bytes, not {}", task.disk, path.display(), task.size)))
}

/// An artifact may be in a directory that the class names: no root applies there.
fn directory_of(roots: &ImageRoots, path: &Path) -> Result<(ImageDirectory, String)> {
    match roots.directory_of(path) {
        Err(ImageError::OutsideRoots(_)) => {
            let (Some(parent), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
                return Err(ImageError::NotAFilePath(path.to_owned()).into());
            };
            Ok((trusted_directory(parent)?, name.to_owned()))
        }
        found => Ok(found?),
    }
}

/// The image's metadata is right, and all of its data can be read, through the images below it too. A running VM has
/// those open, so both look without a lock: nothing above writes to them.
async fn full(artifact: &Artifact, task: &DiskTask) -> Result<()> {
    let (path, format) = (artifact.handle.as_path(), artifact.format.as_str());
    let bound = SHORTEST + Duration::from_secs(task.size / SLOWEST);
    let wrong = |what: &str, said: String| {
        let said = said.lines().last().unwrap_or_default().to_owned();
        Err(DriverError::Verify(format!("disk {}: {} {what}: {said}", task.disk, path.display())))
    };
    let checked = look(&["check", "-q", "-U", "-f", format], path, &[], bound).await?;
    if !matches!(checked.code, Some(0 | LEAKS | NOT_CHECKABLE)) {
        return wrong("is damaged", checked.said);
    }
    let nowhere = format!("driver=null-co,size={}", task.size);
    let read = ["convert", "-q", "-U", "-n", "-f", format];
    let read = look(&read, path, &["--target-image-opts", &nowhere], bound).await?;
    if read.code == Some(0) { Ok(()) } else { wrong("can't be read", read.said) }
}
