//! From how full a complete snapshot is, or that somebody wrote to it, to what is reported: pure.

use freezeframe_api::conditions::{condition, find, reasons, set, types};
use freezeframe_api::v1alpha1::{ContentPhase, DiskSnapshotState, VMSnapshotContentStatus};
use k8s_openapi::jiff::Timestamp;

use super::journal::SessionRecord;
use crate::drivers::Fill;

/// A report names steps of so many percent, so that it isn't written each time that a guest writes.
const STEP: u8 = 5;

/// The status of a complete snapshot whose disks are so full; none if it says nothing new.
#[must_use]
pub fn filled(record: &SessionRecord, fills: &[(String, Fill)]) -> Option<VMSnapshotContentStatus> {
    let before = record.status.as_ref()?;
    let mut status = before.clone();
    for disk in &mut status.disks {
        let Some((_, fill)) = fills.iter().find(|(name, _)| *name == disk.name.0) else { continue };
        if fill.overflowed {
            disk.state = DiskSnapshotState::Failed;
        }
        disk.message = Some(said(fill));
    }
    space(&mut status, record, fills);
    overflow(&mut status, record, fills);
    (status != *before).then_some(status)
}

/// The status of a complete snapshot some of whose disks were written to; none if none was.
#[must_use]
pub fn spoilt(record: &SessionRecord, disks: &[(String, String)]) -> Option<VMSnapshotContentStatus> {
    let mut status = record.status.clone().filter(|_| !disks.is_empty())?;
    for disk in &mut status.disks {
        let Some((_, why)) = disks.iter().find(|(name, _)| *name == disk.name.0) else { continue };
        (disk.state, disk.message) = (DiskSnapshotState::Failed, Some(why.clone()));
    }
    let named: Vec<_> = disks.iter().map(|(disk, why)| format!("disk {disk}: {why}")).collect();
    fail(&mut status, record, reasons::SNAPSHOT_OVERWRITTEN, named.join("; "));
    Some(status)
}

fn fail(status: &mut VMSnapshotContentStatus, record: &SessionRecord, reason: &str, message: String) {
    status.phase = Some(ContentPhase::Failed);
    let (generation, now) = (record.order.generation, Timestamp::now());
    set(&mut status.conditions, condition(types::READY, false, reason, message, generation, now));
}

fn said(fill: &Fill) -> String {
    match fill {
        Fill { overflowed: true, .. } => {
            "more changed than the space that was set apart: the snapshot lost its contents".into()
        }
        fill => format!("at least {} % of the space for changes are used", floor(fill.percent)),
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to 0..=100 before")]
fn floor(percent: f64) -> u8 {
    percent.clamp(0.0, 100.0) as u8 / STEP * STEP
}

/// Nothing is said of space until it was low for the first time.
fn space(status: &mut VMSnapshotContentStatus, record: &SessionRecord, fills: &[(String, Fill)]) {
    let low: Vec<_> = fills.iter().filter(|(_, fill)| fill.low || fill.overflowed).collect();
    if low.is_empty() && find(&status.conditions, types::SPACE_LOW).is_none() {
        return;
    }
    let named = low.iter().map(|(disk, fill)| format!("disk {disk}: {}", said(fill)));
    let message = named.collect::<Vec<_>>().join("; ");
    let reason = if low.is_empty() { reasons::ENOUGH_SPACE } else { reasons::SPACE_LOW };
    let (generation, now) = (record.order.generation, Timestamp::now());
    set(&mut status.conditions, condition(types::SPACE_LOW, !low.is_empty(), reason, message, generation, now));
}

/// What lost its contents isn't ready any more, and never will be.
fn overflow(status: &mut VMSnapshotContentStatus, record: &SessionRecord, fills: &[(String, Fill)]) {
    let lost: Vec<_> = fills.iter().filter(|(_, fill)| fill.overflowed).map(|(disk, _)| disk.as_str()).collect();
    if lost.is_empty() {
        return;
    }
    let message = format!(
        "disk {}: more changed than the space that was set apart, and the snapshot lost its contents; delete it, and \
         raise parameter `size` of the class",
        lost.join(", ")
    );
    fail(status, record, reasons::SNAPSHOT_OVERFLOWED, message);
}

#[cfg(test)]
mod tests {
    use freezeframe_api::v1alpha1::DiskSnapshot;
    use serde_json::json;

    use super::*;
    use crate::session::order::Order;

    fn complete() -> SessionRecord {
        let content = serde_json::from_value(json!({
            "metadata": {"name": "c", "uid": "u"},
            "spec": {"nodeName": "n", "vmSnapshotRef": {"namespace": "shop", "name": "a", "uid": "u"}, "vmName": "db",
                "consistency": {}, "quiesce": {}, "deadline": "2026-01-01T00:00:00Z"},
        }));
        let disk = |name: &str| -> DiskSnapshot {
            serde_json::from_value(json!({"name": name, "driver": "lvm", "state": "Ready", "sizeBytes": 1})).unwrap()
        };
        let ready = condition(types::READY, true, reasons::COMPLETED, "", None, Timestamp::UNIX_EPOCH);
        let status = VMSnapshotContentStatus {
            phase: Some(ContentPhase::Ready),
            disks: vec![disk("vda"), disk("vdb")],
            conditions: vec![ready],
            ..Default::default()
        };
        SessionRecord { status: Some(status), ..SessionRecord::nothing(&Order::new(&content.unwrap())) }
    }

    fn at(percent: f64) -> Vec<(String, Fill)> {
        vec![("vdb".into(), Fill { percent, overflowed: percent >= 100.0, low: percent >= 80.0 })]
    }

    fn then(record: SessionRecord, percent: f64) -> SessionRecord {
        let status = filled(&record, &at(percent)).expect("news");
        SessionRecord { status: Some(status), ..record }
    }

    fn said_of(record: &SessionRecord, type_: &str) -> Option<(String, String)> {
        let conditions = &record.status.as_ref().unwrap().conditions;
        find(conditions, type_).map(|found| (found.status.clone(), found.reason.clone()))
    }

    #[allow(clippy::unnecessary_wraps, reason = "it is compared with what `said_of` returns")]
    fn pair(status: &str, reason: &str) -> Option<(String, String)> {
        Some((status.into(), reason.into()))
    }

    #[test]
    fn a_snapshot_that_fills_is_told_in_steps_and_space_is_low_from_the_watermark_on() {
        let record = then(complete(), 40.3);
        assert_eq!(filled(&record, &at(44.9)), None, "no new step");
        assert_eq!(said_of(&record, types::SPACE_LOW), None);
        let record = then(record, 81.0);
        assert_eq!(said_of(&record, types::SPACE_LOW), pair("True", reasons::SPACE_LOW));
        assert_eq!(record.status.as_ref().unwrap().phase, Some(ContentPhase::Ready));
        let extended = then(record, 40.5);
        assert_eq!(said_of(&extended, types::SPACE_LOW), pair("False", reasons::ENOUGH_SPACE));
    }

    #[test]
    fn a_snapshot_that_overflowed_fails_with_the_disks_name_and_the_other_disk_does_not() {
        let record = then(complete(), 100.0);
        assert_eq!(said_of(&record, types::READY), pair("False", reasons::SNAPSHOT_OVERFLOWED));
        let status = record.status.as_ref().unwrap();
        let of_disks: Vec<_> = status.disks.iter().map(|disk| disk.state).collect();
        assert_eq!(
            (status.phase, of_disks),
            (Some(ContentPhase::Failed), vec![DiskSnapshotState::Ready, DiskSnapshotState::Failed])
        );
        assert!(find(&status.conditions, types::READY).unwrap().message.contains("vdb"));
    }

    #[test]
    fn what_cannot_overflow_is_not_spoken_of() {
        assert_eq!(filled(&complete(), &[]), None);
    }
}
