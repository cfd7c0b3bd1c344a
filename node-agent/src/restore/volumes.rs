//! A new VM's disk from a snapshot of a thin volume: a thin volume of its own that shares the snapshot's blocks.
//!
//! It is whole as soon as it exists, and depends on nothing: LVM counts the users of each block. So it is made under its
//! final name, and our tag says whose it is.

use std::path::Path;

use freezeframe_api::conditions::reasons;

use super::order::RestoreOrder;
use super::record::{DiskRestore, Method};
use super::source::failed;
use crate::drivers::lvm::commands::{self, Row};
use crate::drivers::lvm::volume::Volume;
use crate::drivers::{Artifact, DiskTask, DriverError};
use crate::hypervisor::device::number_of;
use crate::hypervisor::image::FileId;
use crate::session::outcome::Failure;

/// A pool that is fuller than this, in percent, gets no new volume.
const FULLEST: f64 = 99.0;
/// Space that the pool needs for a volume that shares all its blocks: one extent of metadata at the most, in bytes.
const METADATA: u64 = 4 << 20;

/// What would be made of a disk whose snapshot is a volume.
pub async fn plan(order: &RestoreOrder, task: &DiskTask, artifact: &Artifact) -> Result<DiskRestore, Failure> {
    let refused = |why: &str| Failure::refused(reasons::DISK_NOT_SUPPORTED, format!("disk {} {why}", task.disk));
    let Some(new) = &order.new_vm else {
        // A file says when it was last written; a volume doesn't, so a start of the VM in between would go unnoticed.
        return Err(refused("is a logical volume: bring it back as a new VM's, and start the VM from that"));
    };
    let source = volume_at(&artifact.handle)?;
    let rows = commands::volumes(source.group()).await.map_err(|error| failed(&error))?;
    let row = |name: &str| rows.iter().find(|row| row.lv_name == name);
    let snapshot = row(source.name()).ok_or_else(|| refused("has lost its snapshot"))?;
    let pool = row(&snapshot.pool_lv).ok_or_else(|| refused("is a thick volume, which only LVM itself brings back"))?;
    check_pool(pool, source.group())?;
    let name = format!("{}-{}", new.name, task.disk);
    let made = Volume::new(source.group(), &name).map_err(|error| failed(&error))?;
    if row(made.name()).is_some() {
        return Err(Failure::refused(reasons::VM_EXISTS, format!("there is a volume {made} already")));
    }
    Ok(DiskRestore {
        disk: task.disk.clone(),
        driver: task.driver.clone(),
        source: artifact.handle.clone(),
        source_format: artifact.format.clone(),
        method: Method::Volume,
        path: made.path(),
        format: artifact.format.clone(),
        like: artifact.handle.clone(),
        size: task.size,
        needed: METADATA,
        made: None,
        replaced: None,
    })
}

fn check_pool(pool: &Row, group: &str) -> Result<(), Failure> {
    let (data, metadata) = (pool.data_used(), pool.metadata_used());
    if data.max(metadata) <= FULLEST {
        return Ok(());
    }
    let message = format!("{data} % of pool {group}/{} are in use, and {metadata} % of its metadata", pool.lv_name);
    Err(Failure::new(reasons::NO_SPACE, message))
}

/// Makes a disk's volume, unless it was made before.
pub async fn make(disk: &DiskRestore, id: &str) -> Result<FileId, Failure> {
    let (source, made) = (volume_at(&disk.source)?, volume_at(&disk.path)?);
    match commands::find(&made).await.map_err(|error| failed(&error))? {
        Some(row) if row.is_ours(id) => {}
        Some(_) => return Err(Failure::new(reasons::VM_EXISTS, format!("there is a volume {made} already"))),
        None => commands::clone(&source, &made, id).await.map_err(|error| failed(&error))?,
    }
    let row = commands::find(&made).await.map_err(|error| failed(&error))?;
    let row = row.ok_or_else(|| Failure::new(reasons::RESTORE_FAILED, format!("volume {made} is gone")))?;
    commands::activate(&made, &row).await.map_err(|error| failed(&error))?;
    let device = number_of(&disk.path).map_err(|why| Failure::new(reasons::VERIFY_FAILED, why))?;
    // Within another format the volume's own size says nothing about the disk's.
    if disk.format == "raw" && row.lv_size != disk.size {
        let message = format!("disk {}: volume {made} has {} bytes, not {}", disk.disk, row.lv_size, disk.size);
        return Err(Failure::new(reasons::VERIFY_FAILED, message));
    }
    Ok(FileId::new(device, 0))
}

/// Removes a disk's volume, if it was made.
pub async fn take_back(disk: &DiskRestore, id: &str) -> Result<(), DriverError> {
    let made = Volume::of_path(&disk.path)?;
    match commands::find(&made).await? {
        Some(row) if row.is_ours(id) => commands::remove(&made).await,
        _ => Ok(()),
    }
}

fn volume_at(device: &Path) -> Result<Volume, Failure> {
    Volume::of_path(device).map_err(|error| failed(&error))
}
