//! Whether a program is ready: every one of its named gates is open.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The gates of a program. Clones share them; a program without gates is ready.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    gates: Arc<Mutex<BTreeMap<String, bool>>>,
}

/// One condition of readiness, closed at first.
#[derive(Clone, Debug)]
pub struct Gate {
    readiness: Readiness,
    name: String,
}

impl Readiness {
    /// Adds a gate, closed.
    #[must_use]
    pub fn gate(&self, name: &str) -> Gate {
        self.lock().insert(name.to_owned(), false);
        Gate { readiness: self.clone(), name: name.to_owned() }
    }

    /// The names of the gates that are closed.
    #[must_use]
    pub fn closed(&self) -> Vec<String> {
        self.lock().iter().filter(|(_, open)| !**open).map(|(name, _)| name.clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, bool>> {
        // A map of flags is whole at any moment, so a panic elsewhere can't have left it broken.
        self.gates.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Gate {
    /// Opens the gate.
    pub fn open(&self) {
        self.set(true);
    }

    /// Closes the gate again.
    pub fn close(&self) {
        self.set(false);
    }

    /// Opens or closes the gate.
    pub fn set(&self, open: bool) {
        self.readiness.lock().insert(self.name.clone(), open);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_ready_when_its_last_gate_opens_and_not_ready_when_one_closes_again() {
        let readiness = Readiness::default();
        let (watch, guard) = (readiness.gate("watch"), readiness.gate("guard"));
        watch.open();
        assert_eq!(readiness.closed(), ["guard"]);
        guard.open();
        assert!(readiness.closed().is_empty());
        watch.close();
        assert_eq!(readiness.closed(), ["watch"]);
    }
}
