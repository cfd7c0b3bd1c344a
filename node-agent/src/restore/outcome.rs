//! From a restore's record to what is reported: pure.

use freezeframe_api::conditions::{condition, reasons, set, types};
use freezeframe_api::names::{DiskName, DriverName, SnapshotHandle};
use freezeframe_api::v1alpha1::{
    RestoreContentPhase, RestoreMode, RestoredDisk, RestoredDiskState, VMRestoreContentStatus,
};
use k8s_openapi::jiff::Timestamp;

use super::order::RestoreOrder;
use super::record::{DiskRestore, Method, RestoreRecord};
use crate::session::outcome::Failure;

/// The plan, where nothing is done but, for a restore in place, the VM stopped.
#[must_use]
pub fn planned(order: &RestoreOrder, disks: &[DiskRestore], phase: RestoreContentPhase) -> VMRestoreContentStatus {
    let disks = disks.iter().map(|disk| row(order, disk, RestoredDiskState::Planned)).collect();
    let mut status = VMRestoreContentStatus { phase: Some(phase), disks, ..Default::default() };
    let (reason, message) = match phase {
        RestoreContentPhase::Stopped => (reasons::IN_PROGRESS, "the VM doesn't run; its state is to be kept next"),
        _ => (reasons::PLANNED, "nothing was done"),
    };
    accepted(&mut status, order);
    conditions(&mut status, order, types::READY, false, reason, message);
    status
}

/// Before anything can be said.
#[must_use]
pub fn waiting(order: &RestoreOrder, why: &str) -> VMRestoreContentStatus {
    let mut status = VMRestoreContentStatus::default();
    accepted(&mut status, order);
    conditions(&mut status, order, types::READY, false, reasons::IN_PROGRESS, why);
    status
}

/// While images are being made; `copying` is the disk that is, and how far it is.
#[must_use]
pub fn restoring(record: &RestoreRecord, copying: Option<(usize, i32)>) -> VMRestoreContentStatus {
    let state = |at: usize, disk: &DiskRestore| match (&disk.made, copying) {
        (Some(_), _) => RestoredDiskState::Ready,
        (None, Some((copied, _))) if copied == at => RestoredDiskState::Copying,
        _ => RestoredDiskState::Planned,
    };
    let rows = record.disks.iter().enumerate().map(|(at, disk)| {
        let mut row = row(&record.order, disk, state(at, disk));
        row.progress_percent = copying.filter(|(copied, _)| *copied == at).map(|(_, percent)| percent);
        row
    });
    let mut status = VMRestoreContentStatus {
        phase: Some(RestoreContentPhase::Restoring),
        disks: rows.collect(),
        ..Default::default()
    };
    accepted(&mut status, &record.order);
    conditions(&mut status, &record.order, types::READY, false, reasons::IN_PROGRESS, "disks are being brought back");
    status
}

/// While the last steps can't be done, which are tried again.
#[must_use]
pub fn stuck(record: &RestoreRecord, why: &str) -> VMRestoreContentStatus {
    let mut status = restoring(record, None);
    conditions(&mut status, &record.order, types::READY, false, reasons::IN_PROGRESS, why);
    status
}

/// When every disk is back.
#[must_use]
pub fn succeeded(record: &RestoreRecord) -> VMRestoreContentStatus {
    let disks = record.disks.iter().map(|disk| row(&record.order, disk, RestoredDiskState::Ready)).collect();
    let mut status = VMRestoreContentStatus {
        phase: Some(RestoreContentPhase::Succeeded),
        disks,
        boot: record.boot.clone(),
        ..Default::default()
    };
    accepted(&mut status, &record.order);
    let message = format!("{} disks are back", record.disks.len());
    conditions(&mut status, &record.order, types::READY, true, reasons::COMPLETED, &message);
    status
}

/// When it failed.
#[must_use]
pub fn failed(order: &RestoreOrder, disks: &[DiskRestore], failure: &Failure) -> VMRestoreContentStatus {
    let disks = disks.iter().map(|disk| row(order, disk, RestoredDiskState::Failed)).collect();
    let mut status = VMRestoreContentStatus { phase: Some(RestoreContentPhase::Failed), disks, ..Default::default() };
    if failure.refused {
        conditions(&mut status, order, types::ACCEPTED, false, failure.reason, &failure.message);
    } else {
        accepted(&mut status, order);
    }
    conditions(&mut status, order, types::READY, false, failure.reason, &failure.message);
    status
}

/// From the deletion on; `why` it can't be finished yet.
#[must_use]
pub fn removed(
    order: &RestoreOrder,
    before: Option<&VMRestoreContentStatus>,
    why: Option<&str>,
) -> VMRestoreContentStatus {
    let mut status = before.cloned().unwrap_or_default();
    let reason = if why.is_none() { reasons::DELETED } else { reasons::DELETE_FAILED };
    conditions(&mut status, order, types::REMOVED, why.is_none(), reason, why.unwrap_or_default());
    status
}

fn accepted(status: &mut VMRestoreContentStatus, order: &RestoreOrder) {
    conditions(status, order, types::ACCEPTED, true, reasons::ACCEPTED, "");
}

fn conditions(
    status: &mut VMRestoreContentStatus,
    order: &RestoreOrder,
    type_: &str,
    value: bool,
    reason: &str,
    message: &str,
) {
    status.observed_generation = order.generation;
    let new = condition(type_, value, reason, message, order.generation, Timestamp::now());
    set(&mut status.conditions, new);
}

fn row(order: &RestoreOrder, disk: &DiskRestore, state: RestoredDiskState) -> RestoredDisk {
    let method = match disk.method {
        Method::Clone => "clone of the snapshot's image: shares its blocks, depends on nothing",
        Method::Link => "qcow2 layer on top of the snapshot's image",
        Method::Copy => "full copy",
        Method::Volume => "thin volume: shares the snapshot's blocks, depends on nothing",
        Method::VolumeCopy => "full copy in a new volume",
    };
    let message = match (&order.new_vm, disk.method) {
        (None, _) => Some("the present image is kept as a snapshot, and then replaced".to_owned()),
        (Some(_), Method::Link) => Some("the snapshot's data stays for as long as this image needs it".to_owned()),
        (Some(_), Method::Copy) if order.mode == RestoreMode::Linked => {
            Some("an image there can't depend on the snapshot's data, so this is a copy".to_owned())
        }
        (Some(_), _) => None,
    };
    RestoredDisk {
        name: DiskName(disk.disk.clone()),
        driver: DriverName(disk.driver.clone()),
        method: method.to_owned(),
        source: SnapshotHandle(disk.source.display().to_string()),
        path: SnapshotHandle(disk.path.display().to_string()),
        format: disk.format.clone(),
        size_bytes: bytes(disk.size),
        needed_bytes: bytes(disk.needed),
        linked: disk.method == Method::Link,
        state,
        progress_percent: None,
        message,
    }
}

fn bytes(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
