//! `VMSnapshotContent`: the work order for one node, and the record of what was made there.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, MicroTime, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    BootCheck, ClassDriver, Consistency, ConsistencyEvidence, DeletionPolicy, DiskSelection, DiskSnapshot, Limits,
    Quiesce, Verify,
};
use crate::names::NodeName;

/// The snapshot that a content belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SnapshotRef {
    /// Namespace of the VMSnapshot, and so of its VM.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub namespace: String,
    /// Name of the VMSnapshot.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// UID of the VMSnapshot: another one of the same name is another snapshot.
    #[schemars(length(min = 1, max = 63))]
    pub uid: String,
}

/// How far the node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ContentPhase {
    /// The cut is done; data is still being copied or checked.
    Completing,
    /// Every disk's data is complete and verified.
    Ready,
    /// Failed for good; what was made was taken back, unless it had been complete before: then what is left of it stays
    /// until the snapshot is deleted.
    Failed,
    /// After deletion: what was made is gone, or was kept on purpose.
    Removed,
}

/// Work order for the agent of one node. Written by the operator; immutable but for `deletionPolicy`.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "freezeframe.dev",
    version = "v1alpha1",
    kind = "VMSnapshotContent",
    plural = "vmsnapshotcontents",
    shortname = "vmsnapc",
    category = "freezeframe",
    status = "VMSnapshotContentStatus",
    derive = "PartialEq",
    doc = "The work order for one node and the record of what was made there. Written by the operator and the node's agent.",
    selectable = ".spec.nodeName",
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.nodeName"),
    printcolumn(name = "Namespace", type_ = "string", json_path = ".spec.vmSnapshotRef.namespace"),
    printcolumn(name = "Snapshot", type_ = "string", json_path = ".spec.vmSnapshotRef.name"),
    printcolumn(name = "VM", type_ = "string", json_path = ".spec.vmName"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "DeletionPolicy", type_ = "string", json_path = ".spec.deletionPolicy"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
// The rule of a field that is absent before or after isn't looked at.
#[x_kube(
    validation = Rule::new("has(self.drivers) == has(oldSelf.drivers)").message("drivers is immutable"),
    validation = Rule::new("has(self.className) == has(oldSelf.className)").message("className is immutable")
)]
pub struct VMSnapshotContentSpec {
    /// The node whose agent does the work.
    #[x_kube(validation = Rule::new("self == oldSelf").message("nodeName is immutable"))]
    pub node_name: NodeName,
    /// The snapshot that asked for it.
    #[x_kube(validation = Rule::new("self == oldSelf").message("vmSnapshotRef is immutable"))]
    pub vm_snapshot_ref: SnapshotRef,
    /// The VM: a VMTarget of the snapshot's namespace on that node.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("vmName is immutable"))]
    pub vm_name: String,
    /// The VMSnapshotClass that the order goes by: the snapshot's, or the one that was the default then. Absent in orders of
    /// versions that didn't record it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("className is immutable"))]
    pub class_name: Option<String>,
    /// The class's drivers, best first; the agent's own order when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("drivers is immutable"))]
    pub drivers: Vec<ClassDriver>,
    /// As in the snapshot.
    #[x_kube(validation = Rule::new("self == oldSelf").message("consistency is immutable"))]
    pub consistency: Consistency,
    /// As in the snapshot.
    #[x_kube(validation = Rule::new("self == oldSelf").message("quiesce is immutable"))]
    pub quiesce: Quiesce,
    /// As in the snapshot.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("disks is immutable"))]
    pub disks: DiskSelection,
    /// As in the class.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("verify is immutable"))]
    pub verify: Verify,
    /// As in the class.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("limits is immutable"))]
    pub limits: Limits,
    /// No cut after this instant: the agent never starts a session whose deadline has passed.
    #[x_kube(validation = Rule::new("self == oldSelf").message("deadline is immutable"))]
    pub deadline: Time,
    /// What happens to the data when the content is deleted. The operator keeps it equal to the snapshot's; once the
    /// snapshot is gone, the administrator may set it.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,
}

/// What the node did. Set by the agent of `spec.nodeName`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct VMSnapshotContentStatus {
    /// The generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// How far the node is. Absent before the cut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    // As the enumeration itself, because an optional one loses the description above.
    #[schemars(with = "ContentPhase")]
    pub phase: Option<ContentPhase>,
    /// The instant of the cut, by the node's clock, in microseconds. Absent before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub creation_time: Option<MicroTime>,
    /// The level that was proved, with the evidence. Absent before the cut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consistency: Option<ConsistencyEvidence>,
    /// The disks, one entry each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskSnapshot>,
    /// What came of starting from the disks. Absent unless the class's `verify` is `Boot`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootCheck>,
    /// `Accepted`, `Quiesced`, `Ready`, `SpaceLow` once the space for the snapshot's changes was nearly used up, and from the deletion on `Removed`: True when the node is done with it, by
    /// reason `Deleted` or `Retained` (the data was left alone), False by reason `DeleteFailed` while it can't be.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}
