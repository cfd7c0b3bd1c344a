//! Snapshots that a command is making at this moment.
//!
//! A window that was given up doesn't end the command, since one that is killed may leave a volume suspended. Whoever
//! takes the snapshot back must wait until the command is over, or would look too early and find nothing.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::volume::Volume;

static IN_FLIGHT: Mutex<BTreeSet<Volume>> = Mutex::new(BTreeSet::new());

/// The entry of some snapshots, as long as this is held.
pub struct InFlight(Vec<Volume>);

impl InFlight {
    /// Enters snapshots.
    #[must_use]
    pub fn enter(snapshots: Vec<Volume>) -> Self {
        entries().extend(snapshots.iter().cloned());
        Self(snapshots)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        entries().retain(|volume| !self.0.contains(volume));
    }
}

/// Whether a command that makes this snapshot is under way, or waits for its turn.
#[must_use]
pub fn is_in_flight(snapshot: &Volume) -> bool {
    entries().contains(snapshot)
}

fn entries() -> MutexGuard<'static, BTreeSet<Volume>> {
    IN_FLIGHT.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_in_flight_until_its_entry_is_dropped() {
        let snapshot = Volume::new("vg-of-this-test", "a").unwrap();
        let entry = InFlight::enter(vec![snapshot.clone()]);
        assert!(is_in_flight(&snapshot));
        drop(entry);
        assert!(!is_in_flight(&snapshot));
    }
}
