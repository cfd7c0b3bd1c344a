//! Schedules over simulated months: the real reconciler, a server that keeps objects, and a clock that is set.
#![allow(clippy::unwrap_used, reason = "a test's helpers may stop it")]

mod support;

use std::collections::BTreeSet;

use freezeframe_operator::error::ErrorKind;
use k8s_openapi::jiff::civil::{Weekday, date};
use k8s_openapi::jiff::tz::TimeZone;
use k8s_openapi::jiff::{ToSpan as _, Zoned};
use serde_json::json;
use support::cluster::{Cluster, at, good, vm};

fn name_of(vm: &str, time: &Zoned) -> String {
    format!("s-{vm}-{}", time.timestamp().strftime("%Y%m%dt%H%M%Sz"))
}

#[tokio::test]
async fn in_seven_months_every_time_is_taken_once_and_a_grandfather_a_father_and_sons_are_left() {
    let spec = json!({"schedule": "0 */3 * * *", "timeZone": "Europe/Vienna",
        "keep": {"hourly": 16, "daily": 7, "weekly": 4, "monthly": 6}});
    let mut cluster = Cluster::new("2025-12-31T23:30:00Z", &spec, vec![vm("a")]);
    cluster.run_until("2026-07-15T08:30:00Z").await;

    let created = cluster.state().created.clone();
    let unique: BTreeSet<&String> = created.iter().collect();
    assert_eq!(
        (unique.len(), created.len()),
        (8 * 195 + 3, 8 * 195 + 3),
        "195 days, but for its first midnight, and a morning"
    );

    // By the calendar: the last two days, the last of each of six days before, three Sundays, five months.
    let zone = TimeZone::get("Europe/Vienna").unwrap();
    let local = |day: k8s_openapi::jiff::civil::Date, hour| day.at(hour, 0, 0, 0).to_zoned(zone.clone()).unwrap();
    let latest = local(date(2026, 7, 15), 9);
    let hours = (0..16).map(|back| latest.checked_sub((3 * back).hours()).unwrap());
    let days = (9..=14).map(|day| local(date(2026, 7, day), 21));
    let sundays = [date(2026, 7, 12), date(2026, 7, 5), date(2026, 6, 28)].map(|day| local(day, 21));
    assert!(sundays.iter().all(|day| day.weekday() == Weekday::Sunday));
    let months = (2..=6).map(|month| local(date(2026, month, 1).last_of_month(), 21));
    let expected: BTreeSet<String> =
        hours.chain(days).chain(sundays).chain(months).map(|time| name_of("a", &time)).collect();
    assert_eq!(cluster.names().into_iter().collect::<BTreeSet<_>>(), expected);
}

#[tokio::test]
async fn a_daily_time_in_the_gap_and_one_that_repeats_are_taken_once_each() {
    let spec = json!({"schedule": "30 2 * * *", "timeZone": "Europe/Vienna"});
    let mut cluster = Cluster::new("2026-03-27T12:00:00Z", &spec, vec![vm("a")]);
    cluster.run_until("2026-03-31T12:00:00Z").await;
    let spring = ["20260328t013000z", "20260329t010000z", "20260330t003000z", "20260331t003000z"];
    assert_eq!(cluster.state().created, spring.map(|time| format!("s-a-{time}")));
    let mut cluster = Cluster::new("2026-10-23T12:00:00Z", &spec, vec![vm("a")]);
    cluster.run_until("2026-10-27T12:00:00Z").await;
    let autumn = ["20261024t003000z", "20261025t003000z", "20261026t013000z", "20261027t013000z"];
    assert_eq!(cluster.state().created, autumn.map(|time| format!("s-a-{time}")));
}

#[tokio::test]
async fn after_weeks_without_an_operator_one_snapshot_is_made_up_for_unless_it_is_too_late() {
    let mut cluster = Cluster::new("2026-01-01T00:30:00Z", &json!({"schedule": "0 2 * * *"}), vec![vm("a")]);
    cluster.run_until("2026-01-03T03:00:00Z").await;
    cluster.settle_at("2026-02-10T15:20:00Z").await;
    assert_eq!(cluster.state().created.last().unwrap(), "s-a-20260210t020000z");
    assert_eq!(cluster.state().created.len(), 3 + 1);

    let spec = json!({"schedule": "0 2 * * *", "startingDeadline": "1h"});
    let mut cluster = Cluster::new("2026-01-01T00:30:00Z", &spec, vec![vm("a")]);
    cluster.run_until("2026-01-03T03:00:00Z").await;
    cluster.settle_at("2026-02-10T03:00:01Z").await;
    assert_eq!(cluster.state().created.len(), 3);
    let told = cluster.schedule().status.unwrap().vms[0].message.clone().unwrap();
    assert!(told.contains("2026-02-10T02:00:00Z was missed"), "{told}");
    cluster.settle_at("2026-02-11T02:59:59Z").await;
    assert_eq!(cluster.state().created.last().unwrap(), "s-a-20260211t020000z");
}

#[tokio::test]
async fn a_clock_that_was_wrong_neither_doubles_a_time_nor_stops_the_schedule() {
    let mut cluster = Cluster::new("2026-01-01T00:30:00Z", &json!({"schedule": "@hourly"}), vec![vm("a")]);
    cluster.run_until("2026-01-01T05:30:00Z").await;
    // Another operator's clock is a year ahead, and is set right; then this one's is two hours behind for a while.
    cluster.settle_at("2027-01-01T05:30:00Z").await;
    cluster.take_all(|_| good());
    cluster.settle_at("2026-01-01T03:40:00Z").await;
    cluster.state().now = at("2026-01-01T05:40:00Z");
    cluster.run_until("2026-01-01T08:30:00Z").await;
    let expected = ["01", "02", "03", "04", "05"].map(|hour| format!("s-a-20260101t{hour}0000z"));
    let later = ["06", "07", "08"].map(|hour| format!("s-a-20260101t{hour}0000z"));
    let wrong = ["s-a-20270101t050000z".to_owned()];
    assert_eq!(cluster.state().created, [expected.as_slice(), &wrong, &later].concat());
}

#[tokio::test]
async fn an_operator_whose_cache_is_behind_makes_no_second_one_and_finds_the_first() {
    let spec = json!({"schedule": "@hourly", "maxConcurrent": 1});
    let mut cluster = Cluster::new("2026-01-01T00:30:00Z", &spec, vec![vm("a"), vm("b")]);
    cluster.settle_at("2026-01-01T00:59:00Z").await;
    cluster.state().now = at("2026-01-01T01:00:00Z");
    cluster.refresh();
    cluster.look().await.unwrap();
    assert_eq!(cluster.state().created, ["s-a-20260101t010000z"], "there is room for one");
    // The status is seen, the snapshot isn't yet: it is asked for, and there is still no room for `b`.
    cluster.look().await.unwrap();
    // Nor is the status.
    cluster.state().schedule["status"] = json!(null);
    cluster.look().await.unwrap();
    let state = cluster.state();
    assert_eq!(state.created, ["s-a-20260101t010000z"]);
    assert!(state.calls.iter().any(|call| call == "GET vmsnapshots/s-a-20260101t010000z"), "{:#?}", state.calls);
}

#[tokio::test]
async fn another_schedules_snapshot_of_the_same_name_is_not_taken_for_ones_own() {
    let mut cluster = Cluster::new("2026-01-01T00:30:00Z", &json!({"schedule": "@hourly"}), vec![vm("a")]);
    let foreign = json!({"metadata": {"name": "s-a-20260101t010000z", "namespace": "shop", "uid": "foreign",
        "resourceVersion": "1"}, "spec": {"vmName": "a"}});
    cluster.state().snapshots.insert("s-a-20260101t010000z".into(), foreign);
    cluster.settle_at("2026-01-01T01:00:00Z").await;
    let state = cluster.state();
    let [own] = &state.created[..] else { panic!("{:?}", state.created) };
    assert!(own.starts_with("s-a-") && own.ends_with("-20260101t010000z"), "{own}");
}

/// Four hours with `keep: {last: 2}`, then a fifth snapshot that is ready but not looked at yet.
async fn about_to_prune() -> Cluster {
    let spec = json!({"schedule": "@hourly", "keep": {"last": 2}});
    let mut cluster = Cluster::new("2026-01-01T00:30:00Z", &spec, vec![vm("a")]);
    cluster.run_until("2026-01-01T04:30:00Z").await;
    assert_eq!(cluster.names(), ["s-a-20260101t030000z", "s-a-20260101t040000z"]);
    cluster.settle_at("2026-01-01T05:00:00Z").await;
    cluster.take_all(|_| good());
    cluster.refresh();
    cluster.state().calls.clear();
    cluster
}

#[tokio::test]
async fn what_goes_is_read_anew_just_before_and_the_user_was_told() {
    let cluster = about_to_prune().await;
    cluster.look().await.unwrap();
    let expected = [
        "PATCH vmsnapshotschedules/s/status",
        "GET vmsnapshotschedules/s",
        "GET vmsnapshots",
        "DELETE vmsnapshots/s-a-20260101t030000z",
    ];
    assert_eq!(cluster.state().calls, expected);
    let plan = cluster.schedule().status.unwrap().plan.remove(0);
    assert_eq!(
        (plan.remove, plan.next),
        (vec!["s-a-20260101t030000z".to_owned()], vec!["s-a-20260101t040000z".to_owned()])
    );
}

#[tokio::test]
async fn what_was_held_or_is_restored_or_failed_meanwhile_is_not_removed_though_the_cache_does_not_know() {
    let oldest = "s-a-20260101t030000z";
    let cluster = about_to_prune().await;
    cluster.state().snapshots.get_mut(oldest).unwrap()["spec"]["hold"] = json!(true);
    cluster.look().await.unwrap();
    assert!(cluster.names().contains(&oldest.to_owned()), "held");

    let cluster = about_to_prune().await;
    cluster.state().restores = json!([{"metadata": {"name": "r"}, "spec": {"snapshotName": oldest}}]);
    cluster.look().await.unwrap();
    assert!(cluster.names().contains(&oldest.to_owned()), "restored");

    let cluster = about_to_prune().await;
    cluster.state().snapshots.get_mut("s-a-20260101t050000z").unwrap()["status"] = json!({"phase": "Failed"});
    cluster.look().await.unwrap();
    assert!(cluster.names().contains(&oldest.to_owned()), "the last two good ones are others now");

    let cluster = about_to_prune().await;
    cluster.state().class["metadata"]["annotations"]["freezeframe.dev/paused"] = json!("true");
    cluster.look().await.unwrap();
    assert!(cluster.names().contains(&oldest.to_owned()), "all is paused now");

    let cluster = about_to_prune().await;
    let seen = cluster.schedule();
    cluster.state().schedule["metadata"]["generation"] = json!(2);
    cluster.look_at(seen).await.unwrap();
    assert!(cluster.names().contains(&oldest.to_owned()), "the rules are others now");
}

#[tokio::test]
async fn a_hold_that_comes_between_the_list_and_the_deletion_is_respected() {
    let cluster = about_to_prune().await;
    cluster.state().before_deletion = Some(|state| {
        let snapshot = state.snapshots.get_mut("s-a-20260101t030000z").unwrap();
        snapshot["spec"]["hold"] = json!(true);
        snapshot["metadata"]["resourceVersion"] = json!("9999");
    });
    let error = cluster.look().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(cluster.names().contains(&"s-a-20260101t030000z".to_owned()));
}

#[tokio::test]
async fn the_plan_says_what_a_restore_needs() {
    let mut cluster = about_to_prune().await;
    let needed = "s-a-20260101t030000z";
    cluster.state().restores = json!([
        {"metadata": {"name": "r", "namespace": "shop"}, "spec": {"snapshotName": needed}, "status": {"phase": "Planned"}},
        {"metadata": {"name": "r", "namespace": "bank"}, "spec": {"snapshotName": "s-a-20260101t040000z"}},
    ]);
    cluster.settle().await;
    let plan = cluster.schedule().status.unwrap().plan.remove(0);
    let reasons: Vec<_> = plan.keep.into_iter().map(|kept| (kept.name, kept.reasons)).collect();
    assert_eq!(reasons[2], (needed.to_owned(), vec!["restore".to_owned()]));
    assert_eq!(reasons[1].1, ["last"], "a restore of another namespace protects nothing here");
}

#[tokio::test]
async fn a_finished_restore_protects_nothing_any_more() {
    let cluster = about_to_prune().await;
    let restore = |phase: &str| {
        json!({"metadata": {"name": phase.to_lowercase()}, "status": {"phase": phase},
        "spec": {"snapshotName": "s-a-20260101t030000z"}})
    };
    cluster.state().restores = json!([restore("Succeeded"), restore("Failed")]);
    cluster.look().await.unwrap();
    assert_eq!(cluster.names(), ["s-a-20260101t040000z", "s-a-20260101t050000z"]);
}

#[tokio::test]
async fn while_every_snapshot_fails_the_good_ones_stay_and_the_failed_ones_are_few() {
    let spec = json!({"schedule": "@hourly", "keep": {"last": 2}, "failedHistoryLimit": 1});
    let mut cluster = Cluster::new("2026-01-01T00:30:00Z", &spec, vec![vm("a")]);
    cluster.run_until("2026-01-01T03:30:00Z").await;
    for hour in 4..20 {
        cluster.settle_at(&format!("2026-01-01T{hour:02}:00:00Z")).await;
        cluster.take_all(|_| json!({"phase": "Failed"}));
        cluster.settle().await;
    }
    assert_eq!(cluster.names(), ["s-a-20260101t020000z", "s-a-20260101t030000z", "s-a-20260101t190000z"]);
    let status = cluster.schedule().status.unwrap();
    assert_eq!(status.last_successful_time.unwrap().0, at("2026-01-01T03:00:00Z"));
    let protected = status.conditions.iter().find(|condition| condition.type_ == "Protected").unwrap();
    assert_eq!((protected.status.as_str(), protected.reason.as_str()), ("False", "SnapshotFailed"));
}

#[tokio::test]
async fn snapshots_are_owned_by_their_schedule_as_its_policy_says_whenever_it_says_so() {
    let mut cluster = Cluster::new("2026-01-01T00:30:00Z", &json!({"schedule": "@hourly"}), vec![vm("a")]);
    let owner = |cluster: &Cluster| {
        let state = cluster.state();
        state.snapshots["s-a-20260101t010000z"]["metadata"]["ownerReferences"][0]["uid"].clone()
    };
    cluster.settle_at("2026-01-01T01:00:00Z").await;
    assert_eq!(owner(&cluster), json!(null));
    for (policy, expected) in [("Delete", json!("uid-s")), ("Orphan", json!(null))] {
        cluster.state().schedule["spec"]["deletionPolicy"] = json!(policy);
        cluster.settle().await;
        assert_eq!(owner(&cluster), expected, "{policy}");
    }
}

#[tokio::test]
async fn while_creations_are_refused_retention_goes_on_and_the_status_says_so() {
    let mut cluster = Cluster::new("2026-01-01T00:30:00Z", &json!({"schedule": "@hourly"}), vec![vm("a"), vm("b")]);
    cluster.run_until("2026-01-01T03:30:00Z").await;
    cluster.state().schedule["spec"]["keep"] = json!({"last": 1});
    cluster.state().quota = 6;
    cluster.state().now = at("2026-01-01T04:00:00Z");
    cluster.refresh();
    assert_eq!(cluster.look().await.unwrap_err().kind(), ErrorKind::Refused);
    assert_eq!(cluster.names(), ["s-a-20260101t030000z", "s-b-20260101t030000z"]);
    let status = cluster.schedule().status.unwrap();
    assert_eq!(status.vms[1].last_schedule_time.as_ref().unwrap().0, at("2026-01-01T03:00:00Z"));
    assert!(status.vms[1].message.as_ref().unwrap().contains("creating a snapshot"), "{:?}", status.vms);
    assert_eq!(status.active_count, 0);
    let protected = status.conditions.iter().find(|condition| condition.type_ == "Protected").unwrap();
    assert_eq!((protected.status.as_str(), protected.reason.as_str()), ("False", "SnapshotFailed"));

    cluster.settle().await;
    assert!(cluster.names().contains(&"s-b-20260101t040000z".to_owned()), "{:?}", cluster.names());
    assert_eq!(cluster.schedule().status.unwrap().vms[1].message, None);
}

#[tokio::test]
async fn a_vm_whose_snapshots_are_always_refused_takes_no_place_of_the_others() {
    let spec = json!({"schedule": "@hourly", "maxConcurrent": 1});
    let mut cluster = Cluster::new("2026-01-01T00:30:00Z", &spec, ["a", "b", "c", "d"].map(vm).into());
    cluster.state().denied = vec!["a", "b"];
    for (vm, now) in [("c", "2026-01-01T01:00:00Z"), ("d", "2026-01-01T01:00:05Z")] {
        cluster.state().now = at(now);
        cluster.refresh();
        assert_eq!(cluster.look().await.unwrap_err().kind(), ErrorKind::Refused);
        let status = cluster.schedule().status.unwrap();
        let active: Vec<_> = status.vms.iter().filter(|vm| !vm.active.is_empty()).map(|vm| vm.name.as_str()).collect();
        assert_eq!((active, status.active_count), (vec![vm], 1), "{:?}", status.vms);
        let told = status.vms.iter().find(|told| told.name == vm).unwrap();
        assert_eq!((told.message.clone(), told.last_schedule_time.is_some()), (None, true));
        assert!(status.vms[0].message.as_ref().unwrap().contains("creating a snapshot"), "{:?}", status.vms);
        cluster.take_all(|_| good());
    }
    assert_eq!(cluster.names(), ["s-c-20260101t010000z", "s-d-20260101t010000z"]);
}

#[tokio::test]
async fn a_refusal_that_stays_is_told_once() {
    let mut cluster = Cluster::new("2026-01-01T00:30:00Z", &json!({"schedule": "@hourly"}), vec![vm("a")]);
    cluster.state().quota = 0;
    for now in ["2026-01-01T01:00:00Z", "2026-01-01T01:00:05Z", "2026-01-01T01:00:15Z"] {
        cluster.state().now = at(now);
        cluster.refresh();
        assert!(cluster.look().await.is_err());
    }
    let writes = cluster.state().calls.iter().filter(|call| call.ends_with("/status")).count();
    assert_eq!(writes, 1, "{:#?}", cluster.state().calls);
}

#[tokio::test]
async fn a_node_whose_clock_is_wrong_loses_no_new_snapshot_to_retention() {
    for wrong in ["2025-06-01T00:00:00.000000Z", "2027-06-01T00:00:00.000000Z"] {
        let spec = json!({"schedule": "@hourly", "keep": {"last": 2}});
        let mut cluster = Cluster::new("2026-01-01T00:30:00Z", &spec, vec![vm("a")]);
        cluster.run_until("2026-01-01T03:30:00Z").await;
        for hour in 4..6 {
            cluster.settle_at(&format!("2026-01-01T{hour:02}:00:00Z")).await;
            cluster.take_all(|_| good());
            for snapshot in cluster.state().snapshots.values_mut() {
                if snapshot["status"]["creationTime"].as_str() >= Some("2026-01-01T04") {
                    snapshot["status"]["creationTime"] = json!(wrong);
                }
            }
            cluster.settle().await;
        }
        assert_eq!(cluster.names(), ["s-a-20260101t040000z", "s-a-20260101t050000z"], "{wrong}");
    }
}
