//! Objects for unit tests. Times are seconds after the first snapshot's creation.
#![allow(clippy::unwrap_used, reason = "a test's fixtures may stop it")]

use freezeframe_api::v1alpha1::{
    ContentPhase, Phase, VMSnapshot, VMSnapshotClass, VMSnapshotContent, VMSnapshotContentStatus, VMSnapshotStatus,
    VMTarget,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use serde_json::json;

/// Long enough ago that every deadline has passed by the real clock.
const EPOCH: i64 = 1_000_000_000;

pub fn at(second: i64) -> Timestamp {
    Timestamp::from_second(EPOCH + second).unwrap()
}

/// A snapshot of VM `db-1`, by the default class, with a deadline of 60 s.
pub fn snapshot(name: &str) -> VMSnapshot {
    snapshot_created(name, at(0))
}

pub fn snapshot_created(name: &str, created: Timestamp) -> VMSnapshot {
    serde_json::from_value(json!({
        "apiVersion": "freezeframe.dev/v1alpha1",
        "kind": "VMSnapshot",
        "metadata": {
            "name": name, "namespace": "shop", "uid": format!("uid-{name}"), "resourceVersion": "100",
            "generation": 1, "creationTimestamp": Time(created),
        },
        "spec": {"vmName": "db-1", "failureDeadline": "60s"},
    }))
    .unwrap()
}

/// The content that the operator makes of the snapshot with class `standard` on `node-a`.
pub fn content(snapshot: &VMSnapshot) -> VMSnapshotContent {
    let deadline = snapshot.metadata.creation_timestamp.as_ref().unwrap().0 + std::time::Duration::from_secs(60);
    serde_json::from_value(json!({
        "apiVersion": "freezeframe.dev/v1alpha1",
        "kind": "VMSnapshotContent",
        "metadata": {
            "name": content_name(snapshot), "uid": "uid-content", "resourceVersion": "200",
            "finalizers": ["freezeframe.dev/content"],
            "labels": {
                "freezeframe.dev/snapshot-namespace": "shop",
                "freezeframe.dev/snapshot-name": snapshot.metadata.name,
            },
        },
        "spec": {
            "nodeName": "node-a",
            "vmSnapshotRef": {
                "namespace": "shop", "name": snapshot.metadata.name, "uid": snapshot.metadata.uid,
            },
            "vmName": "db-1",
            "className": "standard",
            "drivers": [{"name": "overlay"}],
            "consistency": {}, "quiesce": {},
            "deadline": Time(deadline),
        },
    }))
    .unwrap()
}

pub fn content_name(snapshot: &VMSnapshot) -> String {
    format!("vmsnap-{}", snapshot.metadata.uid.as_deref().unwrap())
}

/// A content on which its node has reported: one disk, and condition Ready with the reason.
pub fn reported(snapshot: &VMSnapshot, phase: ContentPhase, reason: &str) -> VMSnapshotContent {
    let (ready, disk) = match phase {
        ContentPhase::Ready => ("True", "Ready"),
        ContentPhase::Completing => ("False", "Copying"),
        ContentPhase::Failed => ("False", "Failed"),
        ContentPhase::Removed => ("False", "Removed"),
    };
    let condition = |type_: &str, status: &str, reason: &str| {
        json!({"type": type_, "status": status, "reason": reason, "message": format!("The node says {reason}."),
            "lastTransitionTime": Time(at(10))})
    };
    let status: VMSnapshotContentStatus = serde_json::from_value(json!({
        "phase": phase,
        "creationTime": "2001-09-09T01:46:45.123456Z",
        "consistency": {"level": "Filesystem", "frozenFilesystems": 3, "thawedFilesystems": 3, "holdMillis": 11},
        "disks": [{"name": "vda", "driver": "overlay", "sizeBytes": 1024, "state": disk, "handle": "/vm/disk.qcow2"}],
        "conditions": [condition("Quiesced", "True", "Proved"), condition("Ready", ready, reason)],
    }))
    .unwrap();
    VMSnapshotContent { status: Some(status), ..content(snapshot) }
}

pub fn class(name: &str, default: bool) -> VMSnapshotClass {
    let annotations = if default { json!({"freezeframe.dev/is-default-class": "true"}) } else { json!({}) };
    serde_json::from_value(json!({
        "metadata": {"name": name, "annotations": annotations},
        "spec": {"drivers": [{"name": "overlay"}]},
    }))
    .unwrap()
}

/// VM `db-1` on `node-a`.
pub fn target(run_state: &str) -> VMTarget {
    serde_json::from_value(json!({
        "metadata": {"name": "db-1", "namespace": "shop"},
        "spec": {},
        "status": {"nodeName": "node-a", "runState": run_state},
    }))
    .unwrap()
}

/// Changes to a snapshot, to be chained.
pub trait SnapshotExt {
    fn status(self, status: VMSnapshotStatus) -> Self;
    fn phase(self, phase: Phase) -> Self;
    fn finalized(self) -> Self;
    fn deleted(self) -> Self;
}

impl SnapshotExt for VMSnapshot {
    fn status(mut self, status: VMSnapshotStatus) -> Self {
        self.status = Some(status);
        self
    }

    fn phase(mut self, phase: Phase) -> Self {
        self.status.get_or_insert_default().phase = phase;
        self
    }

    fn finalized(mut self) -> Self {
        self.metadata.finalizers = Some(vec!["freezeframe.dev/snapshot".into()]);
        self
    }

    fn deleted(mut self) -> Self {
        self.metadata.deletion_timestamp = Some(Time(at(30)));
        self
    }
}

/// Marks a content as being deleted.
pub fn deleted(mut content: VMSnapshotContent) -> VMSnapshotContent {
    content.metadata.deletion_timestamp = Some(Time(at(30)));
    content
}
