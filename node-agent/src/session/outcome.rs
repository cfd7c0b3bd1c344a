//! From what happened to what is reported: pure.

use std::path::Path;

use freezeframe_api::conditions::{condition, find, reasons, set, types};
use freezeframe_api::names::{DiskName, DriverName, SnapshotHandle};
use freezeframe_api::v1alpha1::{
    ConsistencyEvidence, ConsistencyLevel, ContentPhase, DiskSnapshot, DiskSnapshotState, StartWith,
    VMSnapshotContentStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use std::time::Duration;

pub use super::filled::{filled, spoilt};
use super::journal::{JournalError, SessionRecord};
use super::proved;
use super::window::{Measured, WindowError};
use crate::causes::chain;
use crate::drivers::{DiskTask, DriverError, Layer};

/// Why a session ended without a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The condition reason.
    pub reason: &'static str,
    /// What a user is told.
    pub message: String,
    /// Whether the order itself can't be served, so that condition `Accepted` is false too.
    pub refused: bool,
}

impl Failure {
    /// The order could be served, but it went wrong.
    pub fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), refused: false }
    }

    /// The order can't be served.
    pub fn refused(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), refused: true }
    }

    /// The snapshot was deleted in the meantime.
    #[must_use]
    pub fn cancelled() -> Self {
        Self::new(reasons::CANCELLED, "the snapshot was deleted while it was taken")
    }

    /// A driver failed once the cut was done.
    #[must_use]
    pub fn after_cut(error: &DriverError) -> Self {
        let reason = match error {
            DriverError::Verify(_) | DriverError::Header { .. } => reasons::VERIFY_FAILED,
            _ => reasons::COPY_FAILED,
        };
        Self::new(reason, chain(error))
    }
}

impl From<DriverError> for Failure {
    fn from(error: DriverError) -> Self {
        let reason = match &error {
            DriverError::NoSpace { .. } => reasons::NO_SPACE,
            DriverError::Image(source) if source.is_no_space() => reasons::NO_SPACE,
            DriverError::Parameter { .. } => reasons::INVALID_PARAMETER,
            DriverError::Target { .. } => reasons::INVALID_TARGET,
            DriverError::NotNow(_) => reasons::VM_BUSY,
            _ => reasons::PREPARE_FAILED,
        };
        Self::new(reason, chain(&error))
    }
}

impl From<WindowError> for Failure {
    fn from(error: WindowError) -> Self {
        Self::new(reason_of(&error), chain(&error))
    }
}

fn reason_of(error: &WindowError) -> &'static str {
    match error {
        WindowError::Arm(_) | WindowError::GuardLost => reasons::GUARD_UNAVAILABLE,
        WindowError::Freeze(_) => reasons::FREEZE_FAILED,
        WindowError::FreezeTimeout(_) => reasons::FREEZE_TIMED_OUT,
        WindowError::FrozeTooLittle { .. } => reasons::NOTHING_FROZEN,
        WindowError::HoldExceeded(_) => reasons::WINDOW_BROKEN,
        WindowError::ThawOwed(_) | WindowError::ResumeOwed(_) => reasons::THAW_OWED,
        WindowError::Owed { cause, .. } => reason_of(cause),
        WindowError::Pause(_)
        | WindowError::Cut(_)
        | WindowError::HostCut(..)
        | WindowError::Exchange(_)
        | WindowError::Look(_)
        | WindowError::Switch(_) => reasons::CUT_FAILED,
    }
}

impl From<JournalError> for Failure {
    fn from(error: JournalError) -> Self {
        Self::new(reasons::PREPARE_FAILED, chain(&error))
    }
}

/// After the cut, while copies are under way.
#[must_use]
pub fn cut(record: &SessionRecord) -> VMSnapshotContentStatus {
    let disks = record.tasks.iter().map(|task| cut_disk(record, task)).collect();
    let mut status = VMSnapshotContentStatus { phase: Some(ContentPhase::Completing), disks, ..measured(record) };
    conditions(
        &mut status,
        record,
        &[
            (types::ACCEPTED, true, reasons::ACCEPTED, String::new()),
            quiesced(record),
            (types::READY, false, reasons::IN_PROGRESS, "data is being copied or checked".into()),
        ],
    );
    status
}

/// After a good cut whose completion waits for what is out of reach.
#[must_use]
pub fn waiting(record: &SessionRecord, failure: &Failure) -> VMSnapshotContentStatus {
    let mut status = cut(record);
    let message = format!("what was cut is good; to complete it is tried again and again: {}", failure.message);
    conditions(&mut status, record, &[(types::READY, false, failure.reason, message)]);
    status
}

/// Whether a status is of a snapshot that can't be gone on with at once.
#[must_use]
pub fn is_waiting(status: &VMSnapshotContentStatus) -> bool {
    let ready = find(&status.conditions, types::READY);
    match status.phase {
        Some(ContentPhase::Failed) => true,
        Some(ContentPhase::Completing) => ready.is_some_and(|ready| ready.reason != reasons::IN_PROGRESS),
        _ => false,
    }
}

/// When every disk is complete.
#[must_use]
pub fn ready(record: &SessionRecord) -> VMSnapshotContentStatus {
    let disks = record.tasks.iter().map(|task| cut_disk(record, task)).collect();
    let boot = record.boot.clone();
    let mut status = VMSnapshotContentStatus { phase: Some(ContentPhase::Ready), disks, boot, ..measured(record) };
    conditions(
        &mut status,
        record,
        &[
            (types::ACCEPTED, true, reasons::ACCEPTED, String::new()),
            quiesced(record),
            (types::READY, true, reasons::COMPLETED, format!("{} disks are complete", record.tasks.len())),
        ],
    );
    status
}

/// When it failed.
#[must_use]
pub fn failed(record: &SessionRecord, failure: &Failure) -> VMSnapshotContentStatus {
    let disks = record.tasks.iter().map(|task| disk(task, DiskSnapshotState::Failed)).collect();
    let mut status = VMSnapshotContentStatus { phase: Some(ContentPhase::Failed), disks, ..Default::default() };
    let accepted = if failure.refused { failure.reason } else { reasons::ACCEPTED };
    let why = if failure.refused { failure.message.clone() } else { String::new() };
    conditions(
        &mut status,
        record,
        &[
            (types::ACCEPTED, !failure.refused, accepted, why),
            (types::READY, false, failure.reason, failure.message.clone()),
        ],
    );
    status
}

/// After deletion.
#[must_use]
pub fn removed(record: &SessionRecord, kept: &[String]) -> VMSnapshotContentStatus {
    let mut status = record.status.clone().unwrap_or_default();
    status.phase = Some(ContentPhase::Removed);
    for disk in &mut status.disks {
        let is_kept = |task: &DiskTask| task.disk == disk.name.0 && !task.state.is_null();
        let is_kept = !kept.is_empty() && record.tasks.iter().any(is_kept);
        disk.state = if is_kept { DiskSnapshotState::Retained } else { DiskSnapshotState::Removed };
        if !kept.is_empty() && !is_kept {
            disk.handle = None;
        }
    }
    let (reason, message) = match kept {
        [] => (reasons::DELETED, String::new()),
        kept => (reasons::RETAINED, format!("kept: {}", kept.join("; "))),
    };
    conditions(&mut status, record, &[(types::REMOVED, true, reason, message)]);
    status
}

/// While deletion can't be finished.
#[must_use]
pub fn not_removed(record: &SessionRecord, why: &str) -> VMSnapshotContentStatus {
    let mut status = record.status.clone().unwrap_or_default();
    conditions(&mut status, record, &[(types::REMOVED, false, reasons::DELETE_FAILED, why.to_owned())]);
    status
}

/// Lets a stored report follow an artifact that moved.
pub fn follow(record: &mut SessionRecord, from: &Path, to: &Path, format: &str) {
    let disks = record.status.iter_mut().flat_map(|status| &mut status.disks);
    let is_moved = |disk: &&mut DiskSnapshot| disk.handle.as_ref().is_some_and(|handle| Path::new(&handle.0) == from);
    for disk in disks.filter(is_moved) {
        disk.handle = Some(SnapshotHandle(to.display().to_string()));
        disk.format = Some(format.to_owned());
    }
}

type Row = (&'static str, bool, &'static str, String);

fn conditions(status: &mut VMSnapshotContentStatus, record: &SessionRecord, rows: &[Row]) {
    let generation = record.order.generation;
    status.observed_generation = generation;
    let now = Timestamp::now();
    for (type_, value, reason, message) in rows {
        set(&mut status.conditions, condition(type_, *value, reason, message, generation, now));
    }
}

fn quiesced(record: &SessionRecord) -> Row {
    let Some(measured) = &record.measured else {
        return (types::QUIESCED, false, reasons::IN_PROGRESS, String::new());
    };
    match (proved(measured), record.order.required) {
        (ConsistencyLevel::Crash, ConsistencyLevel::Crash) => {
            (types::QUIESCED, false, reasons::NOT_REQUESTED, "the order asks for no freeze".into())
        }
        (ConsistencyLevel::Crash, _) => {
            let message = "the guest was not frozen over the whole cut; the order allows a weaker level".to_owned();
            (types::QUIESCED, false, reasons::DEGRADED, message)
        }
        _ => {
            let frozen = measured.frozen.map_or(0, |(frozen, _)| frozen);
            let message = format!("{frozen} file systems were frozen over the whole cut and thawed after it");
            (types::QUIESCED, true, reasons::PROVED, message)
        }
    }
}

fn measured(record: &SessionRecord) -> VMSnapshotContentStatus {
    let measured = record.measured.as_ref();
    VMSnapshotContentStatus {
        creation_time: measured.map(|measured| MicroTime(measured.cut_at)),
        consistency: measured.map(evidence),
        ..Default::default()
    }
}

fn evidence(measured: &Measured) -> ConsistencyEvidence {
    ConsistencyEvidence {
        level: proved(measured),
        frozen_filesystems: measured.frozen.map(|(frozen, _)| count(frozen)),
        thawed_filesystems: measured.thawed.map(count),
        freeze_millis: measured.frozen.map(|(_, took)| millis(took)),
        hold_millis: measured.hold.map(millis),
        pause_millis: millis(measured.pause),
        skew_micros: micros(measured.skew),
    }
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

fn count(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn state_of(task: &DiskTask) -> DiskSnapshotState {
    if task.artifact.is_some() { DiskSnapshotState::Ready } else { DiskSnapshotState::Copying }
}

/// A disk after the cut.
fn cut_disk(record: &SessionRecord, task: &DiskTask) -> DiskSnapshot {
    let offset = record.measured.as_ref().map(|measured| measured.offsets.of(&task.disk));
    DiskSnapshot { skew_micros: offset.map(micros), ..disk(task, state_of(task)) }
}

/// An image to start a VM with, as it is told.
#[must_use]
pub fn start_with(layer: &Layer) -> StartWith {
    StartWith { path: layer.path.display().to_string(), format: layer.format.clone() }
}

fn disk(task: &DiskTask, state: DiskSnapshotState) -> DiskSnapshot {
    DiskSnapshot {
        name: DiskName(task.disk.clone()),
        driver: DriverName(task.driver.clone()),
        driver_reason: Some(task.reason.clone()),
        state,
        size_bytes: count(task.size),
        format: task.artifact.as_ref().map(|artifact| artifact.format.clone()),
        handle: task.artifact.as_ref().map(|artifact| SnapshotHandle(artifact.handle.display().to_string())),
        progress_percent: None,
        skew_micros: None,
        start_with: task.start_with.as_ref().map(start_with),
        message: None,
    }
}
