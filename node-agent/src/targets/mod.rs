//! The VMs of this node: found, probed, and published as `VMTarget`s.

mod host;
mod probe;
mod publish;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use freezeframe_api::v1alpha1::VMTargetStatus;
use kube::Client;
use tokio_util::sync::CancellationToken;

use crate::hypervisor::VmKey;
use crate::locks::VmLocks;
use crate::metrics::Metrics;
use crate::session::Sessions;
use crate::session::outcome::chain;
use publish::Publisher;

/// How often the VMs' directories are looked at.
const SCAN: Duration = Duration::from_secs(1);

/// What publishing needs.
pub struct Targets {
    /// The API.
    pub client: Client,
    /// The node.
    pub node: String,
    /// Root and image roots.
    pub sessions: Arc<Sessions>,
    /// A VM in a session isn't probed.
    pub locks: VmLocks,
    /// What is counted.
    pub metrics: Metrics,
}

impl Targets {
    /// Finds, probes and publishes until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        stop.run_until_cancelled(self.scan_for_ever()).await;
    }

    async fn scan_for_ever(&self) {
        let publisher = Publisher::new(self.client.clone(), self.node.clone());
        let mut known: HashMap<VmKey, VMTargetStatus> = HashMap::new();
        let mut beat = tokio::time::interval(SCAN);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut swept = false;
        loop {
            beat.tick().await;
            let found = match host::find(&self.sessions.vm_root) {
                Ok(found) => found,
                Err(error) => {
                    tracing::warn!(error = chain(&error), "the VMs of this node can't be listed");
                    continue;
                }
            };
            self.metrics.set_targets(found.len());
            for vm in &found {
                self.publish(vm, &publisher, &mut known).await;
            }
            if !swept {
                swept = publisher.withdraw_unknown(&found).await;
            }
            let gone: Vec<_> = known.keys().filter(|vm| !found.contains(vm)).cloned().collect();
            for vm in gone {
                if publisher.withdraw(&vm).await {
                    known.remove(&vm);
                }
            }
        }
    }

    /// Probes one VM and publishes what changed. A VM in a session is left alone: its sockets serve one client.
    async fn publish(&self, vm: &VmKey, publisher: &Publisher, known: &mut HashMap<VmKey, VMTargetStatus>) {
        let Some(_turn) = self.locks.try_turn(vm) else { return };
        let before = known.get(vm);
        let status = probe::probe(&self.sessions, vm, &self.node, before).await;
        if before == Some(&status) {
            return;
        }
        if publisher.publish(vm, &status).await {
            known.insert(vm.clone(), status);
        }
    }
}
