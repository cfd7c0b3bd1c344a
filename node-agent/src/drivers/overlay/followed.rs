//! What a disk is by now, on whose image a layer was made that its VM's owner has to follow: told by names, headers and
//! times of files, so that it doesn't matter who remembers what.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::device_merge::{is_filled, is_unknown};
use super::follow::{FORMATS, image_below, layer_on, metadata, overwritten};
use super::prepare::header;
use super::state::State;
use crate::drivers::DiskTask;
use crate::hypervisor::image::{ImageDirectory, ImageRoots};
use crate::hypervisor::target_file::KnownDisk;

/// The chain is never deeper than this; a longer one is a loop.
const DEEPEST: usize = 1024;

/// The image that a task's disk was, and the layer elsewhere that is the disk in its place.
pub fn image_and_layer(task: &DiskTask) -> Option<(PathBuf, PathBuf)> {
    let state: State = task.state().ok().filter(|_| task.driver == "overlay")?;
    // Before it was lent, a device may have anything.
    let elsewhere = state.is_device() || state.is_elsewhere();
    let elsewhere = elsewhere && (!state.is_on_device() || state.overlay.is_some());
    elsewhere.then(|| (state.layer.clone().into(), state.directory.join(&state.disk_file)))
}

/// Why a disk isn't what it should be, if its VM was started with an image that a layer had been made on: whether it
/// runs on that image now, or, of a VM that doesn't run, did before. One that runs on the layer follows, and a merge of
/// that layer writes to the image below it.
pub fn not_followed(disk: &Path, format: &str, runs: bool, roots: &ImageRoots) -> Option<String> {
    if FORMATS.contains(&format) {
        return layer_over(disk, format, roots).map(|layer| has_layer(disk, &layer));
    }
    let (image, _) = image_below(disk).filter(|_| !runs)?;
    let modified = |path: &Path| {
        let (directory, name) = roots.directory_of(path).ok()?;
        metadata(&directory, &name).ok().map(|found| (found.mtime(), found.mtime_nsec()))
    };
    (modified(&image)? > modified(disk)?).then(|| overwritten(&image))
}

/// What to say of a disk that a layer was made on which the VM wasn't started with.
pub fn has_layer(image: &Path, layer: &Path) -> String {
    format!(
        "the VM was started with {}, and what was written after a snapshot of it is in {}: {} to go on without it",
        image.display(),
        layer.display(),
        if is_device(layer) { "clear the beginning of that device" } else { "delete that file" }
    )
}

/// The layer that is the disk in an image's place.
pub fn layer_over(image: &Path, format: &str, roots: &ImageRoots) -> Option<PathBuf> {
    let (directory, name) = roots.directory_of(image).ok()?;
    let layer = layer_on(&name, format);
    // Its backing file may be a layer that was snapshotted since.
    let mut below = header(&directory, &layer).ok()?.backing?;
    for _ in 0..DEEPEST {
        let beside = Path::new(&below).file_name()?.to_str()?;
        if beside == name {
            return Some(directory.join(&layer));
        }
        below = header(&directory, beside).ok()?.backing?;
    }
    None
}

/// The image at the bottom of a snapshot's, if that one was followed. What a guest wrote to it is no header to go on by.
pub fn image_at_bottom(directory: &ImageDirectory, state: &State) -> Option<PathBuf> {
    let image = image_below(&directory.join(&state.disk_file)).map(|(image, _)| image);
    let mut name = state.layer.clone();
    for _ in 0..DEEPEST {
        name = header(directory, &name).ok()?.backing?;
        let path = directory.join(&name);
        if Some(&path) == image.as_ref() || Path::new(&name).is_absolute() {
            return Some(path);
        }
    }
    None
}

/// Whether a layer on an image elsewhere is there, and not merged. What has its name may be another disk's by now. One on
/// a device goes on as the disk when the image isn't below it any more, unless it reads as nothing.
pub fn is_layer(image: &Path, layer: &Path, roots: &ImageRoots) -> bool {
    let Ok((directory, mut name)) = roots.directory_of(layer) else { return false };
    if is_device(layer) {
        name = layer.display().to_string();
        if header(&directory, &name).is_ok_and(|found| found.backing.is_none()) {
            return is_filled(&directory, layer);
        }
    }
    for _ in 0..DEEPEST {
        match header(&directory, &name).ok().and_then(|found| found.backing) {
            Some(below) if Path::new(&below).is_absolute() => return is_same(Path::new(&below), image),
            Some(below) => name = below,
            None => return false,
        }
    }
    false
}

/// Whether an image may be one that a layer elsewhere was made on.
pub fn may_have_layer_elsewhere(format: &str, image: &Path) -> bool {
    FORMATS.contains(&format) || is_device(image)
}

/// Whether a layer is on a device of which nobody can tell what is on it.
pub fn is_missing(layer: &Path, roots: &ImageRoots) -> bool {
    is_device(layer) && is_unknown(layer, roots)
}

fn is_device(layer: &Path) -> bool {
    layer.starts_with("/dev")
}

/// Whether two names are of one image: a device's may be links.
fn is_same(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| std::fs::canonicalize(path).ok();
    one == other || real(one).is_some_and(|one| real(other) == Some(one))
}

/// What a disk that was last known as `disk` is by now.
#[must_use]
pub fn now(disk: &KnownDisk, roots: &ImageRoots) -> KnownDisk {
    let (path, format) = if FORMATS.contains(&disk.format.as_str()) {
        (layer_over(&disk.path, &disk.format, roots), "qcow2")
    } else {
        let is_gone = |path: &Path| {
            let found = roots.directory_of(path).and_then(|(directory, name)| directory.id(&name));
            matches!(found, Ok(None))
        };
        match image_below(&disk.path).filter(|_| is_gone(&disk.path)) {
            Some((image, format)) => (Some(image).filter(|image| !is_gone(image)), format),
            None => (None, ""),
        }
    };
    match path {
        Some(path) => KnownDisk { path, format: format.to_owned(), ..disk.clone() },
        None => disk.clone(),
    }
}
