//! `VMSnapshotClass`: an administrator's policy.

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{DeletionPolicy, Limits, Verify};
use crate::names::DriverName;

/// One driver that a class allows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClassDriver {
    /// The driver's name; `docs/drivers.md` lists them.
    pub name: DriverName,
    /// The driver's parameters, opaque to the API and checked by the driver when the class is used.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32, "additionalProperties" = {"type": "string", "maxLength": 4096}))]
    pub parameters: BTreeMap<String, String>,
}

/// Policy for snapshots: which drivers, in which order, with which parameters.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "freezeframe.dev",
    version = "v1alpha1",
    kind = "VMSnapshotClass",
    plural = "vmsnapshotclasses",
    shortname = "vmsc",
    category = "freezeframe",
    derive = "PartialEq",
    doc = "Policy for snapshots: which drivers, in which order, with which parameters.",
    printcolumn(name = "Drivers", type_ = "string", json_path = ".spec.drivers[*].name"),
    printcolumn(name = "DeletionPolicy", type_ = "string", json_path = ".spec.deletionPolicy"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct VMSnapshotClassSpec {
    /// The drivers, best first: each disk goes to the first that can take it. Set by the administrator; the agent's
    /// own order when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(validation = Rule::new("self.all(a, self.exists_one(b, a.name == b.name))").message("a driver is listed twice"))]
    pub drivers: Vec<ClassDriver>,
    /// What happens to the data when a snapshot that doesn't say is deleted. Set by the administrator; `Delete` when
    /// absent.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,
    /// How thoroughly the data is checked before a snapshot is ready. Set by the administrator; `Quick` when absent.
    #[serde(default)]
    pub verify: Verify,
    /// What snapshots may cost after the cut. Set by the administrator; each limit has its own default.
    #[serde(default)]
    pub limits: Limits,
    /// A directory of the nodes, beneath an image root of their agents: there restores may put the images of new VMs, in
    /// a directory of their namespace's. Set by the administrator; when absent, images are made beside the snapshot's
    /// only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024), regex(pattern = r"^(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+$"))]
    pub restore_directory: Option<String>,
}
