//! One operation per VM: sessions, deletions and probes of one VM take turns.

use std::collections::HashMap;
use std::sync::{Arc, Mutex as SyncMutex, PoisonError};

use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::hypervisor::VmKey;

/// The locks of all VMs that were ever used on this node.
#[derive(Clone, Default)]
pub struct VmLocks(Arc<SyncMutex<HashMap<VmKey, Arc<Mutex<()>>>>>);

/// Held while one operation works on a VM.
pub type VmTurn = OwnedMutexGuard<()>;

impl VmLocks {
    /// Waits for the VM's turn, first come first served.
    pub async fn turn(&self, vm: &VmKey) -> VmTurn {
        self.lock_of(vm).lock_owned().await
    }

    /// The VM's turn if nobody has it.
    #[must_use]
    pub fn try_turn(&self, vm: &VmKey) -> Option<VmTurn> {
        self.lock_of(vm).try_lock_owned().ok()
    }

    fn lock_of(&self, vm: &VmKey) -> Arc<Mutex<()>> {
        let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        locks.entry(vm.clone()).or_default().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_vm_has_one_turn_at_a_time_and_another_vm_its_own() {
        let locks = VmLocks::default();
        let (a, b) =
            (VmKey { namespace: "n".into(), name: "a".into() }, VmKey { namespace: "n".into(), name: "b".into() });
        let held = locks.turn(&a).await;
        assert!(locks.try_turn(&a).is_none());
        assert!(locks.try_turn(&b).is_some());
        drop(held);
        assert!(locks.try_turn(&a).is_some());
    }
}
