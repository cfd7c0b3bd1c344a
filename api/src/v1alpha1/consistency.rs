//! What a user asks of a snapshot's consistency, and what was proved.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How consistent a snapshot is; later is stronger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum ConsistencyLevel {
    /// One instant over all disks, as after a power cut: journals are replayed at the next start.
    Crash,
    /// One instant with all file systems of the guest frozen: nothing to replay, nothing un-synced lost.
    Filesystem,
    /// One instant with the applications in the guest at rest as well.
    Application,
}

/// What to do when the required level can't be had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Fallback {
    /// The snapshot fails, with the reason.
    #[default]
    Fail,
    /// The snapshot is taken at the best level that can be proved, and says so.
    Degrade,
}

/// The consistency that a snapshot must have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Consistency {
    /// The level that must be proved. Set by the user; `Filesystem` when absent.
    #[serde(default = "required")]
    pub required: ConsistencyLevel,
    /// What happens when it can't be. Set by the user; `Fail` when absent.
    #[serde(default)]
    pub fallback: Fallback,
}

fn required() -> ConsistencyLevel {
    ConsistencyLevel::Filesystem
}

impl Default for Consistency {
    fn default() -> Self {
        Self { required: required(), fallback: Fallback::Fail }
    }
}

/// The level that was proved, and the evidence. Set by the agent when the window has closed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ConsistencyEvidence {
    /// The level that was proved, never the one that was hoped for.
    pub level: ConsistencyLevel,
    /// File systems that the guest agent says it froze. Absent when no freeze was sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_filesystems: Option<i64>,
    /// File systems that the guest agent says it thawed: fewer than were frozen means that something else thawed
    /// them earlier, and the level is then `Crash`. Absent when no thaw was answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thawed_filesystems: Option<i64>,
    /// The guest's part: freeze sent to freeze answered, in milliseconds. Absent when no freeze was answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze_millis: Option<i64>,
    /// Our part: freeze answered to thaw sent, in milliseconds. Absent when no freeze was answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold_millis: Option<i64>,
    /// Time for which the virtual CPUs were stopped by us, in milliseconds; 0 when they weren't.
    #[serde(default)]
    pub pause_millis: i64,
    /// Upper bound of the time between the first disk's cut and the last one's, in microseconds. What the guest could
    /// write in between is nothing: it was frozen, paused, or held by QEMU's transaction.
    #[serde(default)]
    pub skew_micros: i64,
}
