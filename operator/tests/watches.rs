//! Which change wakes which snapshot, by the calls that follow it. Each change comes by its watch only after the operator
//! has said what it waits for, and well before it would look again by itself.
#![allow(clippy::unwrap_used, reason = "a test's helpers may stop it")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use freezeframe_api::v1alpha1::VMSnapshot;
use freezeframe_operator::caches::Caches;
use freezeframe_operator::context::Context;
use freezeframe_operator::controllers;
use freezeframe_operator::metrics::Metrics;
use http::Method;
use serde_json::{Value, json};
use support::objects::{class, content, finalized, fresh, ready, target};
use support::{Call, Server, server};
use tokio_util::sync::CancellationToken;

/// What the server has when the operator starts, by plural.
type Lists = [(&'static str, Value); 7];

fn lists(snapshots: &[VMSnapshot], contents: Value, targets: Value, classes: Value) -> Lists {
    [
        ("vmsnapshots", json!(snapshots)),
        ("vmsnapshotcontents", contents),
        ("vmtargets", targets),
        ("vmsnapshotclasses", classes),
        ("vmsnapshotschedules", json!([])),
        ("vmrestores", json!([])),
        ("vmrestorecontents", json!([])),
    ]
}

/// Plays the server: sends the change to the watchers of its kind when the first reason was written to a status, and
/// returns with the call that `wanted` says yes to after that.
async fn play(mut server: Server, lists: Lists, first: &str, change: (&str, Value), wanted: fn(&Call) -> bool) {
    let (mut waits, mut changed, mut silent) = (false, false, vec![]);
    let mut watch: Option<Call> = None;
    loop {
        let call = server.next().await;
        if changed && wanted(&call) {
            return;
        }
        waits |= call.method == Method::PATCH && call.body.to_string().contains(first);
        match call.path.rsplit('/').next().unwrap() {
            plural if call.query.contains("watch=true") => {
                if plural == change.0 && watch.is_none() {
                    watch = Some(call);
                } else {
                    silent.push(call);
                }
            }
            plural if call.method == Method::GET && lists.iter().any(|(listed, _)| *listed == plural) => {
                let items = &lists.iter().find(|(listed, _)| *listed == plural).unwrap().1;
                call.answer(&json!({"metadata": {"resourceVersion": "1"}, "items": items}));
            }
            _ if call.method == Method::PATCH => {
                let objects = lists.iter().flat_map(|(_, objects)| objects.as_array().unwrap());
                let named = |object: &&Value| call.path.contains(object["metadata"]["name"].as_str().unwrap());
                let written = objects.rev().find(named).unwrap().clone();
                call.answer(&written);
            }
            _ => call.fail(503, "ServiceUnavailable"),
        }
        if waits
            && !changed
            && let Some(watch) = watch.take()
        {
            watch.answer(&change.1);
            changed = true;
        }
    }
}

async fn wakes(lists: Lists, first: &str, change: (&str, Value), wanted: fn(&Call) -> bool) {
    let (client, server) = server();
    let (caches, sources) = Caches::new();
    let ctx = Arc::new(Context::new(client, caches, Metrics::default(), None));
    tokio::select! {
        () = controllers::run(ctx, sources, CancellationToken::new()) => panic!("the controllers ended"),
        () = play(server, lists, first, change, wanted) => {}
        () = tokio::time::sleep(Duration::from_secs(15)) => panic!("nothing followed"),
    }
}

fn starts_a(call: &Call) -> bool {
    call.is(&Method::PATCH, "/vmsnapshots/a")
}

#[tokio::test]
async fn a_vm_that_appears_starts_the_snapshot_that_waits_for_it() {
    let lists = lists(&[fresh()], json!([]), json!([]), json!([class()]));
    let change = ("vmtargets", json!({"type": "ADDED", "object": target()}));
    wakes(lists, "VMNotFound", change, starts_a).await;
}

#[tokio::test]
async fn a_class_that_appears_starts_the_snapshot_that_waits_for_it() {
    let lists = lists(&[fresh()], json!([]), json!([target()]), json!([]));
    let change = ("vmsnapshotclasses", json!({"type": "ADDED", "object": class()}));
    wakes(lists, "NoDefaultClass", change, starts_a).await;
}

#[tokio::test]
async fn a_report_of_a_node_is_carried_to_the_snapshot() {
    let lists = lists(&[finalized(fresh())], json!([content()]), json!([target()]), json!([class()]));
    let change = ("vmsnapshotcontents", json!({"type": "MODIFIED", "object": ready()}));
    let shows_it = |call: &Call| {
        call.is(&Method::PATCH, "/vmsnapshots/a/status") && call.body["status"]["readyToUse"] == json!(true)
    };
    wakes(lists, "Preparing", change, shows_it).await;
}

#[tokio::test]
async fn a_snapshot_that_goes_lets_the_next_one_of_its_vm_start() {
    let mut first = fresh();
    (first.metadata.name, first.metadata.uid) = (Some("first".into()), Some("uid-0".into()));
    first.spec.class_name = Some("standard".into());
    let lists = lists(&[fresh(), first.clone()], json!([]), json!([target()]), json!([class()]));
    let change = ("vmsnapshots", json!({"type": "DELETED", "object": first}));
    wakes(lists, "Queued", change, starts_a).await;
}

/// A schedule without a VM, and the lists that go with it.
fn with_schedule() -> Lists {
    let mut lists = lists(&[], json!([]), json!([]), json!([class()]));
    let metadata = json!({"name": "nightly", "namespace": "shop", "uid": "uid-s", "resourceVersion": "1",
        "creationTimestamp": "2026-01-01T00:00:00Z"});
    let (_, schedules) = lists.iter_mut().find(|(plural, _)| *plural == "vmsnapshotschedules").unwrap();
    *schedules = json!([{"metadata": metadata, "spec": {"schedule": "0 0 1 1 *", "suspend": false}}]);
    lists
}

#[tokio::test]
async fn a_vm_that_appears_is_taken_by_the_schedule_of_its_namespace() {
    let change = ("vmtargets", json!({"type": "ADDED", "object": target()}));
    let counts_it = |call: &Call| {
        call.is(&Method::PATCH, "/vmsnapshotschedules/nightly/status") && call.body["status"]["vmCount"] == json!(1)
    };
    wakes(with_schedule(), "No VM is selected", change, counts_it).await;
}

#[tokio::test]
async fn a_class_that_is_paused_stops_the_schedule() {
    let mut paused = class();
    paused.metadata.annotations.get_or_insert_default().insert("freezeframe.dev/paused".into(), "true".into());
    let change = ("vmsnapshotclasses", json!({"type": "MODIFIED", "object": paused}));
    let says_so = |call: &Call| {
        call.is(&Method::PATCH, "/vmsnapshotschedules/nightly/status") && call.body.to_string().contains("is paused")
    };
    wakes(with_schedule(), "No VM is selected", change, says_so).await;
}
