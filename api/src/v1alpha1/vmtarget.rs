//! `VMTarget`: a VM that can be snapshotted.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::StartWith;
use crate::names::{DiskName, DriverName, NodeName};

/// Whether a VM runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RunState {
    /// Its virtual CPUs run.
    Running,
    /// QEMU is there, its virtual CPUs are stopped; the message says in which of QEMU's states.
    Paused,
    /// No QEMU process answers.
    Stopped,
    /// QEMU is there but doesn't answer its monitor.
    #[default]
    Unknown,
}

/// Whether the guest agent answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AgentState {
    /// It answers.
    Connected,
    /// It has its channel open but doesn't answer.
    NotResponding,
    /// There is no channel, or nobody in the guest has it open.
    #[default]
    Absent,
}

/// The guest agent of a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GuestAgentStatus {
    /// Whether it answers.
    pub state: AgentState,
    /// Its version. Absent until it answered once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

/// Whether one driver can take one disk, and why not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DriverChoice {
    /// The driver.
    pub name: DriverName,
    /// Whether it can take the disk.
    pub usable: bool,
    /// Why, or why not, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// One disk of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct TargetDisk {
    /// Its name: the `-device` id in QEMU, else the `-drive` id.
    pub name: DiskName,
    /// Format of the image, such as `qcow2` or `raw`.
    pub format: String,
    /// What QEMU calls its image: a path, or a URL of another protocol.
    pub source: String,
    /// Virtual size, in bytes.
    pub size_bytes: i64,
    /// Whether the guest can't write to it; such a disk is left out of snapshots.
    #[serde(default)]
    pub read_only: bool,
    /// Images below this one that it depends on.
    #[serde(default)]
    pub chain_depth: i32,
    /// What the images above the lowest one take on their file system, in bytes, by QEMU's `actual-size`: to within an
    /// eighth or 64 MiB, so that not every write is news. 0 without a backing image.
    #[serde(default)]
    pub overlay_bytes: i64,
    /// What the guest wrote a second on average over the last minutes, in bytes, rounded up to a power of two and to
    /// within another factor of two, so that not every write is news; 0 for less than 4 KiB. Absent until it was measured, and while the VM doesn't run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write_bytes_per_second: Option<i64>,
    /// What to start the VM with next, where its command line leads to another image than the disk's: after a snapshot by
    /// `overlay` with parameter `follow`. Absent where the command line is right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_with: Option<StartWith>,
    /// What can take it, best first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drivers: Vec<DriverChoice>,
}

/// A VM on a node that can be snapshotted. Its spec is empty: agents publish what they find.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "freezeframe.dev",
    version = "v1alpha1",
    kind = "VMTarget",
    plural = "vmtargets",
    shortname = "vmt",
    category = "freezeframe",
    namespaced,
    status = "VMTargetStatus",
    derive = "PartialEq",
    doc = "A VM on a node that can be snapshotted. Published by the node's agent.",
    printcolumn(name = "Node", type_ = "string", json_path = ".status.nodeName"),
    printcolumn(name = "State", type_ = "string", json_path = ".status.runState"),
    printcolumn(name = "Agent", type_ = "string", json_path = ".status.guestAgent.state"),
    printcolumn(name = "Disks", type_ = "string", json_path = ".status.disks[*].name"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct VMTargetSpec {}

/// What the node's agent found. Set by the agent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct VMTargetStatus {
    /// The node that the VM is on.
    pub node_name: NodeName,
    /// Whether it runs.
    #[serde(default)]
    pub run_state: RunState,
    /// The guest agent.
    #[serde(default)]
    pub guest_agent: GuestAgentStatus,
    /// QEMU's version. Absent while no QEMU was seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qemu_version: Option<String>,
    /// The disks, as last seen.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256))]
    pub disks: Vec<TargetDisk>,
    /// What to know about the VM's state. Absent when there is nothing to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// `Ready` (a snapshot can be taken; False by reason `NoSpace` if QEMU stopped the VM for it), `AgentConnected`,
    /// `SpaceLow` once a file system or a thin pool of its disks was nearly full, `ChainTooDeep` once a disk had more images
    /// below it than its snapshots' classes want and nothing could be merged, and `FollowNeeded` once a disk had a
    /// `startWith`: True by reason `NewImage` until the VM is started with it, by reason `NotFollowed` if it was started without.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}
