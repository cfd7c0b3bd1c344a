//! How fast a running VM's layers are merged, and what a merge makes way for.
//!
//! A merge has no hurry: it rests while the guest's own I/O suffers, and it is cancelled as soon as a snapshot of the VM
//! is asked for. Cancelling is safe at every moment of a job: what was written is hidden by the layer that it came from,
//! which stays where it is. A merge is begun anew later; a copy upwards goes on where it was.

use std::convert::Infallible;
use std::time::Duration;

use freezeframe_qemu::{BlockStats, Qmp};
use serde_json::json;
use tokio::time::sleep;

use super::jobs::{self, Wanted};
use super::quantity::MinFree;
use super::{DriverError, Result};
use crate::hypervisor::QMP_TIMEOUT;
use crate::locks::Waiting;

/// How often the guest's I/O is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// A merge rests so long at the most, and then goes on for [`LOOK`]: a disk that is slow by itself must not stop it
/// for ever.
const LONGEST_REST: Duration = Duration::from_secs(10);

/// What merges may cost.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    /// Bytes a second for one disk; 0, as QEMU has it, for no limit.
    pub speed: u64,
    /// Above which average latency of the guest's I/O a merge rests.
    pub max_latency: Option<Duration>,
    /// What must stay free where something is copied, all of it.
    pub keep: Vec<MinFree>,
    /// The snapshots that wait for the VM.
    pub waiting: Waiting,
}

impl Pace {
    /// Waits for a merge's job as [`jobs::wait`] does, unless a snapshot is asked for: then the job is cancelled.
    pub async fn wait(&self, qmp: &Qmp, job: &str, wanted: Wanted) -> Result<()> {
        tokio::select! {
            biased;
            ended = jobs::wait(qmp, job, wanted) => ended,
            () = self.waiting.for_snapshot() => {
                jobs::cancel(qmp, job).await?;
                tracing::info!(job, "a merge makes way for a snapshot");
                Err(DriverError::MadeWay)
            }
            never = self.rest(qmp, job) => match never {},
        }
    }

    /// Lets the job rest whenever the guest suffers, for ever.
    async fn rest(&self, qmp: &Qmp, job: &str) -> Infallible {
        let Some(limit) = self.max_latency else { return std::future::pending().await };
        let mut before = None;
        loop {
            sleep(LOOK).await;
            // What can't be learned or done now is tried again in a second; the job's end doesn't hang on it.
            let Ok(now) = qmp.query_blockstats(QMP_TIMEOUT).await else { continue };
            if before.as_ref().is_some_and(|before| latency(before, &now) > limit) {
                self.rest_once(qmp, job, limit).await;
                before = None;
            } else {
                before = Some(now);
            }
        }
    }

    async fn rest_once(&self, qmp: &Qmp, job: &str, limit: Duration) {
        let named = json!({"id": job});
        if qmp.execute::<serde_json::Value>("job-pause", &named, QMP_TIMEOUT).await.is_err() {
            return;
        }
        tracing::debug!(job, ?limit, "a merge rests while the guest's I/O is slow");
        let rested = tokio::time::timeout(LONGEST_REST, until_quick(qmp, limit)).await;
        if let Err(error) = qmp.execute::<serde_json::Value>("job-resume", &named, QMP_TIMEOUT).await {
            tracing::debug!(job, %error, rested = rested.is_ok(), "a merge ended while it rested");
        }
    }
}

async fn until_quick(qmp: &Qmp, limit: Duration) {
    let mut before: Option<BlockStats> = None;
    loop {
        if let Ok(now) = qmp.query_blockstats(QMP_TIMEOUT).await {
            if before.is_some_and(|before| latency(&before, &now) <= limit) {
                return;
            }
            before = Some(now);
        }
        sleep(LOOK).await;
    }
}

/// The greatest of the average latencies of what the guest did between two looks; none if it did nothing.
fn latency(before: &BlockStats, now: &BlockStats) -> Duration {
    let of_kind = |(then, now): (&(u64, u64), &(u64, u64))| {
        let (operations, nanos) = (now.0.saturating_sub(then.0), now.1.saturating_sub(then.1));
        Duration::from_nanos(nanos.checked_div(operations).unwrap_or(0))
    };
    let of_disk = |(name, now): (&String, &[(u64, u64); 3])| {
        let then = before.get(name)?;
        then.iter().zip(now).map(of_kind).max()
    };
    now.iter().filter_map(of_disk).max().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(of: [(u64, u64); 3]) -> BlockStats {
        BlockStats::from([("vda".to_owned(), of)])
    }

    #[test]
    fn the_slowest_kind_of_what_was_done_in_between_counts() {
        let before = stats([(10, 5_000), (10, 100), (1, 1)]);
        let now = stats([(11, 6_000), (20, 100), (3, 9_001)]);
        assert_eq!(latency(&before, &now), Duration::from_nanos(4_500));
        assert_eq!(latency(&now, &now), Duration::ZERO);
        assert_eq!(latency(&BlockStats::new(), &now), Duration::ZERO);
    }
}
