//! How a restore makes disks, and what was made of each.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::names::{DiskName, DriverName, SnapshotHandle};

/// Whether restored disks may depend on the snapshot's data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RestoreMode {
    /// They may: at once, and the snapshot's data stays for as long as they need it. A disk that can't is copied.
    #[default]
    Linked,
    /// They don't: each is a copy of its own. Where the file system can share data, that is at once too.
    Full,
}

/// Where a new VM's images are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RestoreDirectory {
    /// In the directory of each disk of the snapshot's VM.
    #[default]
    Beside,
    /// In the class's `restoreDirectory`.
    Class,
}

/// How restored disks are checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RestoreVerify {
    /// Format, size and chain of each.
    #[default]
    Quick,
    /// As `Quick`; and a throw-away QEMU without a network starts from them, and changes nothing.
    Boot,
}

/// How far one disk's restore is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RestoredDiskState {
    /// Nothing has been done yet.
    Planned,
    /// Its data is being copied.
    Copying,
    /// Back and checked.
    Ready,
    /// Failed; nothing of it is left.
    Failed,
}

/// One disk of a restore. Set by the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RestoredDisk {
    /// The disk, as the snapshot lists it.
    pub name: DiskName,
    /// The driver that took the snapshot of it.
    pub driver: DriverName,
    /// How it is brought back, in words.
    pub method: String,
    /// The snapshot's data on the node.
    pub source: SnapshotHandle,
    /// The image that is made, or replaced: a path on the node.
    pub path: SnapshotHandle,
    /// Format of the image, such as `qcow2`.
    pub format: String,
    /// Virtual size, in bytes.
    pub size_bytes: i64,
    /// Space that making it needs at most, in bytes.
    pub needed_bytes: i64,
    /// Whether it depends on the snapshot's data.
    #[serde(default)]
    pub linked: bool,
    /// How far it is.
    pub state: RestoredDiskState,
    /// Progress of a copy, in percent. Absent where nothing is copied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress_percent: Option<i32>,
    /// What to know about this disk, such as what of it is kept. Absent when there is nothing to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// How far a system came that was started from a snapshot's disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum BootResult {
    /// The guest agent answered.
    AgentAnswered,
    /// The boot loader read from a disk and went on, but no guest agent answered in time.
    ReachedBootLoader,
    /// Nothing was started from the disks.
    NothingBooted,
    /// It couldn't be tried; the message says why.
    NotTried,
}

/// What came of starting a throw-away QEMU from a snapshot's disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BootCheck {
    /// How far it came.
    pub result: BootResult,
    /// How long that took, in seconds.
    pub seconds: i32,
    /// Why it couldn't be tried. Absent where it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}
