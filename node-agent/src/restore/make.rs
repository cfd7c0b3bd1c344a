//! Making the new images, each under a name of its own until all are complete and on disk.
//!
//! May be called again after a crash: what isn't on record as made is begun anew.

use std::os::fd::AsFd;
use std::path::Path;

use freezeframe_api::conditions::reasons;
use rustix::fs::{Mode, OFlags};

use super::record::{DiskRestore, ImageId, Method};
use super::source::{failed, has_backing, place};
use super::{Restores, tool, volumes};
use crate::causes::chain;
use crate::drivers::qemu_img;
use crate::hypervisor::image::{ImageDirectory, ImageError};
use crate::hypervisor::qcow2::read_header;
use crate::hypervisor::share::share;
use crate::session::outcome::Failure;

/// Makes one disk's image and puts it on disk; `told` learns of a copy's progress in percent.
pub async fn make(
    restores: &Restores,
    disk: &DiskRestore,
    id: &str,
    told: &(dyn Fn(i32) + Send + Sync),
) -> Result<ImageId, Failure> {
    if disk.is_volume() {
        return volumes::make(disk, id, told).await;
    }
    let roots = &restores.sessions.roots;
    let unfinished = disk.unfinished(id);
    let (directory, name) = roots.directory_of(&unfinished).map_err(|error| failed(&error))?;
    let there = directory.id(&name).map_err(|error| failed(&error))?;
    if let Some(made) = there.map(ImageId::File).filter(|there| disk.made.as_ref() == Some(there)) {
        return Ok(made);
    }
    // The plan saw it; the headers may have changed since.
    has_backing(roots, &disk.source, &disk.source_format)?;
    directory.unlink(&name).map_err(|error| failed(&error))?;
    match disk.method {
        Method::Clone => clone(restores, disk, directory, name.clone()).await?,
        Method::Link => link(disk, &directory, &unfinished).await?,
        Method::Copy | Method::Volume | Method::VolumeCopy => copy(disk, &directory, &unfinished, told).await?,
    }
    let (directory, _) = roots.directory_of(&unfinished).map_err(|error| failed(&error))?;
    finish(restores, disk, &directory, &name)
}

/// Cloning writes out what is dirty of the source: that may take a while.
async fn clone(
    restores: &Restores,
    disk: &DiskRestore,
    directory: ImageDirectory,
    name: String,
) -> Result<(), Failure> {
    let (from, source) = place(&restores.sessions.roots, &disk.source).map_err(|error| failed(&error))?;
    let cloning = tokio::task::spawn_blocking(move || {
        let source = from.open(&source, OFlags::RDONLY)?;
        let made = directory.create(&name, Mode::from_raw_mode(0o600))?;
        share(source.as_fd(), &made).map_err(|errno| ImageError::Io {
            doing: "clone into",
            path: directory.join(&name),
            source: errno.into(),
        })
    });
    match cloning.await {
        Ok(cloned) => cloned.map_err(|error| failed(&error)),
        Err(error) => Err(failed(&error)),
    }
}

/// A relative name where it can be: the images may be moved together, and merging looks for such.
async fn link(disk: &DiskRestore, directory: &ImageDirectory, unfinished: &Path) -> Result<(), Failure> {
    let beside = disk.source.parent() == Some(directory.path());
    let backing = if beside { disk.source.file_name().map(Path::new) } else { Some(disk.source.as_path()) };
    let backing = backing.and_then(Path::to_str).unwrap_or_default();
    let size = disk.size.to_string();
    let arguments = ["create", "-q", "-f", "qcow2", "-F", &disk.source_format, "-b", backing];
    let made = qemu_img(&arguments, unfinished, Some(&size)).await;
    made.map_err(|error| no_space_or_failed(&error.or_no_space(directory)))
}

async fn copy(
    disk: &DiskRestore,
    directory: &ImageDirectory,
    unfinished: &Path,
    told: &(dyn Fn(i32) + Send + Sync),
) -> Result<(), Failure> {
    let target = tool::Target { image: unfinished, format: &disk.format, exists: false };
    let copied = tool::convert((&disk.source, &disk.source_format), target, told).await;
    // `qemu-img` tells a full disk in words only, so the free space is looked at instead.
    copied.map_err(|error| match directory.free_bytes() {
        Ok(free) if free < NEARLY_NOTHING => {
            let (path, needed) = (directory.path().display(), disk.needed);
            let message = format!("disk {}: {needed} bytes are needed in {path}, and {free} are free", disk.disk);
            Failure::new(reasons::NO_SPACE, message)
        }
        _ => failed(&error),
    })
}

const NEARLY_NOTHING: u64 = 1 << 20;

fn no_space_or_failed(error: &crate::drivers::DriverError) -> Failure {
    let full = matches!(error, crate::drivers::DriverError::NoSpace { .. });
    Failure::new(if full { reasons::NO_SPACE } else { reasons::RESTORE_FAILED }, chain(error))
}

/// Checks an image, gives it its owner and puts it on disk.
fn finish(restores: &Restores, disk: &DiskRestore, directory: &ImageDirectory, name: &str) -> Result<ImageId, Failure> {
    check(disk, directory, name)?;
    let (like, like_name) = match restores.sessions.roots.directory_of(&disk.like) {
        Ok((like, like_name)) if like.id(&like_name).is_ok_and(|found| found.is_some()) => (like, like_name),
        // The snapshot's disk is gone; its data has the same owner.
        _ => place(&restores.sessions.roots, &disk.source).map_err(|error| failed(&error))?,
    };
    directory.copy_ownership(name, &like, &like_name).map_err(|error| failed(&error))?;
    directory.sync_file(name).map_err(|error| failed(&error))?;
    directory.sync().map_err(|error| failed(&error))?;
    let made = directory.id(name).map_err(|error| failed(&error))?;
    made.map(ImageId::File)
        .ok_or_else(|| Failure::new(reasons::RESTORE_FAILED, format!("{} is gone", directory.join(name).display())))
}

/// Format and size of an image, and what it backs onto.
pub fn check(disk: &DiskRestore, directory: &ImageDirectory, name: &str) -> Result<(), Failure> {
    const SECTOR: u64 = 512;
    let path = directory.join(name);
    let wrong =
        |what: &str| Failure::new(reasons::VERIFY_FAILED, format!("disk {}: {} {what}", disk.disk, path.display()));
    let mut file = std::fs::File::from(directory.open(name, OFlags::RDONLY).map_err(|error| failed(&error))?);
    let (size, backing) = match disk.format.as_str() {
        "qcow2" => {
            let header = read_header(&mut file).map_err(|error| wrong(&chain(&error)))?;
            (header.virtual_size, header.backing.is_some())
        }
        "raw" => (file.metadata().map_err(|error| failed(&error))?.len().next_multiple_of(SECTOR), false),
        _ => return Ok(()),
    };
    match () {
        () if size != disk.size => Err(wrong(&format!("has {size} bytes, not {}", disk.size))),
        () if backing != (disk.method == Method::Link) => Err(wrong("has not the backing file that it should")),
        () => Ok(()),
    }
}
