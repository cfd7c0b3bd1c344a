//! Keeps chains as short as their snapshots' classes want, one VM after the other's turn allows, and remembers which
//! can't be.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use freezeframe_api::conditions::{condition, find, reasons, set, types};
use freezeframe_api::v1alpha1::VMTargetStatus;
use k8s_openapi::jiff::Timestamp;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::causes::chain;
use crate::hypervisor::VmKey;
use crate::locks::{VmLocks, VmTurn};
use crate::session::Sessions;
use crate::session::shortening::{Depth, ShorteningError};

/// How often chains are looked at.
const LOOK: Duration = Duration::from_secs(5);
/// How soon again, where something was in the way: a QEMU may have to be started to see whether it still is.
const TRY_AGAIN: Duration = Duration::from_secs(30);

/// What governing needs.
#[derive(Clone)]
pub struct Governor {
    /// The sessions of this node.
    pub sessions: Arc<Sessions>,
    /// Chains are shortened in a turn of their VM, like merges.
    pub locks: VmLocks,
    /// What was found.
    pub depths: Depths,
}

impl Governor {
    /// Governs until `stop`. A job that is under way then goes on in QEMU, and is ended by the next agent.
    pub async fn run(self, stop: CancellationToken) {
        stop.run_until_cancelled(self.look_for_ever()).await;
    }

    async fn look_for_ever(&self) {
        let mut working = JoinSet::new();
        let mut beat = tokio::time::interval(LOOK);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            beat.tick().await;
            // Whose work ended badly has said so.
            while working.try_join_next().is_some() {}
            match self.sessions.limited() {
                Ok(limited) => {
                    self.depths.keep_only(&limited);
                    for vm in limited.into_iter().filter(|vm| self.depths.may_be_looked_at(vm)) {
                        // A VM that is being worked on is looked at the next time.
                        if let Some(turn) = self.locks.try_turn(&vm) {
                            working.spawn(self.clone().look(vm, turn));
                        }
                    }
                }
                Err(error) => tracing::warn!(error = chain(&error), "the journal can't be read"),
            }
        }
    }

    async fn look(self, vm: VmKey, turn: VmTurn) {
        let depth = self.sessions.shorten(&vm, &self.locks.waiting(&vm)).await;
        drop(turn);
        self.depths.learn(&vm, depth);
    }
}

/// Which VMs' chains are too deep, and why they stay so; a clone knows the same.
#[derive(Clone, Default)]
pub struct Depths(Arc<Mutex<HashMap<VmKey, Look>>>);

#[derive(Clone, Debug)]
struct Look {
    found: Found,
    at: Instant,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Found {
    Enough,
    TooDeep { reason: &'static str, message: String },
}

impl Depths {
    fn learn(&self, vm: &VmKey, depth: Result<Depth, ShorteningError>) {
        let too_deep = |reason, disks: &[String]| Found::TooDeep { reason, message: disks.join("; ") };
        let found = match depth {
            Ok(Depth::Enough) => Found::Enough,
            Ok(Depth::Unseen) => return,
            Ok(Depth::Needed(disks)) => too_deep(reasons::NEEDED_BY_SNAPSHOTS, &disks),
            Ok(Depth::Hindered(disks)) => too_deep(reasons::NOT_NOW, &disks),
            Err(error @ (ShorteningError::Driver { .. } | ShorteningError::Still(_))) => {
                tracing::debug!(%vm, error = chain(&error), "chains can't be shortened");
                Found::TooDeep { reason: reasons::NOT_NOW, message: chain(&error) }
            }
            Err(error) => return tracing::debug!(%vm, error = chain(&error), "chains can't be looked at"),
        };
        self.looks().insert(vm.clone(), Look { found, at: Instant::now() });
    }

    fn may_be_looked_at(&self, vm: &VmKey) -> bool {
        let hindered = |look: &&Look| matches!(look.found, Found::TooDeep { reason: reasons::NOT_NOW, .. });
        self.looks().get(vm).filter(hindered).is_none_or(|look| look.at.elapsed() >= TRY_AGAIN)
    }

    /// Nobody limits the chains of other VMs any more.
    fn keep_only(&self, limited: &[VmKey]) {
        for (vm, look) in self.looks().iter_mut().filter(|(vm, _)| !limited.contains(vm)) {
            tracing::debug!(%vm, "its chains are not limited any more");
            look.found = Found::Enough;
        }
    }

    /// Says in a VM's status whether its chains are too deep; nothing until they once were.
    pub fn report(&self, vm: &VmKey, status: &mut VMTargetStatus) {
        let found = self.looks().get(vm).map(|look| look.found.clone());
        let (is, reason, message) = match found {
            Some(Found::TooDeep { reason, message }) => (true, reason, message),
            Some(Found::Enough) if find(&status.conditions, types::CHAIN_TOO_DEEP).is_some() => {
                (false, reasons::SHORT_ENOUGH, String::new())
            }
            Some(Found::Enough) | None => return,
        };
        let told = condition(types::CHAIN_TOO_DEEP, is, reason, message, None, Timestamp::now());
        set(&mut status.conditions, told);
    }

    fn looks(&self) -> MutexGuard<'_, HashMap<VmKey, Look>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(depths: &Depths, vm: &VmKey, status: &mut VMTargetStatus) -> Option<(String, String)> {
        depths.report(vm, status);
        let found = find(&status.conditions, types::CHAIN_TOO_DEEP)?;
        Some((found.status.clone(), found.reason.clone()))
    }

    #[test]
    fn that_a_chain_is_short_enough_is_told_only_after_it_was_not() {
        let vm = VmKey { namespace: "shop".into(), name: "db".into() };
        let (depths, mut status) = (Depths::default(), VMTargetStatus::default());
        assert_eq!(told(&depths, &vm, &mut status), None);
        depths.learn(&vm, Ok(Depth::Enough));
        assert_eq!(told(&depths, &vm, &mut status), None);
        depths.learn(&vm, Ok(Depth::Needed(vec!["disk vda".into()])));
        let pair = |status: &str, reason: &str| Some((status.to_owned(), reason.to_owned()));
        assert_eq!(told(&depths, &vm, &mut status), pair("True", reasons::NEEDED_BY_SNAPSHOTS));
        depths.learn(&vm, Ok(Depth::Unseen));
        assert_eq!(told(&depths, &vm, &mut status), pair("True", reasons::NEEDED_BY_SNAPSHOTS));
        depths.keep_only(&[]);
        assert_eq!(told(&depths, &vm, &mut status), pair("False", reasons::SHORT_ENOUGH));
    }
}
