//! A block device, or a logical volume, that the user made for the layer that the VM is to follow to.
//!
//! A user names no host path: a volume goes by its tag, and of another device the administrator makes a node in the
//! namespace's directory of targets. That node is only looked at; the device is opened by its one name beneath `/dev`,
//! so that everybody's locks meet. It must be so large that the layer never fills it.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::Deserialize;
use serde_json::json;

use super::lent;
use super::parameters::Parameters;
use super::state::State;
use crate::drivers::lvm::commands;
use crate::drivers::lvm::target::{self, TARGET_GROUPS};
use crate::drivers::lvm::volume::Volume;
use crate::drivers::naming::is_plain;
use crate::drivers::tool::{Ended, look};
use crate::drivers::{DiskTask, DriverError, Result};
use crate::hypervisor::device::{number_of, sync};
use crate::hypervisor::device_name::name_of;
use crate::hypervisor::image::{ImageError, ImageRoots};
use crate::hypervisor::lock::ImageLock;

/// Bound of a look at an image that is empty.
const LOOK_TIMEOUT: Duration = Duration::from_secs(60);
/// What a layer may need for a moment while its own tables move, beyond a part of the whole.
const SPARE: u64 = 1 << 20;
const SPARE_SHARE: u64 = 4096;
/// So much of a device's beginning is cleared where its image must not be found any more: a user's next layer, or a copy
/// to a volume, wants it so.
const CLEARED: usize = 1 << 20;

/// A device that a disk's target names.
pub struct Named {
    /// Its name beneath `/dev`.
    pub path: PathBuf,
    /// The volume that it is, where it was named as one.
    pub volume: Option<Volume>,
}

/// The device that a disk's target names; none if it names a file, or nothing.
pub fn named(task: &DiskTask, roots: &ImageRoots) -> Result<Option<Named>> {
    let Some(name) = &task.target else { return Ok(None) };
    let parameters = Parameters::parse(&task.parameters)?;
    if let Some(volume) = target::named(name, &parameters.target_groups) {
        let volume = volume?;
        let path = volume.path();
        return if roots.names(&path) {
            Ok(Some(Named { path, volume: Some(volume) }))
        } else {
            let why = format!("{} is not beneath an image root of this node's agent", path.display());
            Err(DriverError::Parameter { key: TARGET_GROUPS.into(), why })
        };
    }
    if !is_plain(name) {
        return Ok(None);
    }
    let directory = lent::directory_for(task, roots)?;
    let Some(number) = directory.device_number(name)? else { return Ok(None) };
    let why = || format!("device {}:{}", rustix::fs::major(number), rustix::fs::minor(number));
    let refused = || DriverError::Target {
        path: directory.join(name),
        why: format!("is a node of {}, which has no name beneath an image root of this node's agent", why()),
    };
    let path = name_of(number, roots).ok_or_else(refused)?;
    Ok(Some(Named { path, volume: None }))
}

/// Fails, with what the user is to mend, unless the layer can be on the device.
pub async fn check(task: &DiskTask, state: &State) -> Result<()> {
    let path = state.device_path();
    let refused = |why: String| DriverError::Target { path: path.to_owned(), why };
    if let Some(volume) = &state.volume {
        let row = commands::find(volume).await?.ok_or_else(|| refused("isn't there".into()))?;
        // An interrupted `prepare` may have claimed it.
        let why = if row.is_ours(&task.id) { None } else { target::why_not(&row, &task.vm.namespace) };
        why.map_or(Ok(()), |why| Err(refused(why)))?;
        if !row.pool_lv.is_empty() {
            return Err(refused("is thin: its pool may fill while the former disk is copied up into it".into()));
        }
    }
    number_of(path).map_err(refused)?;
    if is_in_use(path)? || ImageLock::take_device(path)?.is_none() {
        return Err(refused("is in use".into()));
    }
    let mut device = File::open(path).map_err(|error| refused(error.to_string()))?;
    lent::check_image(task, &mut device, &state.layer).map_err(refused)?;
    let size = device.seek(SeekFrom::End(0)).map_err(|error| refused(error.to_string()))?;
    let needed = needed(path, task.size).await?.map_err(refused)?;
    if size < needed {
        let why = format!("has {size} bytes, and {needed} are needed for a layer that is fully written");
        return Err(refused(why));
    }
    Ok(())
}

/// Whether the kernel has lent it out: to a file system, to device-mapper, or to who asked for it alone.
fn is_in_use(path: &Path) -> Result<bool> {
    let alone = OFlags::RDWR | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NONBLOCK;
    match rustix::fs::open(path, alone, Mode::empty()) {
        Ok(_) => Ok(false),
        Err(Errno::BUSY) => Ok(true),
        Err(errno) => Err(ImageError::Io { doing: "open", path: path.to_owned(), source: errno.into() }.into()),
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    cluster_size: u64,
    #[serde(default)]
    snapshots: Vec<serde_json::Value>,
    format_specific: Specific,
}

#[derive(Deserialize)]
struct Specific {
    data: Details,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Details {
    compat: String,
    refcount_bits: u32,
    #[serde(default)]
    extended_l2: bool,
    #[serde(default)]
    bitmaps: Vec<serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Measured {
    fully_allocated: u64,
}

/// How large the device must be, in bytes, for an image that is formatted as the one on it; or what else is on it than an
/// empty image.
async fn needed(path: &Path, size: u64) -> Result<std::result::Result<u64, String>> {
    let image = format!("json:{}", alone(path));
    let checked = look(&["check", "-q", "-U"], Path::new(&image), &[], LOOK_TIMEOUT).await?;
    if checked.code != Some(0) {
        return Ok(Err(format!("has an image that `qemu-img check` finds fault with: {}", checked.said)));
    }
    let info = look(&["info", "-U", "--output=json"], Path::new(&image), &[], LOOK_TIMEOUT).await?;
    let info: Info = read(path, &info)?;
    let Details { compat, refcount_bits, extended_l2, bitmaps } = info.format_specific.data;
    if !info.snapshots.is_empty() || !bitmaps.is_empty() {
        return Ok(Err("is not empty: its image has snapshots or bitmaps of its own".into()));
    }
    let extended = if extended_l2 { ",extended_l2=on" } else { "" };
    let cluster = info.cluster_size;
    let options = format!("compat={compat},cluster_size={cluster},refcount_bits={refcount_bits}{extended}");
    let arguments = ["measure", "--output=json", "-O", "qcow2", "-o", &options, "--size"];
    let measured = look(&arguments, Path::new(&size.to_string()), &[], LOOK_TIMEOUT).await?;
    let Measured { fully_allocated } = read(path, &measured)?;
    Ok(Ok(fully_allocated.saturating_add(fully_allocated / SPARE_SHARE).saturating_add(SPARE)))
}

fn read<T: serde::de::DeserializeOwned>(path: &Path, ended: &Ended) -> Result<T> {
    let failed = |why: String| DriverError::NotNow(format!("{} can't be measured: {why}", path.display()));
    if ended.code != Some(0) {
        return Err(failed(ended.said.clone()));
    }
    serde_json::from_str(&ended.printed).map_err(|error| failed(error.to_string()))
}

/// The image on a device without what is below it.
fn alone(path: &Path) -> serde_json::Value {
    let file = json!({"driver": "host_device", "filename": path, "locking": "off"});
    json!({"driver": "qcow2", "file": file, "backing": null})
}

/// Marks a volume as this snapshot's.
pub async fn claim(task: &DiskTask, state: &State) -> Result<()> {
    match &state.volume {
        Some(volume) => commands::claim(volume, &task.id).await,
        None => Ok(()),
    }
}

/// Takes that mark away, if it is there.
pub async fn disclaim(task: &DiskTask, state: &State) -> Result<()> {
    let Some(volume) = &state.volume else { return Ok(()) };
    match commands::find(volume).await? {
        Some(row) if row.is_ours(&task.id) => commands::disclaim(volume, &task.id).await,
        _ => Ok(()),
    }
}

/// Whether a device's beginning is clear; none if it has no length, as a loop device without its file.
pub fn begins_with_zeros(path: &Path) -> std::result::Result<Option<bool>, ImageError> {
    let io = |source| ImageError::Io { doing: "read the beginning of", path: path.to_owned(), source };
    let mut start = vec![];
    File::open(path).map_err(io)?.take(CLEARED as u64).read_to_end(&mut start).map_err(io)?;
    Ok((!start.is_empty()).then(|| start.iter().all(|byte| *byte == 0)))
}

/// Clears a device's beginning, so that no VM can be started with it.
pub fn clear(state: &State) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let path = state.device_path();
    if ImageLock::take_device(path)?.is_none() {
        return Err(DriverError::NotNow(format!("{} is in use", path.display())));
    }
    let io = |source| ImageError::Io { doing: "clear the beginning of", path: path.to_owned(), source };
    let device = File::options().write(true).open(path).map_err(io)?;
    device.write_all_at(&vec![0; CLEARED], 0).map_err(io)?;
    Ok(sync(path)?)
}
