//! Where a new VM's images go: beside the snapshot's own disk, or in the class's directory.
//!
//! There each namespace has a directory of its own, so that no VM's images share one with another tenant's: drivers
//! read the headers of all that is beside an image. It stays, as the namespace's directory of VMs does.

use std::path::{Path, PathBuf};

use freezeframe_api::conditions::reasons;
use rustix::fs::{Gid, Mode, Uid};

use super::order::RestoreOrder;
use super::record::DiskRestore;
use crate::causes::chain;
use crate::hypervisor::VmKey;
use crate::hypervisor::image::{ImageDirectory, ImageError, ImageRoots};
use crate::session::outcome::Failure;

/// Path of a new VM's image, for a disk whose own image is `like`.
pub fn of_image(order: &RestoreOrder, new: &VmKey, like: &Path, disk: &str, format: &str) -> PathBuf {
    let name = format!("{}-{disk}.{format}", new.name);
    match &order.directory {
        Some(directory) => directory.join(&new.namespace).join(name),
        None => like.with_file_name(name),
    }
}

/// The directory that an image is to be made in; while the namespace has none, the class's own.
pub fn directory_of(roots: &ImageRoots, order: &RestoreOrder, image: &Path) -> Result<ImageDirectory, Failure> {
    let failed = |error: &ImageError| super::source::failed(error);
    let Some(directory) = &order.directory else {
        return roots.directory_of(image).map(|(found, _)| found).map_err(|error| failed(&error));
    };
    match roots.directory_of(image) {
        Err(error) if error.is_not_found() => classes(roots, directory),
        Err(ImageError::OutsideRoots(_)) => classes(roots, directory),
        found => found.map(|(found, _)| found).map_err(|error| failed(&error)),
    }
}

fn classes(roots: &ImageRoots, directory: &Path) -> Result<ImageDirectory, Failure> {
    roots.directory(directory).map_err(|error| {
        let message = format!("the class's restoreDirectory can't be used on this node: {}", chain(&error));
        Failure::refused(reasons::INVALID_PARAMETER, message)
    })
}

/// Makes the namespace's directory, owned as the class's is, if an image goes there.
pub fn make(roots: &ImageRoots, order: &RestoreOrder, disks: &[DiskRestore]) -> Result<(), Failure> {
    let (Some(directory), Some(new)) = (&order.directory, &order.new_vm) else { return Ok(()) };
    let beneath = directory.join(&new.namespace);
    if disks.iter().all(|disk| disk.path.parent() != Some(&beneath)) {
        return Ok(());
    }
    let parent = classes(roots, directory)?;
    match parent.existing_subdirectory(&new.namespace) {
        Err(error) if error.is_not_found() => {}
        found => return found.map(drop).map_err(|error| super::source::failed(&error)),
    }
    let made = parent.subdirectory(&new.namespace).map_err(|error| super::source::failed(&error))?;
    own(&parent, &made).map_err(|errno| super::source::failed(&errno))
}

/// Whose QEMU may reach the class's directory may reach this one.
fn own(parent: &ImageDirectory, made: &ImageDirectory) -> Result<(), rustix::io::Errno> {
    let like = rustix::fs::fstat(parent)?;
    rustix::fs::fchown(made, Some(Uid::from_raw(like.st_uid)), Some(Gid::from_raw(like.st_gid)))?;
    rustix::fs::fchmod(made, Mode::from_raw_mode(like.st_mode & 0o7777))?;
    rustix::fs::fsync(made)?;
    rustix::fs::fsync(parent)
}
