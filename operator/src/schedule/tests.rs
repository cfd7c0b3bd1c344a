//! Decisions, as rows of a table.

use std::sync::Arc;

use freezeframe_api::conditions::{find, types};
use freezeframe_api::v1alpha1::{Phase, VMSnapshot, VMSnapshotClass, VMSnapshotSchedule, VMSnapshotScheduleStatus};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt as _;
use serde_json::{Value, json};

use super::made;
use super::observe::{Classes, Observed, Vm};
use super::plan::{Action, Plan, plan};
use super::timing::Timing;
use crate::events;
use crate::fixtures::class;

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

/// A schedule of midnight, hourly unless `spec` says otherwise.
fn schedule(spec: &Value) -> VMSnapshotSchedule {
    let mut whole = json!({"schedule": "@hourly"});
    whole.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    serde_json::from_value(json!({
        "metadata": {"name": "s", "namespace": "shop", "uid": "uid-s", "generation": 1,
            "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": whole,
    }))
    .unwrap()
}

fn vm(name: &str) -> Vm {
    Vm { name: name.to_owned(), found: Some((format!("uid-{name}"), at("2020-01-01T00:00:00Z"))) }
}

/// The schedule's snapshot of the VM for that time, in that phase.
fn made(schedule: &VMSnapshotSchedule, vm: &str, time: &str, phase: Phase) -> VMSnapshot {
    let mut snapshot = made::snapshot(schedule, vm, at(time));
    snapshot.metadata.uid = Some(format!("uid-{}", snapshot.name_any()));
    snapshot.status.get_or_insert_default().phase = phase;
    if phase == Phase::Ready {
        let evidence = json!({"level": "Filesystem"});
        let status = snapshot.status.get_or_insert_default();
        status.consistency = Some(serde_json::from_value(evidence).unwrap());
        status.creation_time = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime(at(time)));
    }
    snapshot
}

fn observed(schedule: &VMSnapshotSchedule, vms: &[&str], snapshots: Vec<VMSnapshot>) -> Observed {
    Observed {
        schedule: Arc::new(schedule.clone()),
        vms: Ok(vms.iter().map(|name| vm(name)).collect()),
        snapshots,
        restored: std::collections::BTreeSet::new(),
        classes: Classes::default(),
    }
}

fn created(plan: &Plan) -> Vec<String> {
    let name = |action: &Action| match action {
        Action::Create(snapshot) => Some(snapshot.name_any()),
        _ => None,
    };
    plan.actions.iter().filter_map(name).collect()
}

fn replaced(plan: &Plan) -> Vec<String> {
    let name = |action: &Action| match action {
        Action::Replace(snapshot) => Some(snapshot.name_any()),
        _ => None,
    };
    plan.actions.iter().filter_map(name).collect()
}

fn told(plan: &Plan) -> VMSnapshotScheduleStatus {
    let status = plan.actions.iter().find_map(|action| match action {
        Action::WriteStatus(status) => Some((**status).clone()),
        _ => None,
    });
    status.expect("a status")
}

fn message(plan: &Plan, vm: &str) -> String {
    told(plan).vms.into_iter().find(|told| told.name == vm).unwrap().message.unwrap_or_default()
}

#[test]
fn a_time_is_due_once_it_has_come_and_not_again() {
    let schedule = schedule(&json!({}));
    let first = || made(&schedule, "a", "2026-01-01T01:00:00Z", Phase::Ready);
    let rows = [
        ("2026-01-01T00:00:00Z", vec![], vec![]),
        ("2026-01-01T00:59:59Z", vec![], vec![]),
        ("2026-01-01T01:00:00Z", vec![], vec!["s-a-20260101t010000z"]),
        ("2026-01-01T01:00:00Z", vec![first()], vec![]),
        ("2026-01-01T01:59:59Z", vec![first()], vec![]),
        ("2026-01-01T02:00:00Z", vec![first()], vec!["s-a-20260101t020000z"]),
        ("2026-01-09T12:30:00Z", vec![first()], vec!["s-a-20260109t120000z"]),
    ];
    for (now, snapshots, expected) in rows {
        assert_eq!(created(&plan(&observed(&schedule, &["a"], snapshots), at(now))), expected, "{now}");
    }
}

#[test]
fn the_last_time_is_known_by_the_status_too_when_its_snapshot_is_gone() {
    let mut schedule = schedule(&json!({}));
    let after_the_first = told(&plan(&observed(&schedule, &["a"], vec![]), at("2026-01-01T01:00:00Z")));
    schedule.status = Some(after_the_first);
    assert_eq!(created(&plan(&observed(&schedule, &["a"], vec![]), at("2026-01-01T01:30:00Z"))), [""; 0]);
}

#[test]
fn a_vm_that_is_new_has_missed_nothing() {
    let schedule = schedule(&json!({}));
    let mut observed = observed(&schedule, &[], vec![]);
    observed.vms = Ok(vec![Vm { name: "a".into(), found: Some(("u".into(), at("2026-01-05T10:15:00Z"))) }]);
    assert_eq!(created(&plan(&observed, at("2026-01-05T10:20:00Z"))), [""; 0]);
    assert_eq!(created(&plan(&observed, at("2026-01-05T11:00:00Z"))), ["s-a-20260105t110000z"]);
}

#[test]
fn jitter_makes_a_vm_later_by_its_own_delay_but_not_its_time() {
    let schedule = schedule(&json!({"jitter": "30m"}));
    let delay = Timing::new(&schedule.spec).unwrap().delay("uid-a");
    assert!(delay > SignedDuration::from_secs(1) && delay < SignedDuration::from_mins(30), "{delay:?}");
    let due = at("2026-01-01T01:00:00Z") + delay;
    let plan_at = |now| plan(&observed(&schedule, &["a"], vec![]), now);
    let before = plan_at(due - SignedDuration::from_millis(1));
    assert_eq!(created(&before), [""; 0]);
    assert!(before.again.unwrap() <= std::time::Duration::from_millis(2), "{:?}", before.again);
    assert_eq!(created(&plan_at(due)), ["s-a-20260101t010000z"]);
}

#[test]
fn one_that_is_still_being_taken_is_waited_for_or_replaced() {
    let rows = [
        (json!({}), false, vec![], vec![], "s-a-20260101t010000z is still being taken."),
        (
            json!({"concurrencyPolicy": "Replace"}),
            false,
            vec!["s-a-20260101t010000z"],
            vec!["s-a-20260101t020000z"],
            "",
        ),
        (
            json!({"concurrencyPolicy": "Replace"}),
            true,
            vec![],
            vec![],
            "s-a-20260101t010000z is still being taken and is protected.",
        ),
    ];
    for (spec, hold, deleted, expected, said) in rows {
        let schedule = schedule(&spec);
        let mut active = made(&schedule, "a", "2026-01-01T01:00:00Z", Phase::Completing);
        active.spec.hold = hold;
        let plan = plan(&observed(&schedule, &["a"], vec![active]), at("2026-01-01T02:00:00Z"));
        assert_eq!((replaced(&plan), created(&plan)), (vec_of(&deleted), vec_of(&expected)));
        assert_eq!(message(&plan, "a"), said);
    }
}

fn vec_of(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn no_more_than_the_limit_are_under_way_and_the_one_that_waits_longest_goes_first() {
    let schedule = schedule(&json!({"maxConcurrent": 2}));
    let active = || made(&schedule, "d", "2026-01-01T02:00:00Z", Phase::Preparing);
    let c_is_up_to_date = || made(&schedule, "c", "2026-01-01T01:00:00Z", Phase::Ready);
    let now = at("2026-01-01T02:00:00Z");
    let snapshots = vec![active(), c_is_up_to_date()];
    let full = plan(&observed(&schedule, &["a", "b", "c", "d"], snapshots), now);
    assert_eq!(created(&full), ["s-a-20260101t020000z"]);
    let stands_by = |action: &Action| matches!(action, Action::CreateInstead(one) if one.spec.vm_name == "b");
    assert!(full.actions.iter().any(stands_by), "nobody takes the place of one that is refused");
    assert_eq!(message(&full, "b"), "2 snapshots of the schedule are being taken already.");
    assert_eq!(told(&full).active_count, 2);
    let mut going = active();
    going.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(now));
    let room = plan(&observed(&schedule, &["a", "b", "c"], vec![going, c_is_up_to_date()]), now);
    assert_eq!(created(&room), ["s-a-20260101t020000z", "s-b-20260101t020000z"]);
}

#[test]
fn where_there_is_never_room_for_all_each_vm_has_its_turn_at_every_second_time() {
    let schedule = schedule(&json!({"maxConcurrent": 24}));
    let names: Vec<String> = (0..40).map(|number| format!("vm-{number:02}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut snapshots: Vec<VMSnapshot> = vec![];
    for hour in 1..=5 {
        let now = at(&format!("2026-01-01T{hour:02}:00:00Z"));
        let plan = plan(&observed(&schedule, &names, snapshots.clone()), now);
        let created = plan.actions.into_iter().filter_map(|action| match action {
            Action::Create(snapshot) => Some(*snapshot),
            _ => None,
        });
        snapshots.extend(created.map(|snapshot| {
            let time = made::time_of(&snapshot).unwrap().to_string();
            made(&schedule, &snapshot.spec.vm_name, &time, Phase::Ready)
        }));
    }
    assert_eq!(snapshots.len(), 5 * 24);
    for name in names {
        let taken = snapshots.iter().filter(|snapshot| snapshot.spec.vm_name == name).count();
        assert!(taken >= 2, "{name} has {taken} of 5");
    }
}

fn condition(status: &VMSnapshotScheduleStatus, type_: &str) -> String {
    find(&status.conditions, type_).map_or(String::new(), |found| format!("{} {}", found.status, found.reason))
}

#[test]
fn what_is_stopped_takes_nothing_and_removes_nothing_and_counts_as_ready() {
    let paused = |name: &str, default: bool| {
        let mut class: VMSnapshotClass = class(name, default);
        class.annotations_mut().insert("freezeframe.dev/paused".into(), "true".into());
        class
    };
    let rows = [
        (json!({"suspend": true}), class("standard", true), "True Suspended"),
        (json!({}), paused("standard", true), "True Paused"),
        (json!({"template": {"className": "gold"}}), paused("gold", false), "True Paused"),
    ];
    for (spec, class, ready) in rows {
        let mut schedule = schedule(&spec);
        schedule.spec.keep = Some(serde_json::from_value(json!({"last": 1})).unwrap());
        let snapshots =
            ["01", "02"].map(|hour| made(&schedule, "a", &format!("2026-01-01T{hour}:00:00Z"), Phase::Ready));
        let mut observed = observed(&schedule, &["a"], snapshots.into());
        observed.classes = Classes::new([&class].into_iter());
        let plan = plan(&observed, at("2026-01-01T05:00:00Z"));
        let [Action::WriteStatus(status)] = &plan.actions[..] else { panic!("{:?}", plan.actions) };
        assert_eq!((condition(status, types::READY).as_str(), &status.next_time, plan.again), (ready, &None, None));
    }
}

#[test]
fn a_paused_class_protects_the_snapshots_of_the_class_though_the_schedule_has_another_now() {
    let old = schedule(&json!({"template": {"className": "old"}}));
    let snapshots = ["01", "02"].map(|hour| made(&old, "a", &format!("2026-01-01T{hour}:00:00Z"), Phase::Ready));
    let new = schedule(&json!({"template": {"className": "new"}, "keep": {"last": 1}}));
    let mut observed = observed(&new, &["a"], snapshots.into());
    let removed = |observed: &Observed| {
        let plan = plan(observed, at("2026-01-01T02:30:00Z"));
        plan.actions.into_iter().any(|action| matches!(action, Action::Prune(_)))
    };
    assert!(removed(&observed));
    let mut class = class("old", false);
    class.annotations_mut().insert("freezeframe.dev/paused".into(), "true".into());
    observed.classes = Classes::new([&class].into_iter());
    assert!(!removed(&observed));
}

#[test]
fn a_paused_class_protects_what_was_taken_by_it_as_the_default_though_another_is_the_default_now() {
    let schedule = schedule(&json!({"keep": {"last": 1}}));
    let mut paused: VMSnapshotClass = class("old", false);
    paused.annotations_mut().insert("freezeframe.dev/paused".into(), "true".into());
    let classes = Classes::new([&paused, &class("new", true)].into_iter());
    for (taken_by, goes) in [(Some("old"), false), (Some("new"), true), (None, false)] {
        let snapshots = ["01", "02"].map(|hour| {
            let mut snapshot = made(&schedule, "a", &format!("2026-01-01T{hour}:00:00Z"), Phase::Ready);
            snapshot.status.as_mut().unwrap().class_name = taken_by.map(str::to_owned);
            snapshot
        });
        let observed = Observed { classes: classes.clone(), ..observed(&schedule, &["a"], snapshots.into()) };
        let plan = plan(&observed, at("2026-01-01T02:30:00Z"));
        let prunes = plan.actions.iter().any(|action| matches!(action, Action::Prune(_)));
        assert_eq!(prunes, goes, "{taken_by:?}");
    }
}

#[test]
fn a_spec_that_cannot_be_followed_is_stalled_and_warned_of_once() {
    let rows = [
        (json!({"schedule": "0 0 30 2 *"}), Ok(()), "InvalidSchedule"),
        (json!({"timeZone": "Middle/Earth"}), Ok(()), "UnknownTimeZone"),
        (json!({}), Err("no operator"), "InvalidSelector"),
    ];
    for (spec, vms, reason) in rows {
        let mut schedule = schedule(&spec);
        let mut observed = observed(&schedule, &["a"], vec![]);
        if let Err(error) = vms {
            observed.vms = Err(error.to_owned());
        }
        let first = plan(&observed, at("2026-01-01T05:00:00Z"));
        let status = told(&first);
        assert_eq!(condition(&status, types::READY), format!("False {reason}"));
        assert_eq!(condition(&status, types::STALLED), format!("True {reason}"));
        assert_eq!(events::of_schedule(&schedule, &status).len(), 1);
        schedule.status = Some(status.clone());
        assert!(events::of_schedule(&schedule, &status).is_empty());
        observed.schedule = Arc::new(schedule);
        assert_eq!(plan(&observed, at("2026-01-01T06:00:00Z")), Plan::default(), "no news");
    }
}

#[test]
fn a_status_is_written_only_with_news() {
    let mut schedule = schedule(&json!({"keep": {"daily": 2}}));
    let snapshots = vec![made(&schedule, "a", "2026-01-01T01:00:00Z", Phase::Ready)];
    let first = plan(&observed(&schedule, &["a"], snapshots.clone()), at("2026-01-01T01:30:00Z"));
    schedule.status = Some(told(&first));
    let second = plan(&observed(&schedule, &["a"], snapshots), at("2026-01-01T01:45:00Z"));
    assert_eq!(second.actions, []);
}

#[test]
fn a_status_that_the_server_has_kept_in_whole_seconds_is_no_news() {
    let mut schedule = schedule(&json!({"jitter": "30m"}));
    let delay = Timing::new(&schedule.spec).unwrap().delay("uid-a");
    assert_ne!(delay.subsec_nanos(), 0);
    let now = at("2026-01-01T01:30:00Z");
    let snapshots = vec![made(&schedule, "a", "2026-01-01T01:00:00Z", Phase::Preparing)];
    let first = told(&plan(&observed(&schedule, &["a"], snapshots.clone()), now));
    let kept = serde_json::to_value(&first).unwrap();
    let next = kept["vms"][0]["nextTime"].as_str().unwrap();
    assert!(at(next) >= at("2026-01-01T02:00:00Z") + delay && !next.contains('.'), "{next}");
    schedule.status = Some(serde_json::from_value(kept).unwrap());
    assert_eq!(plan(&observed(&schedule, &["a"], snapshots), now).actions, []);
}

#[test]
fn vms_that_are_named_but_missing_and_vms_that_are_no_longer_selected_are_told_of() {
    let schedule = schedule(&json!({}));
    let mut observed = observed(&schedule, &["a"], vec![made(&schedule, "z", "2026-01-01T01:00:00Z", Phase::Ready)]);
    observed.vms = Ok(vec![vm("a"), Vm { name: "gone".into(), found: None }]);
    let plan = plan(&observed, at("2026-01-01T01:00:00Z"));
    assert_eq!(message(&plan, "gone"), "There is no VMTarget gone.");
    assert!(told(&plan).vms.iter().any(|vm| vm.name == "z" && vm.deselected));
    assert_eq!(created(&plan), ["s-a-20260101t010000z"]);
    let status = told(&plan);
    assert_eq!((status.vm_count, condition(&status, types::PROTECTED).as_str()), (2, "False NoSnapshot"));
}

#[test]
fn a_snapshot_is_good_by_the_level_that_it_had_to_have_itself() {
    let rows = [
        ("Filesystem", Some("Filesystem"), "True Completed"),
        ("Crash", Some("Filesystem"), "True Completed"),
        ("Crash", Some("Crash"), "True Completed"),
        ("Filesystem", Some("Crash"), "False SnapshotFailed"),
        ("Crash", None, "False SnapshotFailed"),
    ];
    for (required, proved, expected) in rows {
        let schedule = schedule(&json!({"template": {"consistency": {"required": "Filesystem"}}}));
        let mut snapshot = made(&schedule, "a", "2026-01-01T01:00:00Z", Phase::Ready);
        snapshot.spec.consistency.required = serde_json::from_value(json!(required)).unwrap();
        let evidence = proved.map(|level| serde_json::from_value(json!({"level": level})).unwrap());
        snapshot.status.as_mut().unwrap().consistency = evidence;
        let status = told(&plan(&observed(&schedule, &["a"], vec![snapshot]), at("2026-01-01T01:30:00Z")));
        assert_eq!(condition(&status, types::PROTECTED), expected, "{required} {proved:?}");
        let is_good = expected.starts_with("True");
        assert_eq!(status.vms[0].last_successful_time.is_some(), is_good, "{required} {proved:?}");
    }
}

#[test]
fn one_that_is_held_does_not_go_with_its_schedule() {
    let schedule = schedule(&json!({"deletionPolicy": "Delete"}));
    let owners = |hold: bool, owned: bool| {
        let mut snapshot = made(&schedule, "a", "2026-01-01T01:00:00Z", Phase::Ready);
        snapshot.spec.hold = hold;
        snapshot.metadata.owner_references = owned.then(|| vec![made::owner(&schedule)]);
        let plan = plan(&observed(&schedule, &["a"], vec![snapshot]), at("2026-01-01T01:30:00Z"));
        plan.actions.into_iter().find_map(|action| match action {
            Action::SetOwners(_, owners) => Some(owners.len()),
            _ => None,
        })
    };
    let changes = [(true, true), (true, false), (false, false), (false, true)].map(|(hold, owned)| owners(hold, owned));
    assert_eq!(changes, [Some(0), None, Some(1), None]);
}

#[test]
fn a_schedule_that_is_being_deleted_does_nothing_more() {
    let mut schedule = schedule(&json!({"keep": {"last": 1}}));
    let now = at("2026-01-01T05:00:00Z");
    schedule.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(now));
    let snapshots = ["01", "02"].map(|hour| made(&schedule, "a", &format!("2026-01-01T{hour}:00:00Z"), Phase::Ready));
    assert_eq!(plan(&observed(&schedule, &["a"], snapshots.into()), now), Plan::default());
}

#[test]
fn a_snapshot_carries_the_template_and_the_marks_of_its_schedule() {
    let schedule = schedule(&json!({"template": {"className": "gold", "labels": {"tier": "db"},
        "consistency": {"required": "Crash"}, "failureDeadline": "1m", "deletionPolicy": "Retain"}}));
    let snapshot = serde_json::to_value(made::snapshot(&schedule, "a", at("2026-01-01T01:00:00Z"))).unwrap();
    assert_eq!(
        snapshot["metadata"],
        json!({"name": "s-a-20260101t010000z", "namespace": "shop",
            "labels": {"tier": "db", "freezeframe.dev/schedule": "s", "freezeframe.dev/schedule-uid": "uid-s"},
            "annotations": {"freezeframe.dev/scheduled-time": "2026-01-01T01:00:00Z"}})
    );
    let spec = &snapshot["spec"];
    assert_eq!(
        (&spec["vmName"], &spec["className"], &spec["deletionPolicy"]),
        (&json!("a"), &json!("gold"), &json!("Retain"))
    );
    assert_eq!((&spec["consistency"]["required"], &spec["failureDeadline"]), (&json!("Crash"), &json!("60s")));
}
