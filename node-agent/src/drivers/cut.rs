//! What drivers have the window do.

use std::sync::Arc;

use freezeframe_guard::Exchange;
use serde_json::Value;

use super::Result;

/// What a driver contributes to the window for a group of disks.
#[derive(Default)]
pub struct Cut {
    /// Actions for the one QMP transaction.
    pub actions: Vec<Value>,
    /// Names that change hands once the transaction is done, before the guest goes on.
    pub exchanges: Vec<Exchange>,
    /// Cuts outside QEMU, made in parallel while its virtual CPUs are stopped.
    pub host: Vec<HostCut>,
}

/// One cut outside QEMU. Everything it needs is open already.
#[derive(Clone)]
pub struct HostCut {
    /// The disks that it cuts, all at the same instant.
    pub disks: Vec<String>,
    /// Makes it; blocks, but not for long. May be called again after a failure.
    pub run: Arc<dyn Fn() -> Result<()> + Send + Sync>,
}

impl std::fmt::Debug for HostCut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostCut({})", self.disks.join(", "))
    }
}
