//! What an artifact must be before it is called complete.

use std::fs::File;
use std::path::Path;

use rustix::fs::OFlags;

use super::{DiskTask, DriverError, Result};
use crate::hypervisor::image::{ImageError, ImageRoots};
use crate::hypervisor::qcow2::read_header;

/// What QEMU rounds a raw image's length up to.
const SECTOR: u64 = 512;

/// The file is there, in its format, and as large as the disk. Formats other than raw and qcow2 are only looked for.
pub(crate) fn image(roots: &ImageRoots, path: &Path, format: &str, task: &DiskTask) -> Result<()> {
    let (directory, name) = roots.directory_of(path)?;
    let mut file = File::from(directory.open(&name, OFlags::RDONLY)?);
    let size = match format {
        "qcow2" => {
            let header = read_header(&mut file);
            header.map_err(|source| DriverError::Header { path: path.to_owned(), source })?.virtual_size
        }
        "raw" => {
            let found = file.metadata();
            let io = |source| ImageError::Io { doing: "examine", path: path.to_owned(), source };
            found.map_err(io)?.len().next_multiple_of(SECTOR)
        }
        _ => return Ok(()),
    };
    if size == task.size {
        return Ok(());
    }
    Err(DriverError::Verify(format!("disk {}: {} has {size} bytes, not {}", task.disk, path.display(), task.size)))
}
