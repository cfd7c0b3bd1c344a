//! Objects as the server would have them: snapshot `a` of VM `db-1`, and what belongs to it.

use freezeframe_api::v1alpha1::{VMSnapshot, VMSnapshotClass, VMSnapshotContent, VMTarget};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

/// A snapshot that was just created, with a deadline of 60 s.
pub fn fresh() -> VMSnapshot {
    created(Timestamp::from_second(Timestamp::now().as_second()).unwrap())
}

/// A snapshot whose deadline has long passed.
pub fn overdue() -> VMSnapshot {
    created("2001-09-09T01:46:40Z".parse().unwrap())
}

fn created(at: Timestamp) -> VMSnapshot {
    serde_json::from_value(json!({
        "metadata": {"name": "a", "namespace": "shop", "uid": "uid-a", "resourceVersion": "100", "generation": 1,
            "creationTimestamp": Time(at)},
        "spec": {"vmName": "db-1", "failureDeadline": "60s"},
    }))
    .unwrap()
}

pub fn finalized(mut snapshot: VMSnapshot) -> VMSnapshot {
    snapshot.metadata.finalizers = Some(vec!["freezeframe.dev/snapshot".into()]);
    snapshot
}

pub fn deleted<K: kube::Resource>(mut object: K) -> K {
    object.meta_mut().deletion_timestamp = Some(Time(Timestamp::now()));
    object
}

/// The work order for node `node-a`.
pub fn content() -> VMSnapshotContent {
    serde_json::from_value(json!({
        "metadata": {"name": "vmsnap-uid-a", "uid": "uid-content", "resourceVersion": "200",
            "finalizers": ["freezeframe.dev/content"]},
        "spec": {
            "nodeName": "node-a", "vmName": "db-1", "deadline": "2001-09-09T01:47:40Z",
            "vmSnapshotRef": {"namespace": "shop", "name": "a", "uid": "uid-a"}, "consistency": {}, "quiesce": {},
        },
    }))
    .unwrap()
}

/// The work order when its node has reported this phase, and this condition.
pub fn reported(phase: &str, type_: &str, status: &str, reason: &str) -> VMSnapshotContent {
    let disk =
        json!({"name": "vda", "driver": "overlay", "sizeBytes": 1024, "state": "Ready", "handle": "/vm/disk.qcow2"});
    let condition = json!({"type": type_, "status": status, "reason": reason, "message": "",
        "lastTransitionTime": "2001-09-09T01:46:45Z"});
    let status: Value = json!({"phase": phase, "disks": [disk], "conditions": [condition]});
    VMSnapshotContent { status: Some(serde_json::from_value(status).unwrap()), ..content() }
}

/// The work order when its node is done.
pub fn ready() -> VMSnapshotContent {
    reported("Ready", "Ready", "True", "Completed")
}

/// The default class.
pub fn class() -> VMSnapshotClass {
    serde_json::from_value(json!({
        "metadata": {"name": "standard", "resourceVersion": "300", "annotations": {"freezeframe.dev/is-default-class": "true"}},
        "spec": {"drivers": [{"name": "overlay"}]},
    }))
    .unwrap()
}

/// The VM, running on `node-a`.
pub fn target() -> VMTarget {
    serde_json::from_value(json!({
        "metadata": {"name": "db-1", "namespace": "shop", "resourceVersion": "400"}, "spec": {},
        "status": {"nodeName": "node-a", "runState": "Running"},
    }))
    .unwrap()
}
