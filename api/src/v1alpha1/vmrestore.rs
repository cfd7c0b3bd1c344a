//! `VMRestore`: bring a snapshot's disks back, in place or as a new VM's.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::core::Duration;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{BootCheck, DiskSelection, RestoreDirectory, RestoreMode, RestoreVerify, RestoredDisk};

/// Where the disks go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct RestoreTarget {
    /// Name of a VM that doesn't exist yet: it gets new images beside the snapshot's, and a VMTarget that lists them.
    /// The snapshot's own VM may keep running. Set by the user; absent, the snapshot's own VM is put back in place.
    #[serde(default, rename = "newVM", skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub new_vm: Option<String>,
    /// Where the new VM's images are made; logical volumes stay in their group. Set by the user; `Beside` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<RestoreDirectory>,
}

/// Where a restore is on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RestorePhase {
    /// Waiting: for its snapshot, or another restore of the same VM.
    #[default]
    Pending,
    /// The node sees to it that the VM doesn't run.
    Stopping,
    /// The VM's present state is being kept as a snapshot of its own.
    Saving,
    /// The node brings the disks back.
    Restoring,
    /// A dry run is over: `disks` says what would be done, and nothing was.
    Planned,
    /// Every disk is back and checked.
    Succeeded,
    /// Failed for good; the VM is as it was. The conditions say why.
    Failed,
    /// Being deleted: what isn't finished is taken back.
    Deleting,
}

/// A snapshot's disks brought back, in place or as a new VM's.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "freezeframe.dev",
    version = "v1alpha1",
    kind = "VMRestore",
    plural = "vmrestores",
    shortname = "vmrestore",
    category = "freezeframe",
    namespaced,
    status = "VMRestoreStatus",
    derive = "PartialEq",
    doc = "A snapshot's disks brought back, in place or as a new VM's.",
    selectable = ".spec.snapshotName",
    printcolumn(name = "Snapshot", type_ = "string", json_path = ".spec.snapshotName"),
    printcolumn(name = "New-VM", type_ = "string", json_path = ".spec.target.newVM"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Before", type_ = "string", json_path = ".status.preRestoreSnapshotName"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.message", priority = 1)
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.confirm) || has(self.target.newVM) || (has(self.dryRun) && self.dryRun)")
        .message("a restore in place overwrites disks: set confirm to the uid of the VMSnapshot"),
    validation = Rule::new("has(self.target.newVM) || !has(self.target.directory)")
        .message("directory is for a new VM's images; in place, images stay where they are"),
    validation = Rule::new("!(has(self.target.newVM) && has(self.stopVM) && self.stopVM)")
        .message("stopVM is for a restore in place; a new VM's images leave the old one running"),
    validation = Rule::new("(has(oldSelf.dryRun) && oldSelf.dryRun) || has(self.confirm) == has(oldSelf.confirm) && (!has(self.confirm) || self.confirm == oldSelf.confirm)")
        .message("confirm is immutable but in a dry run"),
    validation = Rule::new("!(has(self.dryRun) && self.dryRun) || (has(oldSelf.dryRun) && oldSelf.dryRun)")
        .message("dryRun can only be taken away")
)]
pub struct VMRestoreSpec {
    /// The VMSnapshot, of the same namespace. Set by the user; immutable.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("snapshotName is immutable"))]
    pub snapshot_name: String,
    /// Where the disks go. Set by the user; in place when absent. Immutable.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("target is immutable"))]
    pub target: RestoreTarget,
    /// UID of the VMSnapshot: says that the VM's disks may be overwritten by this very snapshot, and by no later one of
    /// the same name. Set by the user; needed for a restore in place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub confirm: Option<String>,
    /// Whether a VM that runs is shut down for a restore in place: by the guest's power button, and after
    /// `stopTimeout` by force. Set by the user; false when absent: then a VM that runs is refused. Immutable.
    #[serde(default, rename = "stopVM")]
    #[x_kube(validation = Rule::new("self == oldSelf").message("stopVM is immutable"))]
    pub stop_vm: bool,
    /// How long the guest may take to shut down before its QEMU is ended. Set by the user, 1s to 1h; 2m when absent.
    /// Immutable.
    #[serde(default = "stop_timeout")]
    #[schemars(length(max = 16), regex(pattern = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$"))]
    #[x_kube(
        validation = Rule::new("self == oldSelf").message("stopTimeout is immutable"),
        validation = Rule::new("duration(self) >= duration('1s') && duration(self) <= duration('1h')")
            .message("stopTimeout must be between 1s and 1h")
    )]
    pub stop_timeout: Duration,
    /// Whether the disks may depend on the snapshot's data. Set by the user; `Linked` when absent. Immutable.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("mode is immutable"))]
    pub mode: RestoreMode,
    /// Which of the snapshot's disks. Set by the user; all when absent. Immutable.
    #[serde(default)]
    #[x_kube(
        validation = Rule::new("self == oldSelf").message("disks is immutable"),
        validation = Rule::new("!has(self.targets) || size(self.targets) == 0").message("targets are for snapshots")
    )]
    pub disks: DiskSelection,
    /// Whether only the plan is wanted: it is put into the status, and nothing is done. Set by the user; false when
    /// absent. Taken away later, the restore is done.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
    /// How the disks are checked before the restore counts as done. Set by the user; `Quick` when absent. Immutable.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("verify is immutable"))]
    pub verify: RestoreVerify,
}

fn stop_timeout() -> Duration {
    std::time::Duration::from_secs(120).into()
}

/// What became of the wish. Set by the operator.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct VMRestoreStatus {
    /// The generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Where the restore is on its way.
    #[serde(default)]
    pub phase: RestorePhase,
    /// UID of the VMSnapshot that the restore is of. Absent before it was found.
    #[serde(default, rename = "snapshotUID", skip_serializing_if = "Option::is_none")]
    pub snapshot_uid: Option<String>,
    /// The VMSnapshot that keeps what a restore in place replaces: restoring it undoes the restore. Absent before there
    /// is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pre_restore_snapshot_name: Option<String>,
    /// The VMRestoreContent that does the work. Absent before there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_name: Option<String>,
    /// The node with the data. Absent before the work order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// The disks, one entry each. Empty before the node's plan.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<RestoredDisk>,
    /// What came of starting the restored disks. Absent unless `verify` is `Boot`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootCheck>,
    /// When it succeeded, by the operator's clock. Absent before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// The most important condition's message, for `kubectl get -o wide`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// `Accepted`, `Ready`; `Stalled` when it failed for good; `Removed` while it is being deleted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}
