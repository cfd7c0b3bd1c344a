//! `VMRestoreContent`: the work order of a restore for one node, and the record of what was made there.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::core::Duration;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{BootCheck, DiskSelection, RestoreMode, RestoreVerify, RestoredDisk};
use crate::names::NodeName;

/// The restore that a content belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RestoreRef {
    /// Namespace of the VMRestore, and so of its VMs.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub namespace: String,
    /// Name of the VMRestore.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// UID of the VMRestore: another one of the same name is another restore.
    #[schemars(length(min = 1, max = 63))]
    pub uid: String,
}

/// A content of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SnapshotContentRef {
    /// Name of the VMSnapshotContent.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// UID of the VMSnapshotContent: the node's record goes by it.
    #[schemars(length(min = 1, max = 63))]
    pub uid: String,
}

/// What the node is to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RestoreStep {
    /// Say what would be done; do nothing.
    Plan,
    /// See to it that the VM doesn't run, and say what would be done: the operator keeps the VM's state next.
    Stop,
    /// Bring the disks back.
    Restore,
}

/// How far the node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RestoreContentPhase {
    /// The plan is in `disks`; nothing was done.
    Planned,
    /// The VM doesn't run; the plan is in `disks`.
    Stopped,
    /// Data is being copied.
    Restoring,
    /// Every disk is back and checked.
    Succeeded,
    /// Failed for good; what was made was taken back, and the VM's disks are as they were.
    Failed,
}

/// Work order of a restore for the agent of one node. Written by the operator; immutable but for `step` and
/// `preRestoreContent`.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "freezeframe.dev",
    version = "v1alpha1",
    kind = "VMRestoreContent",
    plural = "vmrestorecontents",
    shortname = "vmrestorec",
    category = "freezeframe",
    status = "VMRestoreContentStatus",
    derive = "PartialEq",
    doc = "The work order of a restore for one node, and the record of what was made there. Written by the operator and the node's agent.",
    selectable = ".spec.nodeName",
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.nodeName"),
    printcolumn(name = "Namespace", type_ = "string", json_path = ".spec.vmRestoreRef.namespace"),
    printcolumn(name = "Restore", type_ = "string", json_path = ".spec.vmRestoreRef.name"),
    printcolumn(name = "VM", type_ = "string", json_path = ".spec.vmName"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.newVM) == has(oldSelf.newVM)").message("newVM is immutable"),
    validation = Rule::new("has(self.directory) == has(oldSelf.directory)").message("directory is immutable"),
    validation = Rule::new("oldSelf.step != 'Restore' || self.step == 'Restore'").message("step can't go back")
)]
pub struct VMRestoreContentSpec {
    /// The node whose agent does the work.
    #[x_kube(validation = Rule::new("self == oldSelf").message("nodeName is immutable"))]
    pub node_name: NodeName,
    /// The restore that asked for it.
    #[x_kube(validation = Rule::new("self == oldSelf").message("vmRestoreRef is immutable"))]
    pub vm_restore_ref: RestoreRef,
    /// The content of the snapshot that is restored.
    #[x_kube(validation = Rule::new("self == oldSelf").message("source is immutable"))]
    pub source: SnapshotContentRef,
    /// The snapshot's VM.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("vmName is immutable"))]
    pub vm_name: String,
    /// The new VM; in place when absent.
    #[serde(default, rename = "newVM", skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("newVM is immutable"))]
    pub new_vm: Option<String>,
    /// The class's directory for the new VM's images; beside the snapshot's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024), regex(pattern = r"^(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+$"))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("directory is immutable"))]
    pub directory: Option<String>,
    /// What to do now.
    pub step: RestoreStep,
    /// The content of the snapshot that keeps the VM's state of before. Absent until step `Restore`, and with a new VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pre_restore_content: Option<SnapshotContentRef>,
    /// As in the restore.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("mode is immutable"))]
    pub mode: RestoreMode,
    /// As in the restore.
    #[serde(default)]
    #[x_kube(
        validation = Rule::new("self == oldSelf").message("disks is immutable"),
        validation = Rule::new("!has(self.targets) || size(self.targets) == 0").message("targets are for snapshots")
    )]
    pub disks: DiskSelection,
    /// As in the restore.
    #[serde(default, rename = "stopVM")]
    #[x_kube(validation = Rule::new("self == oldSelf").message("stopVM is immutable"))]
    pub stop_vm: bool,
    /// As in the restore.
    #[schemars(length(max = 16))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("stopTimeout is immutable"))]
    pub stop_timeout: Duration,
    /// As in the restore.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("verify is immutable"))]
    pub verify: RestoreVerify,
}

/// What the node did. Set by the agent of `spec.nodeName`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct VMRestoreContentStatus {
    /// The generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// How far the node is. Absent before its first report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    // As the enumeration itself, because an optional one loses the description above.
    #[schemars(with = "RestoreContentPhase")]
    pub phase: Option<RestoreContentPhase>,
    /// The disks, one entry each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<RestoredDisk>,
    /// What came of starting the restored disks. Absent unless it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootCheck>,
    /// When the node last said that it is at it, by its own clock: once a minute, whatever it waits for. Absent before
    /// the first time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_report_time: Option<Time>,
    /// `Accepted`, `Ready`, and from the deletion on `Removed`: True when what wasn't finished has been taken back.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}
