//! What probes have seen, and the next ones needn't look at again.

use super::pools::Pools;
use super::stopped::Files;

/// Of all VMs.
#[derive(Default)]
pub struct Seen {
    pub(super) files: Files,
    pub(super) pools: Pools,
}
