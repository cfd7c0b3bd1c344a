//! What is decided in which situation. No server, no clock.

use std::sync::Arc;
use std::time::Duration;

use freezeframe_api::conditions::{condition, find, reasons, types};
use freezeframe_api::names::NodeName;
use freezeframe_api::v1alpha1::{
    ConsistencyLevel, ContentPhase, DeletionPolicy, Phase, VMSnapshot, VMSnapshotContent, VMSnapshotStatus, VMTarget,
};
use serde_json::json;

use super::cleanup;
use super::observe::{ClassState, ContentState, Observed};
use super::plan::{Action, Plan, Seen, plan};
use super::queue::{Entry, ahead};
use crate::fixtures::{SnapshotExt as _, at, class, content, deleted, reported, snapshot, snapshot_created, target};

/// The VM runs, there is a class, nobody is in line, nothing was done yet.
fn observed(snapshot: VMSnapshot) -> Observed {
    Observed {
        snapshot: Arc::new(snapshot),
        content: ContentState::Absent,
        target: Some(target("Running")),
        class: ClassState::Found(Box::new(class("standard", true))),
        ahead: None,
    }
}

fn with_content(snapshot: VMSnapshot, content: VMSnapshotContent) -> Observed {
    Observed { content: ContentState::Own(Box::new(content)), ..observed(snapshot) }
}

fn status(plan: &Plan) -> &VMSnapshotStatus {
    let written = plan.actions.iter().find_map(|action| match action {
        Action::WriteStatus(status) => Some(&**status),
        _ => None,
    });
    written.expect("a status is written")
}

fn is(plan: &Plan, type_: &str) -> Option<(String, String)> {
    find(&status(plan).conditions, type_).map(|condition| (condition.status.clone(), condition.reason.clone()))
}

#[allow(clippy::unnecessary_wraps, reason = "it is compared with what `is` returns")]
fn pair(status: &str, reason: &str) -> Option<(String, String)> {
    Some((status.to_owned(), reason.to_owned()))
}

/// The snapshot as it is after its plan was carried out.
fn after(snapshot: VMSnapshot, plan: &Plan) -> VMSnapshot {
    let status = status(plan).clone();
    snapshot.status(status)
}

#[test]
fn the_finalizer_comes_before_the_work_order_and_the_status_after_it() {
    let plan = plan(&observed(snapshot("a")), at(1));
    let [Action::AddFinalizer, Action::CreateContent(made), Action::WriteStatus(status)] = &plan.actions[..] else {
        panic!("{plan:?}")
    };
    let mut expected = content(&snapshot("a"));
    (expected.metadata.uid, expected.metadata.resource_version) = (None, None);
    assert_eq!(**made, expected);
    assert_eq!((status.phase, status.content_name.clone()), (Phase::Preparing, Some("vmsnap-uid-a".to_owned())));
    assert_eq!(status.class_name.as_deref(), Some("standard"), "it was the default");
    assert_eq!(plan.again, Some(Duration::from_secs(59 + 10)), "the deadline and the time to report");
}

#[test]
fn a_finalizer_that_is_there_is_not_added_again() {
    let plan = plan(&observed(snapshot("a").finalized()), at(1));
    assert!(matches!(plan.actions[..], [Action::CreateContent(_), Action::WriteStatus(_)]), "{plan:?}");
}

#[test]
fn a_snapshot_that_lacks_something_waits_until_its_deadline_and_says_for_what() {
    let base = observed(snapshot("a"));
    let no_status = VMTarget { status: None, ..target("Running") };
    let rows = [
        (Observed { target: None, ..base.clone() }, reasons::VM_NOT_FOUND, "VMTarget db-1"),
        (Observed { target: Some(no_status), ..base.clone() }, reasons::VM_NOT_RUNNING, "No node has reported"),
        (Observed { target: Some(target("Stopped")), ..base.clone() }, reasons::VM_NOT_RUNNING, "doesn't run"),
        (Observed { target: Some(target("Unknown")), ..base.clone() }, reasons::VM_NOT_RUNNING, "doesn't answer"),
        (Observed { class: ClassState::NotFound("gold".into()), ..base.clone() }, reasons::CLASS_NOT_FOUND, "gold"),
        (Observed { class: ClassState::NoDefault(0), ..base.clone() }, reasons::NO_DEFAULT_CLASS, "no VMSnapshotClass"),
        (
            Observed { class: ClassState::NoDefault(2), ..base.clone() },
            reasons::NO_DEFAULT_CLASS,
            "2 VMSnapshotClasses",
        ),
    ];
    for (observed, reason, words) in rows {
        let waiting = plan(&observed, at(20));
        assert_eq!((waiting.actions.len(), waiting.again), (1, Some(Duration::from_secs(40))), "{reason}");
        assert_eq!((status(&waiting).phase, is(&waiting, types::ACCEPTED)), (Phase::Pending, pair("False", reason)));
        assert!(status(&waiting).message.as_ref().unwrap().contains(words), "{waiting:?}");
        let late = plan(&observed, at(60));
        assert_eq!(is(&late, types::READY), pair("False", reasons::DEADLINE_EXCEEDED));
        assert_eq!(
            (status(&late).phase, is(&late, types::STALLED)),
            (Phase::Failed, pair("True", reasons::DEADLINE_EXCEEDED))
        );
        assert!(status(&late).message.as_ref().unwrap().contains(words), "{late:?}");
    }
}

fn stopped_with_a_disk() -> VMTarget {
    let mut known = target("Stopped");
    let disk = json!([{"name": "vda", "format": "qcow2", "source": "/images/vda.qcow2", "sizeBytes": 1}]);
    known.status.as_mut().unwrap().disks = serde_json::from_value(disk).unwrap();
    known
}

#[test]
fn a_stopped_vm_is_taken_where_nothing_need_be_frozen_and_its_disks_are_known() {
    let known = stopped_with_a_disk();
    for (consistency, target, served) in [
        (json!({"required": "Crash"}), &known, true),
        (json!({"required": "Filesystem", "fallback": "Degrade"}), &known, true),
        (json!({"required": "Filesystem"}), &known, false),
        (json!({"required": "Crash"}), &self::target("Stopped"), false),
    ] {
        let mut wanted = snapshot("a");
        wanted.spec.consistency = serde_json::from_value(consistency.clone()).unwrap();
        let plan = plan(&Observed { target: Some(target.clone()), ..observed(wanted) }, at(1));
        assert_eq!(status(&plan).phase == Phase::Preparing, served, "{consistency}: {plan:?}");
        let words = status(&plan).message.clone().unwrap_or_default();
        assert!(served || words.contains("doesn't run, and"), "{words}");
    }
}

#[test]
fn whether_a_paused_vm_can_be_taken_is_left_to_its_node() {
    let plan = plan(&Observed { target: Some(target("Paused")), ..observed(snapshot("a")) }, at(1));
    assert_eq!(status(&plan).phase, Phase::Preparing);
}

#[test]
fn a_queued_snapshot_is_accepted_and_names_the_one_before_it() {
    let plan = plan(&Observed { ahead: Some("first".into()), ..observed(snapshot("a")) }, at(1));
    assert_eq!(is(&plan, types::ACCEPTED), pair("True", reasons::ACCEPTED));
    assert_eq!(is(&plan, types::READY), pair("False", reasons::QUEUED));
    assert!(status(&plan).message.as_ref().unwrap().contains("first"));
}

#[test]
fn nothing_is_written_when_nothing_is_new() {
    let rows = [
        observed(snapshot("a").finalized()),
        Observed { target: None, ..observed(snapshot("a")) },
        with_content(snapshot("a"), content(&snapshot("a"))),
        with_content(snapshot("a"), reported(&snapshot("a"), ContentPhase::Completing, reasons::IN_PROGRESS)),
        with_content(snapshot("a"), reported(&snapshot("a"), ContentPhase::Ready, reasons::COMPLETED)),
        with_content(snapshot("a"), reported(&snapshot("a"), ContentPhase::Failed, reasons::FREEZE_FAILED)),
    ];
    for mut observed in rows {
        let first = plan(&observed, at(1));
        observed.snapshot = Arc::new(after((*observed.snapshot).clone(), &first));
        if let Some(Action::CreateContent(made)) = first.actions.first() {
            observed.content = ContentState::Own(made.clone());
        }
        assert_eq!(plan(&observed, at(2)).actions, [], "later times are no news");
    }
}

#[test]
fn a_content_that_exists_already_is_followed_even_without_its_vm_or_class() {
    let observed = Observed {
        target: None,
        class: ClassState::NoDefault(0),
        ..with_content(snapshot("a").finalized(), content(&snapshot("a")))
    };
    let plan = plan(&observed, at(1));
    assert!(matches!(plan.actions[..], [Action::WriteStatus(_)]), "{plan:?}");
    assert_eq!(status(&plan).phase, Phase::Preparing);
}

#[test]
fn a_content_of_another_snapshot_is_left_alone() {
    let plan = plan(&Observed { content: ContentState::Foreign, ..observed(snapshot("a")) }, at(1));
    assert!(matches!(plan.actions[..], [Action::WriteStatus(_)]), "{plan:?}");
    assert_eq!(is(&plan, types::STALLED), pair("True", reasons::PREPARE_FAILED));
}

#[test]
fn what_the_node_proved_is_shown_to_the_user() {
    let report = reported(&snapshot("a"), ContentPhase::Ready, reasons::COMPLETED);
    let plan = plan(&with_content(snapshot("a").finalized(), report.clone()), at(20));
    let (status, report) = (status(&plan), report.status.unwrap());
    assert_eq!((status.phase, status.ready_to_use), (Phase::Ready, true));
    assert_eq!((&status.creation_time, &status.consistency), (&report.creation_time, &report.consistency));
    assert_eq!((&status.disks, status.node_name.as_deref()), (&report.disks, Some("node-a")));
    assert_eq!(is(&plan, types::QUIESCED), pair("True", reasons::PROVED));
    assert_eq!((is(&plan, types::READY), is(&plan, types::STALLED)), (pair("True", reasons::COMPLETED), None));
}

#[test]
fn a_snapshot_is_not_ready_while_a_disk_of_it_is_not_whatever_its_node_says() {
    let mut half = reported(&snapshot("a"), ContentPhase::Completing, reasons::IN_PROGRESS);
    half.status.as_mut().unwrap().phase = Some(ContentPhase::Ready);
    let mut none = half.clone();
    none.status.as_mut().unwrap().disks.clear();
    for content in [half, none] {
        let plan = plan(&with_content(snapshot("a"), content), at(20));
        assert_eq!((status(&plan).phase, status(&plan).ready_to_use), (Phase::Completing, false));
    }
}

#[test]
fn a_failure_is_told_with_the_nodes_own_reason() {
    let report = reported(&snapshot("a"), ContentPhase::Failed, reasons::FREEZE_TIMED_OUT);
    let plan = plan(&with_content(snapshot("a").finalized(), report), at(20));
    assert_eq!(is(&plan, types::STALLED), pair("True", reasons::FREEZE_TIMED_OUT));
    assert_eq!(status(&plan).message.as_deref(), Some("The node says FreezeTimedOut."));
    assert_eq!(plan.actions.len(), 1, "the content stays as the record");
}

#[test]
fn a_ready_snapshot_that_its_node_calls_overflowed_is_ready_no_more() {
    let whole = reported(&snapshot("a"), ContentPhase::Ready, reasons::COMPLETED);
    let ready = after(snapshot("a").finalized(), &plan(&with_content(snapshot("a").finalized(), whole), at(20)));
    assert_eq!(ready.status.as_ref().unwrap().phase, Phase::Ready);
    let mut lost = reported(&snapshot("a"), ContentPhase::Failed, reasons::SNAPSHOT_OVERFLOWED);
    let low = condition(types::SPACE_LOW, true, reasons::SPACE_LOW, "vda is full", None, at(30));
    lost.status.as_mut().unwrap().conditions.push(low);
    let failed = plan(&with_content(ready, lost), at(40));
    assert_eq!((status(&failed).phase, status(&failed).ready_to_use), (Phase::Failed, false));
    assert_eq!(is(&failed, types::READY), pair("False", reasons::SNAPSHOT_OVERFLOWED));
    assert_eq!(is(&failed, types::SPACE_LOW), pair("True", reasons::SPACE_LOW));
}

#[test]
fn a_node_has_ten_seconds_after_the_deadline_to_report() {
    let observed = with_content(snapshot("a").finalized(), content(&snapshot("a")));
    assert_eq!(status(&plan(&observed, at(69))).phase, Phase::Preparing);
    let plan = plan(&observed, at(70));
    let [Action::WriteStatus(status), Action::DeleteContent(seen)] = &plan.actions[..] else { panic!("{plan:?}") };
    assert_eq!((status.phase, seen.uid.as_deref()), (Phase::Failed, Some("uid-content")));
}

#[test]
fn a_cut_made_in_time_counts_however_late_it_is_looked_at() {
    for (phase, expected) in [(ContentPhase::Ready, Phase::Ready), (ContentPhase::Completing, Phase::Completing)] {
        let report = reported(&snapshot("a"), phase, reasons::COMPLETED);
        assert_eq!(status(&plan(&with_content(snapshot("a"), report), at(7000))).phase, expected);
    }
}

#[test]
fn the_content_of_a_snapshot_that_failed_by_its_deadline_is_deleted_even_after_a_restart() {
    let failed = snapshot("a").finalized();
    let first = plan(&with_content(failed.clone(), content(&failed)), at(70));
    let failed = after(failed, &first);
    let mut kept = content(&failed);
    kept.spec.deletion_policy = DeletionPolicy::Retain;
    let again = plan(&with_content(failed.clone(), kept), at(80));
    let [Action::SetDeletionPolicy { policy: DeletionPolicy::Delete, .. }, Action::DeleteContent(_)] =
        again.actions[..]
    else {
        panic!("{again:?}")
    };
    let reported = reported(&failed, ContentPhase::Ready, reasons::COMPLETED);
    let late = plan(&with_content(failed.clone(), reported), at(80));
    assert!(matches!(late.actions[..], [Action::DeleteContent(_)]), "failed is for good: {late:?}");
    assert_eq!(plan(&observed(failed), at(90)), Plan::default());
}

#[test]
fn no_data_is_deleted_on_the_word_of_a_status_that_gives_no_reason_for_it() {
    let failed = snapshot("a").finalized().phase(Phase::Failed);
    let report = reported(&failed, ContentPhase::Ready, reasons::COMPLETED);
    let plan = plan(&with_content(failed, report), at(80));
    assert!(matches!(plan.actions[..], [Action::WriteStatus(_)]), "{plan:?}");
}

#[test]
fn a_failed_snapshot_still_tells_that_it_has_seen_a_change_of_its_spec() {
    let failed = snapshot("a").finalized();
    let mut failed = after(failed.clone(), &plan(&Observed { target: None, ..observed(failed) }, at(60)));
    failed.metadata.generation = Some(2);
    let plan = plan(&observed(failed), at(61));
    assert_eq!(
        (status(&plan).observed_generation, is(&plan, types::READY)),
        (Some(2), pair("False", reasons::DEADLINE_EXCEEDED))
    );
}

#[test]
fn a_content_that_is_gone_or_going_is_lost() {
    let ready = snapshot("a").finalized();
    let report = reported(&ready, ContentPhase::Ready, reasons::COMPLETED);
    let ready = after(ready.clone(), &plan(&with_content(ready, report.clone()), at(20)));
    for content in [ContentState::Absent, ContentState::Own(Box::new(deleted(report)))] {
        let plan = plan(&Observed { content, ..observed(ready.clone()) }, at(100));
        assert_eq!(is(&plan, types::READY), pair("False", reasons::CONTENT_LOST));
        assert_eq!((status(&plan).phase, status(&plan).ready_to_use, plan.actions.len()), (Phase::Failed, false, 1));
    }
}

#[test]
fn a_changed_deletion_policy_is_carried_to_the_content_and_an_unstated_one_is_not() {
    let report = reported(&snapshot("a"), ContentPhase::Ready, reasons::COMPLETED);
    let ready = after(snapshot("a"), &plan(&with_content(snapshot("a"), report.clone()), at(20)));
    let mut retain = ready.clone();
    retain.spec.deletion_policy = Some(DeletionPolicy::Retain);
    let carried = plan(&with_content(retain, report.clone()), at(30));
    let policy = DeletionPolicy::Retain;
    assert_eq!(carried.actions, [Action::SetDeletionPolicy { content: Seen::new(&report), policy }]);
    let mut kept = report;
    kept.spec.deletion_policy = policy;
    assert_eq!(plan(&with_content(ready, kept), at(30)).actions, []);
}

#[test]
fn a_deleted_snapshot_without_a_content_is_let_go_at_once() {
    let deleted = snapshot("a").finalized().deleted();
    for content in [ContentState::Absent, ContentState::Foreign] {
        assert_eq!(cleanup::plan(&deleted, &content, at(31)).actions, [Action::RemoveFinalizer]);
    }
    let unowned = snapshot("a").deleted();
    assert_eq!(cleanup::plan(&unowned, &ContentState::Absent, at(31)).actions, []);
}

#[test]
fn a_deleted_snapshots_content_is_deleted_after_the_user_was_told() {
    let deleted = snapshot("a").finalized().deleted();
    let report = reported(&deleted, ContentPhase::Ready, reasons::COMPLETED);
    let plan = cleanup::plan(&deleted, &ContentState::Own(Box::new(report)), at(31));
    let [Action::WriteStatus(status), Action::DeleteContent(_)] = &plan.actions[..] else { panic!("{plan:?}") };
    assert_eq!((status.phase, status.ready_to_use), (Phase::Deleting, false));
}

#[test]
fn the_content_of_a_deleted_snapshot_stays_when_there_is_data_to_retain() {
    let unsaid = snapshot("a").finalized().deleted();
    let mut said = unsaid.clone();
    said.spec.deletion_policy = Some(DeletionPolicy::Retain);
    for (phase, stays) in [
        (None, false),
        (Some(ContentPhase::Completing), true),
        (Some(ContentPhase::Ready), true),
        (Some(ContentPhase::Failed), false),
    ] {
        let mut by_user = phase.map_or_else(|| content(&said), |phase| reported(&said, phase, reasons::COMPLETED));
        by_user.spec.deletion_policy = DeletionPolicy::Delete;
        let mut by_class = by_user.clone();
        by_class.spec.deletion_policy = DeletionPolicy::Retain;
        for (snapshot, content) in [(&said, by_user), (&unsaid, by_class)] {
            let plan = cleanup::plan(snapshot, &ContentState::Own(Box::new(content)), at(31));
            let left = matches!(plan.actions[..], [Action::LeaveContent(_), Action::RemoveFinalizer]);
            let undone = matches!(plan.actions[..], [.., Action::WriteStatus(_), Action::DeleteContent(_)]);
            assert_eq!((left, undone), (stays, !stays), "{phase:?}: {plan:?}");
        }
    }
}

#[test]
fn a_cancelled_snapshot_retains_nothing_unless_its_cut_was_reported_meanwhile() {
    let mut deleted = snapshot("a").finalized().deleted();
    deleted.spec.deletion_policy = Some(DeletionPolicy::Retain);
    let mut unasked = content(&deleted);
    unasked.spec.deletion_policy = DeletionPolicy::Retain;
    let plan = cleanup::plan(&deleted, &ContentState::Own(Box::new(unasked.clone())), at(31));
    let only_as_seen = Action::SetDeletionPolicy { content: Seen::new(&unasked), policy: DeletionPolicy::Delete };
    assert_eq!((&plan.actions[0], unasked.metadata.resource_version.is_some()), (&only_as_seen, true));
}

#[test]
fn nothing_is_retained_of_a_snapshot_whose_node_was_given_up_on_whatever_it_reports_later() {
    let mut failed = snapshot("a").finalized();
    failed.spec.deletion_policy = Some(DeletionPolicy::Retain);
    let failed = after(failed.clone(), &plan(&with_content(failed.clone(), content(&failed)), at(70))).deleted();
    let late = reported(&failed, ContentPhase::Ready, reasons::COMPLETED);
    let plan = cleanup::plan(&failed, &ContentState::Own(Box::new(late.clone())), at(80));
    assert!(matches!(plan.actions[..], [Action::WriteStatus(_), Action::DeleteContent(_)]), "{plan:?}");
    let told = after(failed, &plan);
    let again = cleanup::plan(&told, &ContentState::Own(Box::new(late)), at(81));
    assert!(matches!(again.actions[..], [Action::DeleteContent(_)]), "{again:?}");
}

#[test]
fn a_held_snapshot_keeps_its_data_and_says_so() {
    let ready = snapshot("a").finalized();
    let report = reported(&ready, ContentPhase::Ready, reasons::COMPLETED);
    let mut held = after(ready.clone(), &plan(&with_content(ready, report.clone()), at(20))).deleted();
    held.spec.hold = true;
    let plan = cleanup::plan(&held, &ContentState::Own(Box::new(report)), at(31));
    assert!(matches!(plan.actions[..], [Action::WriteStatus(_)]), "{plan:?}");
    assert_eq!((status(&plan).ready_to_use, is(&plan, types::REMOVED)), (true, pair("False", reasons::HELD)));
    let said = after(held.clone(), &plan);
    assert_eq!(cleanup::plan(&said, &ContentState::Own(Box::new(content(&held))), at(40)).actions, []);
}

#[test]
fn a_removal_that_fails_is_shown_with_the_nodes_words() {
    let going = snapshot("a").finalized().deleted();
    let mut content = deleted(reported(&going, ContentPhase::Ready, reasons::COMPLETED));
    let words = condition(types::REMOVED, false, reasons::DELETE_FAILED, "disk vda is busy", None, at(40));
    content.status.as_mut().unwrap().conditions.push(words);
    let plan = cleanup::plan(&going, &ContentState::Own(Box::new(content)), at(41));
    assert_eq!(is(&plan, types::REMOVED), pair("False", reasons::DELETE_FAILED));
    assert_eq!(status(&plan).message.as_deref(), Some("disk vda is busy"));
}

#[test]
fn snapshots_of_a_vm_go_by_age_and_then_by_uid() {
    let [old, twin, young] = [snapshot("a"), snapshot("b"), snapshot_created("c", at(5))];
    let entries = [&young, &old, &twin].map(|snapshot| Entry { snapshot, content: None });
    let running = target("Running");
    let before = |own| ahead(own, &entries, Some(&running)).map(|other| other.metadata.name.clone().unwrap());
    assert_eq!([before(&old), before(&twin), before(&young)], [None, Some("a".into()), Some("b".into())]);
}

#[test]
fn the_line_is_kept_by_those_alone_that_need_the_vm() {
    let young = snapshot_created("young", at(5));
    let old = snapshot("old");
    let mut other_vm = old.clone();
    other_vm.spec.vm_name = "db-2".into();
    let mut classless = old.clone();
    let lacks_class = condition(types::ACCEPTED, false, reasons::CLASS_NOT_FOUND, "", None, at(1));
    classless.status.get_or_insert_default().conditions.push(lacks_class);
    let unasked = content(&old);
    let ready = reported(&old, ContentPhase::Ready, reasons::COMPLETED);
    let copying = reported(&old, ContentPhase::Completing, reasons::IN_PROGRESS);
    let rows = [
        (old.clone(), None, true),
        (old.clone().phase(Phase::Ready), Some(&ready), false),
        (old.clone().phase(Phase::Failed), None, false),
        (old.clone().phase(Phase::Completing), Some(&copying), true),
        (old.clone().deleted(), None, false),
        (old.clone().phase(Phase::Deleting).deleted(), Some(&unasked), true),
        (old.clone().phase(Phase::Deleting).deleted(), Some(&ready), false),
        (snapshot_created("younger", at(9)).phase(Phase::Preparing), Some(&unasked), true),
        (classless, None, false),
        (other_vm, None, false),
    ];
    for (number, (other, content, blocks)) in rows.iter().enumerate() {
        let entries = [Entry { snapshot: other, content: *content }, Entry { snapshot: &young, content: None }];
        assert_eq!(ahead(&young, &entries, Some(&target("Running"))).is_some(), *blocks, "row {number}");
    }
}

#[test]
fn a_node_that_the_vm_has_left_keeps_nobody_waiting() {
    let young = snapshot_created("young", at(5));
    let old = snapshot("old");
    let (unasked, copying) = (content(&old), reported(&old, ContentPhase::Completing, reasons::IN_PROGRESS));
    let rows = [
        (old.clone().phase(Phase::Deleting).deleted(), &unasked),
        (old.clone().phase(Phase::Completing), &copying),
        (old.phase(Phase::Preparing), &unasked),
    ];
    for (other, content) in rows {
        let entries = [Entry { snapshot: &other, content: Some(content) }];
        let is_blocked_on = |node: &str| {
            let mut target = target("Running");
            target.status.as_mut().unwrap().node_name = NodeName(node.into());
            ahead(&young, &entries, Some(&target)).is_some()
        };
        assert_eq!((is_blocked_on("node-a"), is_blocked_on("node-b")), (true, false), "{other:?}");
    }
}

#[test]
fn one_that_waits_for_the_vm_to_run_keeps_none_waiting_that_takes_it_stopped() {
    let stopped = stopped_with_a_disk();
    let (needs_freeze, mut as_it_lies) = (snapshot("old"), snapshot_created("young", at(5)));
    as_it_lies.spec.consistency.required = ConsistencyLevel::Crash;
    let mut another = as_it_lies.clone();
    (another.metadata.name, another.metadata.uid) = (Some("older".into()), Some("0".into()));
    let is_blocked_by = |other: &VMSnapshot, target: &VMTarget| {
        ahead(&as_it_lies, &[Entry { snapshot: other, content: None }], Some(target)).is_some()
    };
    assert!(!is_blocked_by(&needs_freeze, &stopped));
    assert!(is_blocked_by(&another, &stopped));
    assert!(is_blocked_by(&needs_freeze, &target("Running")), "the order is kept once both can start");
}
