//! A disk whose format no layer of ours has: the layer is a new file, and the VM's owner starts the VM with that next.
//!
//! Names can't change hands here: a command line that says `raw` would open a qcow2 layer as the guest's own data. So
//! the former disk keeps its name and becomes the snapshot's image, and the new layer is a file beside it. What the new
//! layer is called says what it lies on, so that nothing has to be remembered for it.
//!
//! ```text
//!  before   disk.img                                            QEMU ─► disk.img
//!  after    disk.img ◄─backing─ disk.img.vmsnap-over-raw.qcow2  QEMU ─► new layer ─► disk.img, the snapshot's image
//! ```
//!
//! From then on the disk is that qcow2 file, and further layers take its name as always. When all layers are merged,
//! the disk is its old image again.

use std::io::{Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use freezeframe_qemu::Node;
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::lent;
use super::parameters::{DIRECTORY, Parameters};
use super::prepare::header;
use super::state::State;
use crate::causes::chain;
use crate::drivers::tool::look;
use crate::drivers::{DiskTask, DriverError, Result};
use crate::hypervisor::device::number_of;
use crate::hypervisor::image::{ImageDirectory, ImageError, ImageRoots};
use crate::hypervisor::qcow2::HeaderError;

/// Formats of images that may get a layer which the VM's owner follows.
pub const FORMATS: [&str; 2] = ["raw", "qed"];
/// End of the name of a layer's node whose VM has a command line that leads elsewhere.
pub const APART: &str = "-t";
/// End of the name of a node that took the place of a base which QEMU opened by itself.
const IN_PLACE: &str = "-b";
/// Beginning of the names of our nodes.
const OURS: &str = "ff-";
const INFIX: &str = ".vmsnap-over-";
const SUFFIX: &str = ".qcow2";
/// QEMU rounds a raw image's length up to this.
const SECTOR: u64 = 512;
/// Bound of listing what an image has.
const LOOK_TIMEOUT: Duration = Duration::from_secs(60);

/// Name of the new layer on an image.
#[must_use]
pub fn layer_on(image: &str, format: &str) -> String {
    format!("{image}{INFIX}{format}{SUFFIX}")
}

/// The image that a layer was made on, and its format, by the layer's name.
#[must_use]
pub fn image_below(layer: &Path) -> Option<(PathBuf, &'static str)> {
    let name = layer.file_name()?.to_str()?.strip_suffix(SUFFIX)?;
    let (image, format) = name.rsplit_once(INFIX)?;
    let format = FORMATS.into_iter().find(|known| *known == format)?;
    Some((layer.with_file_name(image), format))
}

/// Whether the VM's command line leads to another image than the disk's, by the disk's node: ours live as long as QEMU.
#[must_use]
pub fn is_apart(top: &Node) -> bool {
    let is_layer = top.driver == "qcow2" && top.name.ends_with(APART);
    top.name.starts_with(OURS) && (is_layer || (keeps_name(top) && top.name.ends_with(IN_PLACE)))
}

/// Whether the disk's image keeps its name when it gets a layer.
fn keeps_name(top: &Node) -> bool {
    top.driver != "qcow2" || is_on_device(top)
}

fn is_on_device(top: &Node) -> bool {
    number_of(Path::new(&top.file)).is_ok()
}

/// Whether it will after the next cut. Once all layers were merged, the next one has again the name that a VM has on its
/// command line which followed before.
pub fn will_be_apart(top: &Node) -> bool {
    if keeps_name(top) { !(top.name.starts_with(OURS) && top.name.ends_with(IN_PLACE)) } else { is_apart(top) }
}

/// What an image was when nobody was to write to it any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Untouched {
    size: u64,
    modified: (i64, i64),
}

impl Untouched {
    /// What it is now.
    pub fn look(directory: &ImageDirectory, name: &str) -> Result<Self> {
        let found = metadata(directory, name)?;
        Ok(Self { size: found.len(), modified: (found.mtime(), found.mtime_nsec()) })
    }
}

pub fn metadata(directory: &ImageDirectory, name: &str) -> Result<std::fs::Metadata> {
    let file = std::fs::File::from(directory.open(name, OFlags::RDONLY)?);
    let io = |source| ImageError::Io { doing: "examine", path: directory.join(name), source };
    Ok(file.metadata().map_err(io)?)
}

fn length(directory: &ImageDirectory, name: &str) -> Result<u64> {
    let mut file = std::fs::File::from(directory.open(name, OFlags::RDONLY)?);
    let io = |source| ImageError::Io { doing: "measure", path: directory.join(name), source };
    Ok(file.seek(SeekFrom::End(0)).map_err(io)?)
}

/// Where the layer on a block device goes.
pub fn directory_for(task: &DiskTask, roots: &ImageRoots) -> Result<ImageDirectory> {
    let refused = |why: String| DriverError::Parameter { key: DIRECTORY.into(), why };
    let directory = Parameters::parse(&task.parameters)?.directory;
    let directory = directory.ok_or_else(|| refused("must say where layers on block devices go".into()))?;
    roots.directory(&directory).map_err(|error| refused(chain(&error)))
}

/// What a device's name leads to; other names are what they are.
pub fn real_name(name: &str) -> Result<String> {
    if !name.starts_with('/') {
        return Ok(name.to_owned());
    }
    let io = |source| ImageError::Io { doing: "examine", path: name.into(), source };
    Ok(std::fs::canonicalize(name).map_err(io)?.display().to_string())
}

/// Fails unless a layer's header can name the image.
pub fn check_nameable(task: &DiskTask, directory: &ImageDirectory, image: &str) -> Result<()> {
    let refused = |why: String| Err(DriverError::Verify(format!("disk {}: {why}", task.disk)));
    if image.contains(':') && !image.starts_with('/') {
        return refused(format!("QEMU would take what is before the colon of `{image}` for a protocol"));
    }
    // An image that begins somewhere in its file can't be named by a header.
    if task.format == "raw" && length(directory, image)?.next_multiple_of(SECTOR) != task.size {
        return refused(format!("it is a part of {} only", directory.join(image).display()));
    }
    Ok(())
}

/// Names the new layer of an image, where one can be made.
pub fn plan(task: &DiskTask, directory: &ImageDirectory, image: &str) -> Result<String> {
    check_nameable(task, directory, image)?;
    if let Some(target) = &task.target {
        return lent::check(task, directory, target, image).map(|()| target.clone());
    }
    let layer = match &task.path {
        Some(_) => layer_on(image, &task.format),
        // A device has no directory of its own, and its name isn't one for a file.
        None => layer_on(&format!("{}.{}-{}", task.vm.namespace, task.vm.name, task.disk), &task.format),
    };
    if directory.id(&layer)?.is_none() {
        return Ok(layer);
    }
    let why = format!("{} is there already", directory.join(&layer).display());
    Err(DriverError::Verify(format!("disk {}: {why}", task.disk)))
}

/// What has the name of the VM's new disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Top {
    /// Nothing.
    Nothing,
    /// What the layer left there when it was merged.
    Tombstone,
    /// An image.
    Image,
}

impl Top {
    /// Looks at it.
    pub fn look(directory: &ImageDirectory, state: &State) -> Result<Self> {
        match header(directory, &state.disk_file) {
            Ok(_) => Ok(Self::Image),
            Err(DriverError::Image(error)) if error.is_not_found() => Ok(Self::Nothing),
            Err(DriverError::Header { source: HeaderError::NotQcow2, .. })
                if metadata(directory, &state.disk_file)?.len() == 0 =>
            {
                Ok(Self::Tombstone)
            }
            Err(error) => Err(error),
        }
    }
}

/// Makes an empty file that takes the layer's name once it is merged: from then on no VM can be started with it, and a
/// crash leaves no doubt.
pub fn make_tombstone(directory: &ImageDirectory, state: &State) -> Result<String> {
    let name = tombstone(state);
    match directory.create(&name, Mode::RUSR | Mode::WUSR) {
        Ok(_) => directory.sync()?,
        Err(error) if directory.id(&name)?.is_none() => return Err(error.into()),
        Err(_) => {}
    }
    Ok(name)
}

fn tombstone(state: &State) -> String {
    state.beside_new_file("merged")
}

/// Removes what a merge leaves behind.
pub fn clear(directory: &ImageDirectory, state: &State) -> Result<()> {
    if Top::look(directory, state)? == Top::Tombstone {
        directory.unlink(&state.disk_file)?;
    }
    directory.unlink(&tombstone(state)).map_err(DriverError::from)
}

#[derive(Deserialize)]
struct Extent {
    /// Absent from what an old `qemu-img` says.
    #[serde(default = "yes")]
    present: bool,
}

fn yes() -> bool {
    true
}

/// Whether an image has no data of its own.
pub async fn is_empty(directory: &ImageDirectory, name: &str) -> Result<bool> {
    let path = directory.join(name);
    let protocol = if number_of(&path).is_ok() { "host_device" } else { "file" };
    let file = json!({"driver": protocol, "filename": path, "locking": "off"});
    let image = format!("json:{}", json!({"driver": "qcow2", "file": file, "backing": null}));
    let listed = look(&["map", "-U", "--output=json"], Path::new(&image), &[], LOOK_TIMEOUT).await?;
    let failed = |why: String| DriverError::NotNow(format!("{} can't be read: {why}", directory.join(name).display()));
    if listed.code != Some(0) {
        return Err(failed(listed.said));
    }
    let extents: Vec<Extent> = serde_json::from_str(&listed.printed).map_err(|error| failed(error.to_string()))?;
    Ok(extents.iter().all(|extent| !extent.present))
}

/// Fails if the snapshot's image was written to while nobody was to: the VM was started with it, and the layer above
/// has data that doesn't go with it any more.
pub async fn refuse_if_touched(directory: &ImageDirectory, state: &State) -> Result<()> {
    let touched = match state.untouched {
        // The kernel doesn't tell when a device was written to.
        _ if state.is_device() => false,
        Some(before) => Untouched::look(directory, &state.layer)? != before,
        None => {
            let (below, above) = (metadata(directory, &state.layer)?, metadata(directory, &state.disk_file)?);
            let later = (below.mtime(), below.mtime_nsec()) > (above.mtime(), above.mtime_nsec());
            later && !is_empty(directory, &state.disk_file).await?
        }
    };
    if touched { Err(left_behind(directory, state)) } else { Ok(()) }
}

/// What to say when the VM doesn't run on the layer.
pub fn left_behind(directory: &ImageDirectory, state: &State) -> DriverError {
    DriverError::NotNow(format!(
        "the VM was started with {}, not with {}, which has what was written since the snapshot: nothing is touched \
         until {}, or the VM is started with it",
        directory.join(&state.layer).display(),
        directory.join(&state.disk_file).display(),
        if state.is_on_device() { "its beginning is cleared" } else { "that file is deleted" }
    ))
}

/// What to say of a snapshot's image that somebody wrote to.
pub fn overwritten(image: &Path) -> String {
    format!(
        "{} was written to after the snapshot: the VM was started with it, not with the layer on it",
        image.display()
    )
}
