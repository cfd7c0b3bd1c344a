//! What a window measured, kept as the evidence for what the status says.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;

use super::host_cuts::Made;

/// What was measured in a window that ended well.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Measured {
    /// The instant of the cut, by this node's clock.
    pub cut_at: Timestamp,
    /// File systems frozen, and how long the guest took; none without a freeze.
    pub frozen: Option<(u64, Duration)>,
    /// File systems thawed; none without a freeze.
    pub thawed: Option<u64>,
    /// Freeze answered to thaw sent.
    pub hold: Option<Duration>,
    /// How long the virtual CPUs were stopped by us.
    pub pause: Duration,
    /// Upper bound between the first disk's cut and the last one's.
    pub skew: Duration,
    /// How much later than the first cut each one was done. Disks that aren't listed were cut by QEMU's transaction.
    #[serde(default)]
    pub offsets: Offsets,
}

/// How much later than the first cut of a snapshot the others were done.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Offsets {
    /// QEMU's transaction.
    transaction: Duration,
    /// Cuts outside QEMU, by disk.
    host: BTreeMap<String, Duration>,
}

impl Offsets {
    /// From the instants at which they were done; of the transaction none if there was none.
    pub(super) fn new(transaction: Option<Instant>, host: &[Made]) -> Self {
        let Some(first) = host.iter().map(|(_, at)| *at).chain(transaction).min() else { return Self::default() };
        let of = |(disks, at): &Made| disks.iter().map(|disk| (disk.clone(), *at - first)).collect::<Vec<_>>();
        Self {
            transaction: transaction.map_or(Duration::ZERO, |at| at - first),
            host: host.iter().flat_map(of).collect(),
        }
    }

    /// That of one disk's cut.
    #[must_use]
    pub fn of(&self, disk: &str) -> Duration {
        self.host.get(disk).copied().unwrap_or(self.transaction)
    }
}
