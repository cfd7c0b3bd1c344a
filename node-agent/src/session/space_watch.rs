//! How fast guests write, as far as it was seen, and what counts as little space.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::hypervisor::VmKey;

/// Below so many percent of free space a file system's space is low, if nobody says otherwise.
const LOW_PERCENT: u64 = 10;
/// A rate is that of so long a time at the least.
const SHORTEST: Duration = Duration::from_secs(10);
/// What was known before counts as much as what was seen in so long a time.
const MEMORY: Duration = Duration::from_secs(60);

/// What was seen of the disks of all VMs.
pub struct SpaceWatch {
    /// Below so many percent of free space a file system's space is low.
    pub low_percent: u64,
    written: Mutex<HashMap<VmKey, HashMap<String, Written>>>,
}

#[derive(Clone, Copy, Debug)]
struct Written {
    at: Instant,
    /// Since QEMU started, in bytes.
    bytes: u64,
    rate: Option<u64>,
}

impl Default for SpaceWatch {
    fn default() -> Self {
        Self::new(LOW_PERCENT)
    }
}

impl SpaceWatch {
    /// Nothing was seen yet.
    #[must_use]
    pub fn new(low_percent: u64) -> Self {
        Self { low_percent, written: Mutex::default() }
    }

    /// Takes note of how many bytes each disk of a VM was written since its QEMU started. Other disks are forgotten.
    pub fn learn(&self, vm: &VmKey, now: Instant, disks: impl Iterator<Item = (String, u64)>) {
        let mut written = self.written();
        let before = written.remove(vm).unwrap_or_default();
        let after = disks.map(|(disk, bytes)| {
            let after = before.get(&disk).map_or(Written { at: now, bytes, rate: None }, |seen| seen.then(now, bytes));
            (disk, after)
        });
        written.insert(vm.clone(), after.collect());
    }

    /// Forgets a VM that doesn't run.
    pub fn forget(&self, vm: &VmKey) {
        self.written().remove(vm);
    }

    /// What a disk was written a second lately, in bytes; none until it was measured.
    #[must_use]
    pub fn rate(&self, vm: &VmKey, disk: &str) -> Option<u64> {
        self.written().get(vm)?.get(disk)?.rate
    }

    fn written(&self) -> MutexGuard<'_, HashMap<VmKey, HashMap<String, Written>>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Written {
    fn then(self, now: Instant, bytes: u64) -> Self {
        let took = now.saturating_duration_since(self.at);
        if bytes < self.bytes {
            // Another QEMU counts.
            return Self { at: now, bytes, rate: None };
        }
        if took < SHORTEST {
            return self;
        }
        let micros = took.as_micros().max(1);
        let latest = u128::from(bytes - self.bytes) * 1_000_000 / micros;
        let (old, new) = (MEMORY.as_micros(), micros);
        let rate = self.rate.map_or(latest, |rate| (u128::from(rate) * old + latest * new) / (old + new));
        Self { at: now, bytes, rate: Some(u64::try_from(rate).unwrap_or(u64::MAX)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_known_after_a_while_and_follows_slowly_and_not_over_a_restart() {
        let (watch, start) = (SpaceWatch::default(), Instant::now());
        let vm = VmKey { namespace: "shop".into(), name: "db".into() };
        let see = |seconds, bytes| {
            watch.learn(&vm, start + Duration::from_secs(seconds), [("vda".to_owned(), bytes)].into_iter());
            watch.rate(&vm, "vda")
        };
        assert_eq!(see(0, 5_000), None);
        assert_eq!(see(5, 6_000), None);
        assert_eq!(see(10, 6_000), Some(100));
        // 800 a second for 10 s beside 100 a second before.
        assert_eq!(see(20, 14_000), Some(200));
        assert_eq!(see(21, 10), None);
        assert_eq!(watch.rate(&vm, "vdb"), None);
        watch.forget(&vm);
        assert_eq!(watch.rate(&vm, "vda"), None);
    }
}
