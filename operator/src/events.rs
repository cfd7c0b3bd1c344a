//! Kubernetes events: one when a snapshot is ready, one for each failure, and what a schedule can't do.

use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::{
    Phase, ScheduledVM, VMSnapshot, VMSnapshotSchedule, VMSnapshotScheduleStatus, VMSnapshotStatus,
};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType};
use tracing::warn;

use crate::context::Context;
use crate::error::bounded;

/// The event that the change of a snapshot's status deserves, if any. Pure.
///
/// The server keeps only the first note of events with the same action and reason, so what tells two apart is there.
#[must_use]
pub fn of_change(snapshot: &VMSnapshot, new: &VMSnapshotStatus) -> Option<Event> {
    let told = snapshot.status.as_ref().and_then(noteworthy);
    let (type_, action, reason) = noteworthy(new).filter(|news| told.as_ref() != Some(news))?;
    Some(Event { type_, action: action.to_owned(), reason, note: new.message.clone(), secondary: None })
}

fn noteworthy(status: &VMSnapshotStatus) -> Option<(EventType, &'static str, String)> {
    let reason = |type_| find(&status.conditions, type_).map(|condition| condition.reason.clone());
    match status.phase {
        Phase::Ready => Some((EventType::Normal, "Snapshot", "Ready".to_owned())),
        Phase::Failed => Some((EventType::Warning, "Snapshot", reason(types::READY)?)),
        Phase::Deleting => {
            let reason = reason(types::REMOVED)?;
            [reasons::DELETE_FAILED, reasons::HELD].contains(&reason.as_str()).then_some((
                EventType::Warning,
                "Delete",
                reason,
            ))
        }
        Phase::Pending | Phase::Preparing | Phase::Cutting | Phase::Completing => None,
    }
}

/// The events that the change of a schedule's status deserves: a warning when it can't be followed, and one for each VM
/// that has something new in its way. Pure.
#[must_use]
pub fn of_schedule(schedule: &VMSnapshotSchedule, new: &VMSnapshotScheduleStatus) -> Vec<Event> {
    let old = schedule.status.clone().unwrap_or_default();
    let warning = |action: &str, reason: &str, note: &str| Event {
        type_: EventType::Warning,
        action: action.to_owned(),
        reason: reason.to_owned(),
        note: Some(note.to_owned()),
        secondary: None,
    };
    let stalled = |status: &VMSnapshotScheduleStatus| find(&status.conditions, types::STALLED).cloned();
    let news = stalled(new).filter(|told| stalled(&old).is_none_or(|old| old.message != told.message));
    let mut events: Vec<Event> = news.iter().map(|told| warning("Schedule", &told.reason, &told.message)).collect();
    for ScheduledVM { name, message, .. } in &new.vms {
        let told = old.vms.iter().find(|vm| vm.name == *name).and_then(|vm| vm.message.as_ref());
        if let Some(message) = message.as_ref().filter(|message| told != Some(message)) {
            events.push(warning(name, "NotTaken", message));
        }
    }
    events
}

/// Publishes an event. One that is lost is no reason to fail: the status says the same.
pub async fn publish(ctx: &Context, mut event: Event, regarding: &ObjectReference) {
    event.note = event.note.as_deref().map(cut);
    if let Err(error) = bounded("publishing an event", ctx.recorder.publish(&event, regarding)).await {
        warn!(error = &error as &dyn std::error::Error, reason = event.reason, "event lost");
    }
}

/// Longest note that the API takes, in bytes.
const NOTE_LENGTH: usize = 1024;

fn cut(note: &str) -> String {
    let fits = |(start, char): &(usize, char)| start + char.len_utf8() <= NOTE_LENGTH;
    note.char_indices().take_while(fits).map(|(_, char)| char).collect()
}

#[cfg(test)]
mod tests {
    use freezeframe_api::conditions::condition;
    use k8s_openapi::jiff::Timestamp;

    use super::*;

    fn status(phase: Phase, reason: &str, message: &str) -> VMSnapshotStatus {
        let ready = phase == Phase::Ready;
        let conditions = vec![condition(types::READY, ready, reason, message, None, Timestamp::UNIX_EPOCH)];
        VMSnapshotStatus { phase, conditions, message: Some(message.to_owned()), ..Default::default() }
    }

    #[test]
    fn a_snapshot_that_overflowed_after_it_was_ready_is_warned_of_once_with_what_to_do() {
        let snapshot = serde_json::json!({"metadata": {"name": "a"}, "spec": {"vmName": "db"}});
        let mut snapshot: VMSnapshot = serde_json::from_value(snapshot).unwrap();
        let lost = status(Phase::Failed, reasons::SNAPSHOT_OVERFLOWED, "delete it, and raise `size`");
        snapshot.status = Some(status(Phase::Ready, reasons::COMPLETED, ""));
        let event = of_change(&snapshot, &lost).expect("news");
        assert_eq!((event.type_, event.reason.as_str()), (EventType::Warning, reasons::SNAPSHOT_OVERFLOWED));
        assert_eq!(event.note.as_deref(), Some("delete it, and raise `size`"));
        snapshot.status = Some(lost.clone());
        assert!(of_change(&snapshot, &lost).is_none());
    }

    #[test]
    fn a_note_is_cut_to_what_the_api_takes_between_two_characters() {
        assert_eq!(cut("the disks are cut"), "the disks are cut");
        assert_eq!(cut(&format!("a{}", "é".repeat(600))).len(), NOTE_LENGTH - 1);
    }
}
