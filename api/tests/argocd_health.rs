//! Argo CD's view of our kinds: the very scripts of `examples/gitops/argocd/health.yaml`, run on objects of each state by
//! the language that Argo CD has, Lua 5.1.
#![allow(clippy::unwrap_used, reason = "a test's helpers may stop it")]

use std::collections::BTreeSet;

use freezeframe_api::crds;
use mlua::{Lua, LuaSerdeExt as _};
use serde_json::{Value, json};

const FILE: &str = include_str!("../../examples/gitops/argocd/health.yaml");
const PREFIX: &str = "resource.customizations.health.freezeframe.dev_";

fn scripts() -> serde_json::Map<String, Value> {
    let file: Value = serde_yaml::from_str(FILE).unwrap();
    file["data"].as_object().unwrap().clone()
}

/// What Argo CD would show for the object.
fn health(object: &Value) -> (String, String) {
    let kind = object["kind"].as_str().unwrap();
    let scripts = scripts();
    let lua = Lua::new();
    // Argo CD gives a script no more of the world than this.
    lua.globals().set("obj", lua.to_value(object).unwrap()).unwrap();
    let answer = lua.load(scripts[&format!("{PREFIX}{kind}")].as_str().unwrap()).eval::<mlua::Table>().unwrap();
    (answer.get("status").unwrap(), answer.get("message").unwrap())
}

fn object(kind: &str, status: &Value) -> Value {
    let mut object = json!({"apiVersion": "freezeframe.dev/v1alpha1", "kind": kind,
        "metadata": {"name": "one", "namespace": "shop", "generation": 2}, "spec": {}});
    if !status.is_null() {
        object["status"] = status.clone();
    }
    object
}

fn condition(type_: &str, status: &str, reason: &str, message: &str) -> Value {
    json!({"type": type_, "status": status, "reason": reason, "message": message})
}

fn check(kind: &str, rows: Vec<(Value, &str, &str)>) {
    for (status, expected, message) in rows {
        assert_eq!(health(&object(kind, &status)), (expected.to_owned(), message.to_owned()), "{kind} {status}");
    }
}

#[test]
fn every_kind_has_a_script() {
    let kinds = crds::all().into_iter().map(|crd| format!("{PREFIX}{}", crd.spec.names.kind));
    let with_script: BTreeSet<String> = scripts().into_iter().map(|(name, _)| name).collect();
    let without: Vec<String> = kinds.filter(|kind| !with_script.contains(kind)).collect();
    assert_eq!(without, [""; 0]);
}

#[test]
fn a_snapshot() {
    let ready = condition("Ready", "True", "Completed", "Done.");
    let waiting = condition("Ready", "False", "Queued", "");
    let stalled = condition("Stalled", "True", "NoSpace", "The disk is full.");
    check(
        "VMSnapshot",
        vec![
            (Value::Null, "Progressing", "The operator has not seen it yet."),
            (json!({"phase": "Pending", "message": "Waits.", "conditions": [waiting]}), "Progressing", "Waits."),
            (
                json!({"phase": "Ready", "message": "Done.", "conditions": [ready], "observedGeneration": 2}),
                "Healthy",
                "Done.",
            ),
            (
                json!({"phase": "Ready", "conditions": [ready], "observedGeneration": 1}),
                "Progressing",
                "The operator has not seen the change yet.",
            ),
            (json!({"phase": "Failed", "conditions": [waiting, stalled]}), "Degraded", "The disk is full."),
            (json!({"phase": "Deleting", "message": "Held.", "conditions": [ready]}), "Progressing", "Held."),
        ],
    );
}

#[test]
fn a_schedule() {
    let ready = |reason| condition("Ready", "True", reason, "Said of Ready.");
    let stalled = condition("Stalled", "True", "InvalidSchedule", "Never comes.");
    let failed = condition("Protected", "False", "SnapshotFailed", "");
    let none_yet = condition("Protected", "False", "NoSnapshot", "");
    check(
        "VMSnapshotSchedule",
        vec![
            (Value::Null, "Progressing", "The operator has not seen it yet."),
            (json!({"message": "Runs.", "conditions": [none_yet, ready("Scheduled")]}), "Healthy", "Runs."),
            (
                json!({"message": "db-1 failed.", "conditions": [failed, ready("Scheduled")]}),
                "Degraded",
                "db-1 failed.",
            ),
            (json!({"conditions": [ready("Scheduled"), failed]}), "Degraded", ""),
            (json!({"conditions": [failed, ready("Suspended")]}), "Suspended", "Said of Ready."),
            (json!({"conditions": [ready("Paused")]}), "Suspended", "Said of Ready."),
            (
                json!({"conditions": [condition("Ready", "False", "InvalidSchedule", ""), stalled]}),
                "Degraded",
                "Never comes.",
            ),
            (
                json!({"observedGeneration": 1, "conditions": [ready("Scheduled")]}),
                "Progressing",
                "The operator has not seen the change yet.",
            ),
        ],
    );
}

#[test]
fn a_restore() {
    let stalled = condition("Stalled", "True", "NotConfirmed", "No such snapshot.");
    check(
        "VMRestore",
        vec![
            (Value::Null, "Progressing", "The operator has not seen it yet."),
            (json!({"phase": "Pending"}), "Progressing", ""),
            (json!({"phase": "Restoring", "message": "40 %"}), "Progressing", "40 %"),
            (json!({"phase": "Succeeded"}), "Healthy", ""),
            (json!({"phase": "Planned"}), "Healthy", ""),
            (json!({"phase": "Deleting", "observedGeneration": 1, "message": "Goes."}), "Progressing", "Goes."),
            (json!({"phase": "Failed", "message": "The disk is full."}), "Degraded", "The disk is full."),
            (json!({"phase": "Pending", "conditions": [stalled]}), "Degraded", "No such snapshot."),
        ],
    );
}

#[test]
fn what_nodes_report() {
    let not_ready = condition("Ready", "False", "CopyFailed", "QEMU says no.");
    check(
        "VMSnapshotContent",
        vec![
            (Value::Null, "Progressing", "The node has not reported yet."),
            (json!({"phase": "Completing"}), "Progressing", ""),
            (json!({"phase": "Ready"}), "Healthy", ""),
            (json!({"phase": "Failed", "conditions": [not_ready]}), "Degraded", "QEMU says no."),
            (json!({"phase": "Removed"}), "Progressing", ""),
        ],
    );
    check(
        "VMRestoreContent",
        vec![
            (Value::Null, "Progressing", "The node has not reported yet."),
            (json!({"phase": "Planned"}), "Progressing", ""),
            (json!({"phase": "Restoring"}), "Progressing", ""),
            (json!({"phase": "Succeeded"}), "Healthy", ""),
            (json!({"phase": "Failed", "conditions": [not_ready]}), "Degraded", "QEMU says no."),
        ],
    );
    let mut dry_run = object("VMRestoreContent", &json!({"phase": "Planned"}));
    dry_run["spec"]["step"] = json!("Plan");
    assert_eq!(health(&dry_run).0, "Healthy", "that is all that was asked");
    check(
        "VMTarget",
        vec![
            (Value::Null, "Progressing", "No node has reported on it yet."),
            (json!({"runState": "Running", "conditions": [condition("Ready", "True", "", "")]}), "Healthy", ""),
            (json!({"runState": "Stopped"}), "Suspended", "The VM doesn't run."),
            (json!({"runState": "Unknown", "message": "No answer."}), "Degraded", "No answer."),
        ],
    );
}

#[test]
fn a_class() {
    let mut class = object("VMSnapshotClass", &Value::Null);
    assert_eq!(health(&class).0, "Healthy");
    class["metadata"]["annotations"] = json!({"freezeframe.dev/paused": "true"});
    assert_eq!(health(&class).0, "Suspended");
}
