//! A logical volume that the user made for a copy: checked, marked as taken while it holds the copy, and left.
//!
//! A new volume has no map that says that it is empty, and what a volume is overwritten with can't be had back. So its
//! user says by a tag that it is for copies of this namespace, and its first MiB must be zeros: there file systems,
//! partition tables and physical volumes have what they are known by.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use serde_json::json;

use super::State;
use super::parameters::Parameters;
use crate::drivers::lvm::commands;
use crate::drivers::lvm::report::Row;
use crate::drivers::lvm::target;
use crate::drivers::lvm::volume::Volume;
use crate::drivers::{Artifact, DiskTask, DriverError, Removal, Result, qemu};
use crate::hypervisor::device::{number_of, sync};
use crate::hypervisor::graph::hand_over_device;
use crate::hypervisor::image::FileId;
use crate::hypervisor::{QMP_TIMEOUT, Vm};

/// How much of its beginning must be zeros, in bytes.
const CHECKED: usize = 1 << 20;

/// Marks the volume as taken by this snapshot, unless it is; what is wrong with it is told as the user's to mend.
pub async fn lend(task: &DiskTask, volume: &Volume) -> Result<()> {
    let refused = |why: String| DriverError::Target { path: volume.path(), why };
    let row = commands::find(volume).await?.ok_or_else(|| refused("isn't there".into()))?;
    if row.is_ours(&task.id) {
        return Ok(());
    }
    if Parameters::parse(&task.parameters)?.compressed {
        return Err(refused("is raw, and the class wants its copies compressed".into()));
    }
    why_not(&row, task).map_or(Ok(()), |why| Err(refused(why)))?;
    let path = volume.path();
    number_of(&path).map_err(refused)?;
    let begins = tokio::task::spawn_blocking(move || begins_with_zeros(&path)).await;
    match begins {
        Ok(Ok(true)) => {}
        Ok(Ok(false)) => {
            return Err(refused(format!("is not empty: its first {CHECKED} bytes are not zeros")));
        }
        Ok(Err(error)) => return Err(refused(error.to_string())),
        Err(error) => return Err(DriverError::NotNow(error.to_string())),
    }
    commands::claim(volume, &task.id).await
}

/// Why a volume can't be a disk's target, by what LVM says of it.
fn why_not(row: &Row, task: &DiskTask) -> Option<String> {
    // QEMU copies only between images of one size.
    let other_size = || format!("has {} bytes, and disk {} {}", row.lv_size, task.disk, task.size);
    target::why_not(row, &task.vm.namespace).or_else(|| (row.lv_size != task.size).then(other_size))
}

fn begins_with_zeros(path: &Path) -> std::io::Result<bool> {
    let mut start = vec![];
    File::open(path)?.take(CHECKED as u64).read_to_end(&mut start)?;
    Ok(start.iter().all(|byte| *byte == 0))
}

/// Opens the volume in QEMU, unless it is open.
pub async fn open(vm: &Vm, state: &State, volume: &Volume) -> Result<()> {
    let graph = vm.graph().await.map_err(qemu("read the block graph"))?;
    if graph.node(&state.node()).is_some() {
        return Ok(());
    }
    let path = volume.path();
    let io = |error: std::io::Error| DriverError::Target { path: path.clone(), why: error.to_string() };
    let device = rustix::fs::open(&path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|e| io(e.into()))?;
    let id = id_of(&device).map_err(io)?;
    let name = hand_over_device(vm.qmp(), &device, id, &path).await?;
    let file = json!({"driver": "host_device", "node-name": state.file_node(), "filename": name});
    vm.qmp().blockdev_add(&file, QMP_TIMEOUT).await.map_err(qemu("open the copy's volume"))?;
    let node = json!({"driver": "raw", "node-name": state.node(), "file": state.file_node()});
    vm.qmp().blockdev_add(&node, QMP_TIMEOUT).await.map_err(qemu("open the copy"))
}

fn id_of(device: &OwnedFd) -> std::io::Result<FileId> {
    let found = rustix::fs::fstat(device)?;
    Ok(FileId::new(found.st_dev, found.st_ino))
}

/// What QEMU's descriptors of the volume are known by; none if it isn't there.
pub fn id(volume: &Volume) -> Option<FileId> {
    let found = std::fs::metadata(volume.path()).ok()?;
    Some(FileId::new(found.dev(), found.ino()))
}

/// Puts the copy on disk, and sees that it is this snapshot's and as large as the disk.
pub async fn finish(task: &DiskTask, volume: &Volume) -> Result<Artifact> {
    let path: PathBuf = volume.path();
    let synced = path.clone();
    match tokio::task::spawn_blocking(move || sync(&synced)).await {
        Ok(synced) => synced?,
        Err(error) => return Err(DriverError::NotNow(error.to_string())),
    }
    match commands::find(volume).await?.filter(|row| row.is_ours(&task.id)) {
        Some(row) if row.lv_size == task.size => Ok(Artifact { handle: path, format: "raw".into() }),
        Some(row) => {
            let size = row.lv_size;
            Err(DriverError::Verify(format!("disk {}: the copy has {size} bytes, not {}", task.disk, task.size)))
        }
        None => Err(DriverError::Verify(format!("disk {}: volume {volume} isn't the snapshot's any more", task.disk))),
    }
}

/// Leaves the volume to its user, with whatever is in it.
pub async fn give_back(task: &DiskTask, volume: &Volume) -> Result<Removal> {
    match commands::find(volume).await? {
        Some(row) if row.is_ours(&task.id) => {
            commands::disclaim(volume, &task.id).await?;
            Ok(Removal::Kept(format!("{} was made by its user and is left", volume.path().display())))
        }
        _ => Ok(Removal::Done),
    }
}
