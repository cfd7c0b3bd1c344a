//! `VMSnapshot`: the wish for one VM, all its disks, one instant.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, MicroTime};
use kube::core::Duration;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{BootCheck, Consistency, ConsistencyEvidence, DiskSelection, DiskSnapshot, Quiesce};

/// What happens to the data when the snapshot is deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DeletionPolicy {
    /// The data is deleted too, without harm to the VM or to other snapshots.
    #[default]
    Delete,
    /// The data stays on the node, and so does the VMSnapshotContent, which lists it: the snapshot goes without it. To
    /// delete the data later, set the content's `deletionPolicy` to `Delete`, then delete the content; deleted as it
    /// is, the content goes and the data is left alone. Only a cut that a node has reported counts as data: nothing is
    /// kept of a snapshot that failed, or that is deleted before that.
    Retain,
}

/// Where a snapshot is on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// Waiting: for its VM, its class, or another snapshot of the same VM.
    #[default]
    Pending,
    /// The node has its work order.
    Preparing,
    /// The window is open.
    Cutting,
    /// The cut is done; data is still being copied or checked.
    Completing,
    /// The data is complete and verified.
    Ready,
    /// Failed for good; the conditions say why.
    Failed,
    /// Being deleted.
    Deleting,
}

/// A snapshot of one VM: all its disks at one instant.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "freezeframe.dev",
    version = "v1alpha1",
    kind = "VMSnapshot",
    plural = "vmsnapshots",
    shortname = "vmsnap",
    category = "freezeframe",
    namespaced,
    status = "VMSnapshotStatus",
    derive = "PartialEq",
    doc = "A snapshot of one VM: all its disks at one instant.",
    selectable = ".spec.vmName",
    printcolumn(name = "VM", type_ = "string", json_path = ".spec.vmName"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Consistency", type_ = "string", json_path = ".status.consistency.level"),
    printcolumn(name = "Hold(ms)", type_ = "integer", json_path = ".status.consistency.holdMillis"),
    printcolumn(name = "Cut", type_ = "date", json_path = ".status.creationTime"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.message", priority = 1)
)]
#[serde(rename_all = "camelCase")]
// The rule of a field that is absent before or after isn't looked at.
#[x_kube(
    validation = Rule::new("has(self.className) == has(oldSelf.className)").message("className is immutable")
)]
pub struct VMSnapshotSpec {
    /// The VM: a VMTarget of the same namespace. It need not exist yet. Set by the user; immutable.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("vmName is immutable"))]
    pub vm_name: String,
    /// The VMSnapshotClass. Set by the user; the default class when absent. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("className is immutable"))]
    pub class_name: Option<String>,
    /// The consistency that must be proved. Set by the user; `Filesystem`, else `Fail`, when absent. Immutable.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("consistency is immutable"))]
    pub consistency: Consistency,
    /// How the guest is brought to rest. Set by the user; immutable.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("quiesce is immutable"))]
    pub quiesce: Quiesce,
    /// Which disks are taken. Set by the user; every writable disk when absent. Immutable.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("disks is immutable"))]
    pub disks: DiskSelection,
    /// How long the cut may take to come about, counted from the snapshot's creation; the snapshot fails after that.
    /// Set by the user, 1s to 24h; 5m when absent. Immutable.
    #[serde(default = "failure_deadline")]
    #[schemars(length(max = 16), regex(pattern = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$"))]
    #[x_kube(
        validation = Rule::new("self == oldSelf").message("failureDeadline is immutable"),
        validation = Rule::new("duration(self) >= duration('1s') && duration(self) <= duration('24h')")
            .message("failureDeadline must be between 1s and 24h")
    )]
    pub failure_deadline: Duration,
    /// What happens to the data when this object is deleted. Set by the user, at any time; the class's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    // As the enumeration itself, because an optional one loses the description above.
    #[schemars(with = "DeletionPolicy")]
    pub deletion_policy: Option<DeletionPolicy>,
    /// Keeps the snapshot and its data from being deleted while it is true. Set by the user, at any time; false when
    /// absent.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hold: bool,
}

fn failure_deadline() -> Duration {
    std::time::Duration::from_secs(300).into()
}

/// What became of the wish. Set by the operator.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct VMSnapshotStatus {
    /// The generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Where the snapshot is on its way.
    #[serde(default)]
    pub phase: Phase,
    /// True when the data of every disk is complete and verified.
    #[serde(default)]
    pub ready_to_use: bool,
    /// The instant of the cut, by the node's clock, in microseconds. Absent before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub creation_time: Option<MicroTime>,
    /// The VMSnapshotContent that does the work. Absent before there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_name: Option<String>,
    /// The VMSnapshotClass by which it is taken, be it named or the default one at that time. Absent before the work order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class_name: Option<String>,
    /// The node that runs the VM. Absent before the work order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// The level that was proved, with the evidence. Absent before the cut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consistency: Option<ConsistencyEvidence>,
    /// The disks, one entry each. Empty before the cut.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskSnapshot>,
    /// What came of starting from the disks. Absent unless the class's `verify` is `Boot`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootCheck>,
    /// The most important condition's message, for `kubectl get -o wide`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// `Accepted`, `Quiesced`, `Ready`; `SpaceLow` once the space for the snapshot's changes was nearly used up; `Stalled` when it failed for good; and, from the deletion on, `Removed`: False
    /// with why the snapshot is still there, by reason `Held` (`hold` is true), `InProgress` (the node removes the data)
    /// or `DeleteFailed` (the node can't now, and tries again; the message is its own). It never becomes True: the
    /// snapshot is gone then.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}
