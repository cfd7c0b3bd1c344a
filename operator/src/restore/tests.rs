//! What is decided about a restore, row by row.

use freezeframe_api::RESTORED_BY_ANNOTATION;
use freezeframe_api::conditions::{find, is_true, reasons, types};
use freezeframe_api::v1alpha1::{
    ContentPhase, Phase, RestoreContentPhase, RestorePhase, RestoreStep, VMRestore, VMRestoreContent, VMRestoreStatus,
    VMSnapshot,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use serde_json::{Value, json};

use super::observe::Observed;
use super::order;
use super::plan::{Action, plan};
use crate::fixtures::{SnapshotExt as _, at, reported, snapshot};

fn restore(spec: Value) -> VMRestore {
    let mut spec = spec;
    spec["snapshotName"] = "nightly".into();
    serde_json::from_value(json!({
        "apiVersion": "freezeframe.dev/v1alpha1",
        "kind": "VMRestore",
        "metadata": {
            "name": "undo", "namespace": "shop", "uid": "0b0c0d0e-f", "resourceVersion": "300", "generation": 1,
            "creationTimestamp": Time(at(100)),
        },
        "spec": spec,
    }))
    .unwrap()
}

fn in_place() -> VMRestore {
    restore(json!({"confirm": "uid-nightly"}))
}

fn ready_snapshot() -> VMSnapshot {
    let mut snapshot = snapshot("nightly").phase(Phase::Ready);
    snapshot.status.get_or_insert_default().content_name = Some("vmsnap-uid-nightly".into());
    snapshot
}

fn observed(restore: VMRestore) -> Observed {
    let snapshot = ready_snapshot();
    let source = reported(&snapshot, ContentPhase::Ready, reasons::COMPLETED);
    Observed {
        restore,
        snapshot: Some(snapshot),
        source: Some(source),
        class_directory: None,
        content: None,
        before: None,
        new_vm_exists: false,
        ahead: None,
    }
}

/// With a content at that step, on which the node has reported that phase.
fn at_step(mut observed: Observed, step: RestoreStep, phase: Option<RestoreContentPhase>) -> Observed {
    let mut content = order::content(&observed.restore, observed.source.as_ref().unwrap(), None);
    content.spec.step = step;
    content.metadata.generation = Some(4);
    content.status = serde_json::from_value(json!({
        "observedGeneration": 4,
        "phase": phase,
        "disks": [{
            "name": "vda", "driver": "overlay", "method": "a layer", "source": "/vm/a", "path": "/vm/b",
            "format": "qcow2", "sizeBytes": 1, "neededBytes": 1, "state": "Planned",
        }],
        "conditions": [{
            "type": "Ready", "status": "False", "reason": "VMRunning", "message": "It runs.",
            "lastTransitionTime": Time(at(110)),
        }],
    }))
    .unwrap();
    observed.restore.metadata.finalizers = Some(vec!["freezeframe.dev/restore".into()]);
    observed.content = Some(content);
    observed
}

fn before(observed: &Observed, phase: Phase) -> VMSnapshot {
    let content = observed.content.as_ref().unwrap();
    order::before(&observed.restore, observed.snapshot.as_ref().unwrap(), content).phase(phase)
}

fn told(actions: &[Action]) -> &VMRestoreStatus {
    let status = actions.iter().find_map(|action| match action {
        Action::WriteStatus(status) => Some(status),
        _ => None,
    });
    status.unwrap_or_else(|| panic!("no status is written: {actions:?}"))
}

fn made(actions: &[Action]) -> Option<&VMRestoreContent> {
    actions.iter().find_map(|action| match action {
        Action::CreateContent(content) => Some(&**content),
        _ => None,
    })
}

fn reason(status: &VMRestoreStatus) -> &str {
    &find(&status.conditions, types::READY).unwrap().reason
}

fn stalled(status: &VMRestoreStatus) -> bool {
    is_true(&status.conditions, types::STALLED)
}

#[test]
fn the_first_step_is_to_plan_to_stop_or_to_restore() {
    let rows = [
        (restore(json!({"dryRun": true})), RestoreStep::Plan),
        (restore(json!({"dryRun": true, "target": {"newVM": "copy"}})), RestoreStep::Plan),
        (restore(json!({"target": {"newVM": "copy"}})), RestoreStep::Restore),
        (in_place(), RestoreStep::Stop),
    ];
    for (restore, step) in rows {
        let actions = plan(&observed(restore), at(200));
        assert_eq!(actions[0], Action::AddFinalizer);
        let content = made(&actions).unwrap();
        assert_eq!((content.spec.step, content.spec.node_name.as_str()), (step, "node-a"));
        assert_eq!(told(&actions).phase, RestorePhase::Pending);
    }
}

#[test]
fn nothing_is_overwritten_on_the_word_for_another_snapshot() {
    for confirm in ["uid-of-an-earlier-one", ""] {
        let actions = plan(&observed(restore(json!({"confirm": confirm}))), at(200));
        assert!(made(&actions).is_none(), "{actions:?}");
        assert_eq!((told(&actions).phase, reason(told(&actions))), (RestorePhase::Failed, reasons::NOT_CONFIRMED));
    }
}

#[test]
fn a_restore_puts_its_mark_on_its_snapshot_before_the_work_order_and_once() {
    let marks = |observed: &Observed| {
        let is_mark = |action: &Action| matches!(action, Action::MarkSnapshot(_));
        let is_order = |action: &Action| matches!(action, Action::CreateContent(_));
        let actions = plan(observed, at(200));
        (actions.iter().position(is_mark), actions.iter().position(is_order).unwrap())
    };
    let mut observed = observed(in_place());
    let (mark, order) = marks(&observed);
    assert!(mark.is_some_and(|mark| mark < order));
    let mut annotate = |uid: &str| {
        let snapshot = observed.snapshot.as_mut().unwrap();
        snapshot.metadata.annotations = Some([(RESTORED_BY_ANNOTATION.to_owned(), uid.to_owned())].into());
        marks(&observed).0.is_some()
    };
    assert!(!annotate("0b0c0d0e-f"));
    assert!(annotate("another"));
}

#[test]
fn a_new_vms_images_go_to_the_classes_directory_if_the_class_names_one() {
    let to = |target: Value| observed(restore(json!({"target": target})));
    let in_class = || to(json!({"newVM": "copy", "directory": "Class"}));
    let directory = |observed: Observed| made(&plan(&observed, at(200))).map(|content| content.spec.directory.clone());
    let named = |observed: Observed| Observed { class_directory: Some("/srv/restored".into()), ..observed };
    assert_eq!(directory(named(in_class())), Some(Some("/srv/restored".into())));
    assert_eq!(directory(named(to(json!({"newVM": "copy", "directory": "Beside"})))), Some(None));
    assert_eq!(directory(named(to(json!({"newVM": "copy"})))), Some(None));
    let refused = plan(&in_class(), at(200));
    assert_eq!((made(&refused), reason(told(&refused))), (None, reasons::INVALID_PARAMETER));
    assert!(stalled(told(&refused)));
}

#[test]
fn a_restore_waits_for_what_may_still_come_and_fails_for_what_cannot() {
    type Change = fn(&mut Observed);
    let rows: [(Change, &str, bool); 6] = [
        (|o| o.snapshot = None, reasons::SNAPSHOT_NOT_FOUND, false),
        (|o| o.snapshot = Some(ready_snapshot().phase(Phase::Completing)), reasons::SNAPSHOT_NOT_READY, false),
        (|o| o.snapshot = Some(ready_snapshot().phase(Phase::Failed)), reasons::SNAPSHOT_NOT_READY, true),
        (|o| o.snapshot = Some(ready_snapshot().deleted()), reasons::SNAPSHOT_NOT_READY, true),
        (|o| o.ahead = Some("earlier".into()), reasons::QUEUED, false),
        (
            |o| {
                o.restore = restore(json!({"target": {"newVM": "copy"}}));
                o.new_vm_exists = true;
            },
            reasons::VM_EXISTS,
            true,
        ),
    ];
    for (change, expected, fatal) in rows {
        let mut observed = observed(in_place());
        change(&mut observed);
        let actions = plan(&observed, at(200));
        assert!(made(&actions).is_none(), "{actions:?}");
        assert_eq!((reason(told(&actions)), stalled(told(&actions))), (expected, fatal));
    }
}

/// Deleted while it is held, as its controller shows it.
fn held() -> VMSnapshot {
    let mut held = ready_snapshot().phase(Phase::Deleting).deleted();
    held.spec.hold = true;
    held.status.as_mut().unwrap().ready_to_use = true;
    held
}

#[test]
fn a_snapshot_that_was_deleted_and_is_held_can_be_restored_until_its_data_goes() {
    let mut starts = observed(in_place());
    starts.snapshot = Some(held());
    assert!(made(&plan(&starts, at(200))).is_some());
    let mut goes_on = at_step(starts.clone(), RestoreStep::Stop, Some(RestoreContentPhase::Stopped));
    let kept = reported(&snapshot("undo-before"), ContentPhase::Ready, reasons::COMPLETED);
    goes_on.before = Some((before(&goes_on, Phase::Ready), Some(kept)));
    assert!(plan(&goes_on, at(200)).iter().any(|action| matches!(action, Action::SetStep { .. })));

    starts.source.as_mut().unwrap().metadata.deletion_timestamp = Some(Time(at(150)));
    let refused = plan(&starts, at(200));
    assert_eq!((made(&refused), reason(told(&refused))), (None, reasons::SNAPSHOT_NOT_READY));
}

#[test]
fn the_state_of_before_is_kept_once_the_vm_is_at_rest() {
    let observed = at_step(observed(in_place()), RestoreStep::Stop, Some(RestoreContentPhase::Stopped));
    let actions = plan(&observed, at(200));
    let Action::CreateSnapshot(before) = &actions[0] else { panic!("{actions:?}") };
    assert_eq!(before.spec.vm_name, "db-1");
    assert_eq!(before.spec.disks.include, ["vda".into()], "the disks of the node's plan");
    assert_eq!(told(&actions).pre_restore_snapshot_name.as_deref(), Some("undo-before-0b0c0d0e"));
}

#[test]
fn the_node_may_replace_disks_only_when_the_state_of_before_is_ready() {
    for (phase, goes_on, fails) in [
        (Phase::Pending, false, false),
        (Phase::Completing, false, false),
        (Phase::Ready, true, false),
        (Phase::Failed, false, true),
    ] {
        let mut observed = at_step(observed(in_place()), RestoreStep::Stop, Some(RestoreContentPhase::Stopped));
        let before = before(&observed, phase);
        let kept = reported(&snapshot("undo-before"), ContentPhase::Ready, reasons::COMPLETED);
        observed.before = Some((before, Some(kept)));
        let actions = plan(&observed, at(200));
        let step = actions.iter().find_map(|action| match action {
            Action::SetStep { step, before, .. } => Some((*step, before.is_some())),
            _ => None,
        });
        assert_eq!(step, goes_on.then_some((RestoreStep::Restore, true)), "{phase:?}");
        if !goes_on {
            assert_eq!(stalled(told(&actions)), fails, "{phase:?}");
        }
    }
}

#[test]
fn the_node_may_not_replace_disks_while_what_undoes_it_or_what_comes_back_is_being_deleted() {
    type Change = fn(&mut Observed);
    let rows: [(Change, &str); 6] = [
        (
            |o| o.before.as_mut().unwrap().0.metadata.deletion_timestamp = Some(Time(at(150))),
            reasons::PRE_RESTORE_FAILED,
        ),
        (
            |o| o.before.as_mut().unwrap().1.as_mut().unwrap().metadata.deletion_timestamp = Some(Time(at(150))),
            reasons::PRE_RESTORE_FAILED,
        ),
        (|o| o.snapshot = Some(ready_snapshot().deleted()), reasons::SNAPSHOT_NOT_READY),
        (|o| o.snapshot = None, reasons::SNAPSHOT_NOT_READY),
        (|o| o.source.as_mut().unwrap().metadata.deletion_timestamp = Some(Time(at(150))), reasons::SNAPSHOT_NOT_READY),
        (|o| o.source.as_mut().unwrap().metadata.uid = Some("another".into()), reasons::SNAPSHOT_NOT_READY),
    ];
    for (number, (change, expected)) in rows.into_iter().enumerate() {
        let mut observed = at_step(observed(in_place()), RestoreStep::Stop, Some(RestoreContentPhase::Stopped));
        let kept = reported(&snapshot("undo-before"), ContentPhase::Ready, reasons::COMPLETED);
        observed.before = Some((before(&observed, Phase::Ready), Some(kept)));
        change(&mut observed);
        let actions = plan(&observed, at(200));
        assert!(!actions.iter().any(|action| matches!(action, Action::SetStep { .. })), "{number}: {actions:?}");
        assert_eq!((reason(told(&actions)), stalled(told(&actions))), (expected, true), "{number}");
    }
}

#[test]
fn a_content_made_of_the_snapshot_but_gone_keeps_nothing_ready() {
    let mut observed = at_step(observed(in_place()), RestoreStep::Stop, Some(RestoreContentPhase::Stopped));
    observed.before = Some((before(&observed, Phase::Ready), None));
    assert!(!plan(&observed, at(200)).iter().any(|action| matches!(action, Action::SetStep { .. })));
}

#[test]
fn what_the_node_reports_is_what_the_restore_is() {
    use RestoreContentPhase as Node;
    let rows = [
        (RestoreStep::Plan, None, true, RestorePhase::Pending),
        (RestoreStep::Plan, Some(Node::Planned), true, RestorePhase::Planned),
        (RestoreStep::Stop, None, false, RestorePhase::Stopping),
        (RestoreStep::Stop, Some(Node::Failed), false, RestorePhase::Failed),
        (RestoreStep::Restore, None, false, RestorePhase::Restoring),
        (RestoreStep::Restore, Some(Node::Restoring), false, RestorePhase::Restoring),
        (RestoreStep::Restore, Some(Node::Succeeded), false, RestorePhase::Succeeded),
        (RestoreStep::Restore, Some(Node::Failed), false, RestorePhase::Failed),
    ];
    for (step, phase, dry_run, expected) in rows {
        let restore = if dry_run { restore(json!({"dryRun": true})) } else { in_place() };
        let actions = plan(&at_step(observed(restore), step, phase), at(200));
        let status = told(&actions);
        assert_eq!((actions.len(), status.phase), (1, expected), "{step:?} {phase:?}");
        let done = [RestorePhase::Planned, RestorePhase::Succeeded].contains(&expected);
        assert_eq!(is_true(&status.conditions, types::READY), done);
        assert_eq!(stalled(status), expected == RestorePhase::Failed);
    }
}

#[test]
fn what_the_node_said_of_an_earlier_step_counts_no_more() {
    let mut observed = at_step(observed(in_place()), RestoreStep::Restore, Some(RestoreContentPhase::Stopped));
    let content = observed.content.as_mut().unwrap();
    content.metadata.generation = Some(5);
    assert_eq!(told(&plan(&observed, at(200))).phase, RestorePhase::Restoring);
}

#[test]
fn a_dry_run_becomes_real_when_the_snapshot_is_still_the_confirmed_one() {
    let planned = |restore| at_step(observed(restore), RestoreStep::Plan, Some(RestoreContentPhase::Planned));
    let actions = plan(&planned(in_place()), at(200));
    assert!(matches!(actions[..], [Action::SetStep { step: RestoreStep::Stop, .. }]), "{actions:?}");
    let actions = plan(&planned(restore(json!({"confirm": "another"}))), at(200));
    assert_eq!(reason(told(&actions)), reasons::NOT_CONFIRMED);
}

#[test]
fn a_settled_restore_writes_nothing_and_gives_up_a_node_that_waits() {
    let settled = |phase, node| {
        let mut observed = at_step(observed(in_place()), RestoreStep::Stop, node);
        let status = observed.restore.status.get_or_insert_default();
        (status.phase, status.observed_generation) = (phase, Some(1));
        plan(&observed, at(200))
    };
    assert_eq!(settled(RestorePhase::Succeeded, Some(RestoreContentPhase::Succeeded)), []);
    assert_eq!(settled(RestorePhase::Failed, Some(RestoreContentPhase::Failed)), []);
    let given_up = settled(RestorePhase::Failed, Some(RestoreContentPhase::Stopped));
    assert!(matches!(given_up[..], [Action::DeleteContent(_)]), "{given_up:?}");
}

fn removed() -> Vec<Condition> {
    let removed = json!([{
        "type": "Removed", "status": "True", "reason": "Deleted", "message": "", "lastTransitionTime": Time(at(170)),
    }]);
    serde_json::from_value(removed).unwrap()
}

#[test]
fn a_deleted_restore_goes_when_its_node_has_taken_back_what_was_unfinished() {
    let mut observed = at_step(observed(in_place()), RestoreStep::Restore, None);
    observed.restore.metadata.deletion_timestamp = Some(Time(at(150)));
    let actions = plan(&observed, at(200));
    assert!(matches!(actions[..], [Action::WriteStatus(_), Action::DeleteContent(_)]), "{actions:?}");

    let content = observed.content.as_mut().unwrap();
    content.metadata.deletion_timestamp = Some(Time(at(160)));
    content.status.as_mut().unwrap().conditions = removed();
    assert!(plan(&observed, at(200)).iter().any(|action| matches!(action, Action::LetContentGo(_))));

    observed.content = None;
    assert_eq!(plan(&observed, at(200)), [Action::RemoveFinalizer]);
}

#[test]
fn what_becomes_of_a_restore_whose_content_was_deleted_is_told_once_its_node_is_done() {
    for (last, expected) in [
        (RestoreContentPhase::Succeeded, (RestorePhase::Succeeded, reasons::COMPLETED)),
        (RestoreContentPhase::Failed, (RestorePhase::Failed, reasons::CONTENT_LOST)),
        (RestoreContentPhase::Restoring, (RestorePhase::Failed, reasons::CONTENT_LOST)),
    ] {
        let mut observed = at_step(observed(in_place()), RestoreStep::Restore, Some(RestoreContentPhase::Restoring));
        observed.restore.status.get_or_insert_default().phase = RestorePhase::Restoring;
        let content = observed.content.as_mut().unwrap();
        content.metadata.deletion_timestamp = Some(Time(at(160)));
        let actions = plan(&observed, at(170));
        let [Action::WriteStatus(status)] = &actions[..] else { panic!("{actions:?}") };
        assert_eq!((status.phase, stalled(status)), (RestorePhase::Restoring, false));

        let status = observed.content.as_mut().unwrap().status.as_mut().unwrap();
        (status.phase, status.conditions) = (Some(last), removed());
        let actions = plan(&observed, at(200));
        let [Action::WriteStatus(status), Action::LetContentGo(_)] = &actions[..] else { panic!("{actions:?}") };
        assert_eq!((status.phase, reason(status)), expected);
    }
}

#[test]
fn a_node_that_does_not_answer_is_told_of() {
    let silent = |observed: &Observed, now| {
        let actions = plan(observed, at(now));
        let told = told(&actions);
        let silent = told.message.as_ref().unwrap().contains("doesn't answer");
        let removed = find(&told.conditions, types::REMOVED).map(|condition| condition.reason.as_str());
        assert_eq!(removed.unwrap_or_else(|| reason(told)) == reasons::NODE_NOT_RESPONDING, silent);
        silent
    };
    let mut observed = at_step(observed(in_place()), RestoreStep::Stop, None);
    observed.restore.status.get_or_insert_default().phase = RestorePhase::Stopping;
    let content = observed.content.as_mut().unwrap();
    content.status = None;
    content.metadata.creation_timestamp = Some(Time(at(100)));
    assert!(!silent(&observed, 400));
    assert!(silent(&observed, 401));

    // It goes on, dies with disks half back, and comes back: nothing but what is told changes.
    let mut restoring = observed.clone();
    let content = restoring.content.as_mut().unwrap();
    content.spec.step = RestoreStep::Restore;
    content.status.get_or_insert_default().last_report_time = Some(Time(at(500)));
    assert!(!silent(&restoring, 1000), "it has just been told to");
    restoring.restore.status.get_or_insert_default().phase = RestorePhase::Restoring;
    assert!(!silent(&restoring, 800));
    assert!(silent(&restoring, 801));
    assert!(plan(&restoring, at(9000)).iter().all(|action| matches!(action, Action::WriteStatus(_))));
    restoring.content.as_mut().unwrap().status.as_mut().unwrap().last_report_time = Some(Time(at(900)));
    assert!(!silent(&restoring, 901));

    observed.restore.metadata.deletion_timestamp = Some(Time(at(2000)));
    assert!(!silent(&observed, 2300));
    assert!(silent(&observed, 2301));
}

#[test]
fn a_content_that_is_gone_is_no_success() {
    let mut observed = observed(in_place());
    observed.restore.status.get_or_insert_default().content_name = Some("vmrestore-0b0c0d0e-f".into());
    assert_eq!(reason(told(&plan(&observed, at(200)))), reasons::CONTENT_LOST);
}

#[test]
fn two_restores_of_one_name_keep_what_they_replace_under_two() {
    let (mut one, mut other) = (in_place(), in_place());
    one.metadata.name = Some("r".repeat(250));
    other.metadata.name.clone_from(&one.metadata.name);
    other.metadata.uid = Some("ffffffff-0".into());
    assert_ne!(order::before_name(&one), order::before_name(&other));
    assert!(order::before_name(&one).len() <= 253);
}
