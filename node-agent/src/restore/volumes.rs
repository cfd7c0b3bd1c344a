//! A disk whose snapshot is a logical volume, brought back as one: of a thin snapshot a thin volume that shares its blocks,
//! of a thick one a full copy.
//!
//! Neither depends on the snapshot: LVM counts the users of each block. Until all images are complete a new volume has a
//! name of its own, like a file's, and our tag says whose it is.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use freezeframe_api::conditions::reasons;

use super::order::RestoreOrder;
use super::record::{DiskRestore, ImageId, Method};
use super::source::failed;
use super::tool;
use crate::causes::chain;
use crate::drivers::lvm::commands;
use crate::drivers::lvm::report::Row;
use crate::drivers::lvm::volume::Volume;
use crate::drivers::lvm::{self, Origin};
use crate::drivers::{Artifact, DiskTask};
use crate::hypervisor::backing::backing_of;
use crate::hypervisor::device::{number_of, sync};
use crate::session::outcome::Failure;

/// A pool that is fuller than this, in percent, gets no new volume.
const FULLEST: f64 = 99.0;
/// Space that the pool needs for a volume that shares all its blocks: one extent of metadata at the most, in bytes.
const METADATA: u64 = 4 << 20;

/// What would be made of a disk whose snapshot is a volume.
pub async fn plan(order: &RestoreOrder, task: &DiskTask, artifact: &Artifact) -> Result<DiskRestore, Failure> {
    if order.directory.is_some() {
        let message = format!("disk {} comes back as a logical volume, and in no directory", task.disk);
        return Err(Failure::refused(reasons::DISK_NOT_SUPPORTED, message));
    }
    refuse_layer(task, artifact)?;
    let source = volume_at(&artifact.handle)?;
    let rows = commands::volumes(source.group()).await.map_err(|error| failed(&error))?;
    let row = |name: &str| rows.iter().find(|row| row.lv_name == name);
    let lost = || Failure::refused(reasons::SNAPSHOT_NOT_READY, format!("disk {} has lost its snapshot", task.disk));
    let snapshot = row(source.name()).filter(|snapshot| !snapshot.is_overflowed()).ok_or_else(lost)?;
    let (method, needed) = match row(&snapshot.pool_lv) {
        Some(pool) => {
            check_pool(pool, source.group())?;
            (Method::Volume, METADATA)
        }
        None => (Method::VolumeCopy, snapshot.size()),
    };
    let path = match &order.new_vm {
        Some(new) => {
            let made = volume(source.group(), &format!("{}-{}", new.name, task.disk))?;
            if row(made.name()).is_some() {
                return Err(Failure::refused(reasons::VM_EXISTS, format!("there is a volume {made} already")));
            }
            made.path()
        }
        None => replaced(task, &rows)?.path(),
    };
    let planned = DiskRestore {
        disk: task.disk.clone(),
        driver: task.driver.clone(),
        source: artifact.handle.clone(),
        source_format: artifact.format.clone(),
        method,
        path,
        format: artifact.format.clone(),
        like: artifact.handle.clone(),
        size: task.size,
        needed,
        made: None,
        replaced: None,
    };
    // Both must be names that LVM takes, before anything is begun.
    volume_at(&planned.unfinished(&order.id()))?;
    volume_at(&planned.away(&order.id()))?;
    Ok(planned)
}

/// A copy of a volume would go on reading from the image that a layer on it lies on, and nobody would know.
fn refuse_layer(task: &DiskTask, artifact: &Artifact) -> Result<(), Failure> {
    let path = artifact.handle.display();
    let unreadable =
        |why: String| Failure::new(reasons::RESTORE_FAILED, format!("disk {}: {path} can't be read: {why}", task.disk));
    let mut device = File::open(&artifact.handle).map_err(|error| unreadable(error.to_string()))?;
    let backing = if artifact.format == "raw" {
        None
    } else {
        backing_of(&mut device).map_err(|error| unreadable(chain(&error)))?
    };
    let Some(backing) = backing else { return Ok(()) };
    let message = format!(
        "disk {}: what is on {path} lies on {backing}, so it can't be copied alone: delete the snapshot that {backing} is of",
        task.disk
    );
    Err(Failure::refused(reasons::DISK_NOT_SUPPORTED, message))
}

/// The volume that a restore in place replaces.
fn replaced(task: &DiskTask, rows: &[Row]) -> Result<Volume, Failure> {
    let refused = |why: String| Failure::refused(reasons::DISK_NOT_SUPPORTED, format!("disk {} {why}", task.disk));
    let Some(Origin { volume, device }) = lvm::origin(task) else {
        return Err(refused("has a copy on a volume, which can be brought back as a new VM's alone".into()));
    };
    if !volume.is_named_by(&device) {
        let path = volume.path();
        let why = format!("is {} on the VM's command line, which wouldn't lead to a new volume", device.display());
        return Err(refused(format!("{why}; say {} there", path.display())));
    }
    if !rows.iter().any(|row| row.lv_name == volume.name()) {
        return Err(Failure::refused(
            reasons::DISK_NOT_FOUND,
            format!("disk {} has no volume {volume} now", task.disk),
        ));
    }
    match other_kind(&volume, rows) {
        None => Ok(volume),
        Some(kind) => {
            Err(refused(format!("is a volume of kind {kind}, and would become a linear one: restore it as a new VM's")))
        }
    }
}

/// What a volume is, if it would lose mirrors, stripes or a cache by becoming what we make: a linear one, or a thin one.
/// LVM has a row for each of its segments.
fn other_kind<'a>(volume: &Volume, rows: &'a [Row]) -> Option<&'a str> {
    let kinds = rows.iter().filter(|row| row.lv_name == volume.name()).map(|row| row.segtype.as_str());
    kinds.into_iter().find(|kind| !["linear", "thin"].contains(kind))
}

fn check_pool(pool: &Row, group: &str) -> Result<(), Failure> {
    let (data, metadata) = (pool.data_used(), pool.metadata_used());
    if data.max(metadata) <= FULLEST {
        return Ok(());
    }
    let message = format!("{data} % of pool {group}/{} are in use, and {metadata} % of its metadata", pool.lv_name);
    Err(Failure::new(reasons::NO_SPACE, message))
}

/// Whether each volume group has the space for all copies that are made there.
pub async fn check_space(disks: &[DiskRestore], id: &str) -> Result<(), Failure> {
    let mut needed: BTreeMap<String, Vec<(Volume, u64)>> = BTreeMap::new();
    for disk in disks.iter().filter(|disk| disk.made.is_none() && disk.method == Method::VolumeCopy) {
        let made = volume_at(&disk.unfinished(id))?;
        needed.entry(made.group().to_owned()).or_default().push((made, disk.needed));
    }
    for (group, copies) in needed {
        let rows = commands::volumes(&group).await.map_err(|error| failed(&error))?;
        // One that was begun has its space.
        let begun = |made: &Volume| rows.iter().any(|row| row.lv_name == made.name());
        let needed: u64 = copies.iter().filter(|(made, _)| !begun(made)).map(|(_, bytes)| bytes).sum();
        let free = rows.first().map_or(0, |row| row.vg_free);
        if needed > free {
            let message = format!("{needed} bytes are needed in volume group {group}, and {free} are free");
            return Err(Failure::new(reasons::NO_SPACE, message));
        }
    }
    Ok(())
}

/// Makes a disk's volume, unless it was made before; `told` learns of a copy's progress in percent.
pub async fn make(disk: &DiskRestore, id: &str, told: &(dyn Fn(i32) + Send + Sync)) -> Result<ImageId, Failure> {
    let (source, made) = (volume_at(&disk.source)?, volume_at(&disk.unfinished(id))?);
    match commands::find(&made).await.map_err(|error| failed(&error))? {
        Some(row) if !row.is_ours(id) => {
            return Err(Failure::new(reasons::VM_EXISTS, format!("there is a volume {made} already")));
        }
        Some(row) if disk.made == Some(ImageId::Volume(row.lv_uuid.clone())) => {
            return Ok(ImageId::Volume(row.lv_uuid));
        }
        Some(_) => {}
        None if disk.method == Method::Volume => {
            commands::clone(&source, &made, id).await.map_err(|error| failed(&error))?;
        }
        None => commands::create(&made, disk.needed, id).await.map_err(|error| failed(&error))?,
    }
    let row = commands::find(&made).await.map_err(|error| failed(&error))?;
    let row = row.ok_or_else(|| Failure::new(reasons::RESTORE_FAILED, format!("volume {made} is gone")))?;
    commands::activate(&made, &row).await.map_err(|error| failed(&error))?;
    number_of(&made.path()).map_err(|why| Failure::new(reasons::VERIFY_FAILED, why))?;
    // Within another format the volume's own size says nothing about the disk's.
    if disk.format == "raw" && row.lv_size != disk.size {
        let message = format!("disk {}: volume {made} has {} bytes, not {}", disk.disk, row.lv_size, disk.size);
        return Err(Failure::new(reasons::VERIFY_FAILED, message));
    }
    if disk.method == Method::VolumeCopy {
        copy(&source, &made, told).await?;
    }
    Ok(ImageId::Volume(row.lv_uuid))
}

/// Byte by byte, whatever format is within.
async fn copy(source: &Volume, made: &Volume, told: &(dyn Fn(i32) + Send + Sync)) -> Result<(), Failure> {
    let path = made.path();
    let target = tool::Target { image: &path, format: "raw", exists: true };
    tool::convert((&source.path(), "raw"), target, told).await.map_err(|error| failed(&error))?;
    let synced = tokio::task::spawn_blocking(move || sync(&path)).await.map_err(|error| failed(&error))?;
    synced.map_err(|error| failed(&error))
}

/// The volume whose device is at a path of ours.
pub fn volume_at(device: &Path) -> Result<Volume, Failure> {
    Volume::of_path(device).map_err(|error| failed(&error))
}

fn volume(group: &str, name: &str) -> Result<Volume, Failure> {
    Volume::new(group, name).map_err(|error| failed(&error))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn row(name: &str, segtype: &str) -> Row {
        let row = json!({
            "lv_name": name, "lv_uuid": "uuid", "lv_attr": "owi-aos---", "lv_size": "4194304", "lv_metadata_size": "",
            "origin": "", "origin_size": "", "pool_lv": "", "segtype": segtype, "data_percent": "",
            "metadata_percent": "", "lv_tags": "", "lv_health_status": "", "vg_free": "0", "vg_extent_size": "4194304", "chunk_size": "0",
        });
        serde_json::from_value(row).unwrap()
    }

    #[test]
    fn a_volume_with_any_segment_that_would_be_made_linear_is_told() {
        let rows = ["linear", "thin", "raid1", "striped", "cache"].map(|kind| row(kind, kind));
        let rows = [rows.to_vec(), vec![row("mixed", "linear"), row("mixed", "striped")]].concat();
        for (name, found) in [
            ("linear", None),
            ("thin", None),
            ("raid1", Some("raid1")),
            ("striped", Some("striped")),
            ("cache", Some("cache")),
            ("mixed", Some("striped")),
        ] {
            assert_eq!(other_kind(&volume("vg0", name).unwrap(), &rows), found, "{name}");
        }
    }
}
