//! Which disks of a VM are meant, and what was made of each.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::names::{DiskName, DriverName, SnapshotHandle};

/// Which disks are taken. With both lists empty: every writable disk of the VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!(has(self.include) && size(self.include) > 0 && has(self.exclude) && size(self.exclude) > 0)")
    .message("include and exclude are mutually exclusive"))]
pub struct DiskSelection {
    /// Only these disks. Set by the user; all when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub include: Vec<DiskName>,
    /// All disks but these. Set by the user; none is left out when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub exclude: Vec<DiskName>,
    /// Files or logical volumes that were made beforehand for the data of these disks to go to. Set by the user, where the
    /// class says where such are; a new file for each disk when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(
        merge_strategy = ListMerge::Map(vec!["disk".into()]),
        validation = Rule::new("self.all(a, has(a.file) != has(a.volume))").message("a target is a file or a volume"),
        validation = Rule::new("self.all(a, !has(a.file) || self.exists_one(b, has(b.file) && a.file == b.file))")
            .message("a file is the target of two disks"),
        validation = Rule::new("self.all(a, !has(a.volume) || self.exists_one(b, has(b.volume) && a.volume == b.volume))")
            .message("a volume is the target of two disks")
    )]
    pub targets: Vec<DiskTarget>,
}

/// The file or the logical volume that one disk's data goes to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DiskTarget {
    /// The disk, as the VMTarget lists it.
    pub disk: DiskName,
    /// The file's name, without directories: it is in the directory of the snapshot's namespace, below the one that the
    /// class names. It has the format that the class asks for and the disk's size, is empty, and nothing has it open. It
    /// stays the user's: deleting the snapshot leaves it as it is; but for driver `overlay` it is the disk itself from then on,
    /// and is merged and gone with the last snapshot. For `overlay` it may be a block device's node, which the administrator
    /// made: the disk goes on on that device, and stays there. Set by the user, unless `volume` is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 200), regex(pattern = r"^[A-Za-z0-9][A-Za-z0-9._+@=:-]*$"))]
    pub file: Option<String>,
    /// The logical volume, as `<group>/<name>`, of a volume group that the class allows. It is tagged
    /// `freezeframe-target-<namespace>`, has exactly the disk's size, begins with a MiB of zeros, and nothing has it open.
    /// It is written raw, and stays the user's. For driver `overlay` it is formatted as an empty qcow2 image of the disk's
    /// size instead, has room for all of it, and is the disk from then on. Set by the user, unless `file` is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 3, max = 255),
        regex(pattern = r"^[A-Za-z0-9+_.][A-Za-z0-9+_.-]*/[A-Za-z0-9+_.][A-Za-z0-9+_.-]*$")
    )]
    pub volume: Option<String>,
}

/// How far one disk's snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DiskSnapshotState {
    /// Cut, but its data is still being copied or checked.
    Copying,
    /// Complete and verified.
    Ready,
    /// Failed; nothing of it is left, or, where it had been complete before, nothing that is worth anything.
    Failed,
    /// Deleted.
    Removed,
    /// Left alone when its content was deleted, as `deletionPolicy: Retain` asks, or because another image needs it.
    Retained,
}

/// The image that a VM is to be started with next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StartWith {
    /// Its path on the node.
    pub path: String,
    /// Its format, such as `qcow2`.
    pub format: String,
}

/// One disk of a snapshot. Set by the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DiskSnapshot {
    /// The disk, as the VMTarget lists it.
    pub name: DiskName,
    /// The driver that took it.
    pub driver: DriverName,
    /// Why this driver, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver_reason: Option<String>,
    /// How far it is.
    pub state: DiskSnapshotState,
    /// Virtual size of the disk at the cut, in bytes.
    pub size_bytes: i64,
    /// Format of the image at `handle`, such as `qcow2`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// Where it is on the node: a file's path, or a volume's name. Absent before the cut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handle: Option<SnapshotHandle>,
    /// Progress of a copy, in percent. Absent where nothing is copied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress_percent: Option<i32>,
    /// How much later than the first cut of the snapshot this disk's was done, in microseconds; 0 for the first. All disks
    /// that QEMU's transaction cuts have the same. Absent before the cut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skew_micros: Option<i64>,
    /// What the VM was to be started with after the cut, where its command line leads elsewhere; the VMTarget says what it
    /// is now. Absent where the old command line stayed right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_with: Option<StartWith>,
    /// What went wrong with this disk, or what to know about it. Absent when there is nothing to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}
