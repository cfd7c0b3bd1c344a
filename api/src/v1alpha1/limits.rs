//! What an administrator allows snapshots to cost their VM and its node afterwards.

use kube::KubeSchema;
use kube::core::Duration;
use serde::{Deserialize, Serialize};

/// What snapshots may cost their VM and its node after the cut. A snapshot keeps what its class said when it was taken.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Limits {
    /// How fast a running VM's layers are merged when a snapshot is deleted, in bytes a second for each disk, such as
    /// `50Mi`. Set by the administrator; as fast as it goes when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^[1-9][0-9]*(Mi|Gi)$"))]
    pub merge_speed: Option<String>,
    /// While the guest's reads, writes or flushes take longer than this on average, a merge rests, though it always goes
    /// on a little. Set by the administrator, 1ms to 60s; a merge never rests when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^([0-9]+(\.[0-9]+)?(ms|s|m))+$"))]
    #[x_kube(validation = Rule::new("duration(self) >= duration('1ms') && duration(self) <= duration('60s')")
        .message("maxMergeLatency must be between 1ms and 60s"))]
    pub max_merge_latency: Option<Duration>,
    /// What must be left free, beyond what a snapshot takes at once, on each file system that it makes fill: `5%` of its
    /// size or bytes such as `10Gi`. A snapshot that would leave less is refused, with reason `NoSpace` and the numbers.
    /// Set by the administrator; nothing when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^([1-9][0-9]?%|[1-9][0-9]*(Mi|Gi|Ti))$"))]
    pub min_free: Option<String>,
    /// How many images may be below a disk's own before those in between that no snapshot needs are merged by
    /// themselves, the oldest first. Of several snapshots of a VM the least counts, as each was taken with it. Set by the
    /// administrator, 1 to 256; nothing is merged by itself when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 256))]
    pub max_chain_depth: Option<i32>,
    /// For how long what the guest writes must fit, at the rate that was measured, on each file system that a snapshot
    /// makes fill: free space must be what the snapshot takes at once and this. A snapshot that would leave less is
    /// refused, with reason `NoSpace` and the numbers. Set by the administrator, 1m to 168h; nothing is forecast when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^([0-9]+(\.[0-9]+)?(s|m|h))+$"))]
    #[x_kube(validation = Rule::new("duration(self) >= duration('1m') && duration(self) <= duration('168h')")
        .message("spaceHorizon must be between 1m and 168h"))]
    pub space_horizon: Option<Duration>,
}
