//! The work order that a snapshot becomes. Pure.

use std::collections::BTreeMap;

use freezeframe_api::names::NodeName;
use freezeframe_api::v1alpha1::{
    SnapshotRef, VMSnapshot, VMSnapshotClass, VMSnapshotContent, VMSnapshotContentSpec, VMSnapshotSpec,
};
use freezeframe_api::{CONTENT_FINALIZER, SNAPSHOT_NAME_LABEL, SNAPSHOT_NAMESPACE_LABEL};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use kube::core::ObjectMeta;

/// Longest value of a label, in characters.
const LABEL_LENGTH: usize = 63;

/// The name of the content of the snapshot with that UID.
pub fn content_name(snapshot_uid: &str) -> String {
    format!("vmsnap-{snapshot_uid}")
}

/// The instant after which no cut may be made for the snapshot.
pub fn deadline(snapshot: &VMSnapshot) -> Timestamp {
    let created = snapshot.metadata.creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0);
    let limit = std::time::Duration::from(snapshot.spec.failure_deadline);
    created.checked_add(limit).unwrap_or(Timestamp::MAX)
}

/// The content that has the node do what the snapshot asks.
pub fn content(snapshot: &VMSnapshot, class: &VMSnapshotClass, node: &NodeName) -> VMSnapshotContent {
    // No `..`: a new field of a snapshot doesn't compile until it is carried over, or left out on purpose.
    let VMSnapshotSpec {
        vm_name,
        class_name: _,
        consistency,
        quiesce,
        disks,
        failure_deadline: _,
        deletion_policy,
        hold: _,
    } = snapshot.spec.clone();
    let vm_snapshot_ref = SnapshotRef {
        namespace: snapshot.namespace().unwrap_or_default(),
        name: snapshot.name_any(),
        uid: snapshot.uid().unwrap_or_default(),
    };
    VMSnapshotContent {
        metadata: metadata(&vm_snapshot_ref),
        spec: VMSnapshotContentSpec {
            node_name: node.clone(),
            vm_snapshot_ref,
            vm_name,
            class_name: Some(class.name_any()),
            drivers: class.spec.drivers.clone(),
            consistency,
            quiesce,
            disks,
            verify: class.spec.verify,
            limits: class.spec.limits.clone(),
            deadline: Time(deadline(snapshot)),
            deletion_policy: deletion_policy.unwrap_or(class.spec.deletion_policy),
        },
        status: None,
    }
}

fn metadata(snapshot: &SnapshotRef) -> ObjectMeta {
    ObjectMeta {
        name: Some(content_name(&snapshot.uid)),
        labels: Some(BTreeMap::from([
            (SNAPSHOT_NAMESPACE_LABEL.to_owned(), snapshot.namespace.clone()),
            (SNAPSHOT_NAME_LABEL.to_owned(), label_value(&snapshot.name)),
        ])),
        finalizers: Some(vec![CONTENT_FINALIZER.to_owned()]),
        ..ObjectMeta::default()
    }
}

/// A name cut to a label's length; a label must not end with what a name may have in its middle.
#[must_use]
pub fn label_value(name: &str) -> String {
    let cut: String = name.chars().take(LABEL_LENGTH).collect();
    cut.trim_end_matches(['-', '.']).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_name_is_cut_to_a_valid_label_value() {
        let name = format!("{}-{}", "a".repeat(62), "b".repeat(20));
        assert_eq!(label_value(&name), "a".repeat(62));
        assert_eq!(label_value("nightly"), "nightly");
    }
}
