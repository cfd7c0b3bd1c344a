//! How full the thin pools are that VMs' disks are in. LVM takes its time to say so and waits for locks, so it is asked
//! beside the probes, which a snapshot may have to wait for.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::causes::chain;
use crate::drivers::PoolFree;
use crate::drivers::lvm;
use crate::drivers::lvm::volume::Volume;

/// How long what LVM said of a group is good for.
const FRESH: Duration = Duration::from_secs(30);

/// What is known of the pools of each volume group.
#[derive(Clone, Default)]
pub struct Pools(Arc<Mutex<HashMap<String, Known>>>);

#[derive(Default)]
struct Known {
    asked: Option<Instant>,
    is_being_asked: bool,
    /// What is free in each thin volume's pool.
    free: BTreeMap<String, PoolFree>,
}

impl Pools {
    /// What is free in the pool of a thin volume, as it was a moment ago; none while that isn't known.
    pub fn of(&self, volume: &Volume) -> Option<PoolFree> {
        let mut groups = self.groups();
        let known = groups.entry(volume.group().to_owned()).or_default();
        if known.is_due(Instant::now()) {
            known.is_being_asked = true;
            tokio::spawn(self.clone().ask(volume.group().to_owned()));
        }
        known.free.get(volume.name()).cloned()
    }

    async fn ask(self, group: String) {
        let said = lvm::pools(&group).await;
        let mut groups = self.groups();
        let known = groups.entry(group.clone()).or_default();
        (known.asked, known.is_being_asked) = (Some(Instant::now()), false);
        match said {
            Ok(free) => known.free = free,
            // What was known before is better than nothing.
            Err(error) => tracing::warn!(group, error = chain(&error), "it can't be seen how full thin pools are"),
        }
    }

    fn groups(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn is_due(&self, now: Instant) -> bool {
        !self.is_being_asked && self.asked.is_none_or(|asked| now.saturating_duration_since(asked) >= FRESH)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lvm_is_asked_again_after_a_while_and_never_twice_at_once() {
        let (mut known, start) = (Known::default(), Instant::now());
        assert!(known.is_due(start));
        known.is_being_asked = true;
        assert!(!known.is_due(start + FRESH));
        (known.asked, known.is_being_asked) = (Some(start), false);
        assert!(!known.is_due(start + FRESH / 2) && known.is_due(start + FRESH));
    }
}
