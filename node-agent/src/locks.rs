//! One operation per VM: sessions, deletions and probes of one VM take turns.

use std::collections::HashMap;
use std::sync::{Arc, Mutex as SyncMutex, PoisonError};

use tokio::sync::{Mutex, OwnedMutexGuard, watch};

use crate::hypervisor::VmKey;

/// The locks of all VMs that were ever used on this node.
#[derive(Clone, Default)]
pub struct VmLocks(Arc<SyncMutex<HashMap<VmKey, VmLock>>>);

#[derive(Clone, Default)]
struct VmLock {
    turn: Arc<Mutex<()>>,
    waiting: Waiting,
}

/// Held while one operation works on a VM.
pub type VmTurn = OwnedMutexGuard<()>;

/// The snapshots that wait for one VM's turn.
#[derive(Clone, Debug, Default)]
pub struct Waiting(Arc<watch::Sender<usize>>);

impl Waiting {
    /// Resolves as soon as a snapshot waits.
    pub async fn for_snapshot(&self) {
        // It fails only without a sender, and that is here.
        let _ = self.0.subscribe().wait_for(|waiting| *waiting > 0).await;
    }

    /// Whether a snapshot waits.
    #[must_use]
    pub fn is_snapshot(&self) -> bool {
        *self.0.borrow() > 0
    }

    fn enter(&self) -> Entry<'_> {
        self.0.send_modify(|waiting| *waiting += 1);
        Entry(self)
    }
}

struct Entry<'a>(&'a Waiting);

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.0.0.send_modify(|waiting| *waiting -= 1);
    }
}

impl VmLocks {
    /// Waits for the VM's turn, first come first served.
    pub async fn turn(&self, vm: &VmKey) -> VmTurn {
        self.of(vm).turn.lock_owned().await
    }

    /// Waits for the VM's turn to take a snapshot: who can make way for one is told.
    pub async fn turn_of_snapshot(&self, vm: &VmKey) -> VmTurn {
        let lock = self.of(vm);
        let _waiting = lock.waiting.enter();
        lock.turn.lock_owned().await
    }

    /// Waits for the VM's turn after every snapshot that waits, whoever came first.
    pub async fn turn_after_snapshots(&self, vm: &VmKey) -> VmTurn {
        let lock = self.of(vm);
        loop {
            let turn = lock.turn.clone().lock_owned().await;
            if !lock.waiting.is_snapshot() {
                return turn;
            }
            // Those who wait for it are served in their order, and this one waits behind them.
            drop(turn);
            tokio::task::yield_now().await;
        }
    }

    /// The VM's turn if nobody has it.
    #[must_use]
    pub fn try_turn(&self, vm: &VmKey) -> Option<VmTurn> {
        self.of(vm).turn.try_lock_owned().ok()
    }

    /// The snapshots that wait for the VM.
    #[must_use]
    pub fn waiting(&self, vm: &VmKey) -> Waiting {
        self.of(vm).waiting
    }

    fn of(&self, vm: &VmKey) -> VmLock {
        let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        locks.entry(vm.clone()).or_default().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(name: &str) -> VmKey {
        VmKey { namespace: "n".into(), name: name.into() }
    }

    #[tokio::test]
    async fn a_vm_has_one_turn_at_a_time_and_another_vm_its_own() {
        let locks = VmLocks::default();
        let held = locks.turn(&vm("a")).await;
        assert!(locks.try_turn(&vm("a")).is_none());
        assert!(locks.try_turn(&vm("b")).is_some());
        drop(held);
        assert!(locks.try_turn(&vm("a")).is_some());
    }

    #[tokio::test]
    async fn a_snapshot_goes_before_deletions_that_came_earlier() {
        let locks = VmLocks::default();
        let held = locks.turn(&vm("a")).await;
        let done = Arc::new(SyncMutex::new(vec![]));
        let mut all = vec![];
        for name in ["deletion", "other deletion"] {
            let (locks, done) = (locks.clone(), done.clone());
            all.push(tokio::spawn(async move {
                let _turn = locks.turn_after_snapshots(&vm("a")).await;
                done.lock().unwrap().push(name);
            }));
            tokio::task::yield_now().await;
        }
        let waiting = locks.waiting(&vm("a"));
        assert!(!waiting.is_snapshot());
        let (for_snapshot, taken) = (locks.clone(), done.clone());
        all.push(tokio::spawn(async move {
            let _turn = for_snapshot.turn_of_snapshot(&vm("a")).await;
            taken.lock().unwrap().push("snapshot");
        }));
        waiting.for_snapshot().await;
        drop(held);
        for one in all {
            one.await.unwrap();
        }
        assert_eq!(done.lock().unwrap()[0], "snapshot");
        assert!(!waiting.is_snapshot());
    }
}
