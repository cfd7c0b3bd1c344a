//! Which VMs a schedule takes snapshots of, and what each snapshot is like.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelectorRequirement;
use kube::KubeSchema;
use kube::core::Duration;
use serde::{Deserialize, Serialize};

use super::{Consistency, DeletionPolicy, DiskSelection, Quiesce};

/// `VMTargets` of one namespace: by label, or by name. All of them when nothing is given.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.vmNames) || !(has(self.matchLabels) || has(self.matchExpressions))")
        .message("select VMs by label or by name, not both")
)]
pub struct TargetSelector {
    /// Labels that a VMTarget must have. Set by the user.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32, "additionalProperties" = {"type": "string", "maxLength": 63}))]
    pub match_labels: BTreeMap<String, String>,
    /// Conditions that a VMTarget's labels must meet, as in any label selector. Set by the user.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub match_expressions: Vec<LabelSelectorRequirement>,
    /// Names of `VMTargets`. Set by the user.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 256),
        inner(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))
    )]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub vm_names: Vec<String>,
}

/// What each snapshot of a schedule is like. The fields are those of a VMSnapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct SnapshotTemplate {
    /// Labels of each snapshot, beside those that the operator gives it. Set by the user.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32, "additionalProperties" = {
        "type": "string", "maxLength": 63, "pattern": "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"}))]
    #[x_kube(
        validation = Rule::new("self.all(key, !key.startsWith('freezeframe.dev/'))")
            .message("labels of freezeframe.dev are the operator's"),
        validation = Rule::new("self.all(key, size(key) <= 317 && key.matches('^([a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$'))")
            .message("a label's key is [prefix/]name, as Kubernetes has it")
    )]
    pub labels: BTreeMap<String, String>,
    /// The VMSnapshotClass. Set by the user; the default class when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub class_name: Option<String>,
    /// The consistency that must be proved. Set by the user; `Filesystem`, else `Fail`, when absent.
    #[serde(default)]
    pub consistency: Consistency,
    /// How the guest is brought to rest. Set by the user.
    #[serde(default)]
    pub quiesce: Quiesce,
    /// Which disks are taken. Set by the user; every writable disk when absent.
    #[serde(default)]
    #[x_kube(validation = Rule::new("!has(self.targets) || size(self.targets) == 0")
        .message("targets are for one snapshot"))]
    pub disks: DiskSelection,
    /// How long the cut may take to come about, counted from the snapshot's creation. Set by the user, 1s to 24h; 5m when
    /// absent.
    #[serde(default = "failure_deadline")]
    #[schemars(length(max = 16), regex(pattern = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$"))]
    #[x_kube(validation = Rule::new("duration(self) >= duration('1s') && duration(self) <= duration('24h')")
        .message("failureDeadline must be between 1s and 24h"))]
    pub failure_deadline: Duration,
    /// What happens to the data when a snapshot is deleted, by retention too. Set by the user; the class's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    // As the enumeration itself, because an optional one loses the description above.
    #[schemars(with = "DeletionPolicy")]
    pub deletion_policy: Option<DeletionPolicy>,
}

fn failure_deadline() -> Duration {
    std::time::Duration::from_secs(300).into()
}

impl Default for SnapshotTemplate {
    fn default() -> Self {
        Self {
            labels: BTreeMap::new(),
            class_name: None,
            consistency: Consistency::default(),
            quiesce: Quiesce::default(),
            disks: DiskSelection::default(),
            failure_deadline: failure_deadline(),
            deletion_policy: None,
        }
    }
}
