//! The VMs of this node: found, probed, and published as `VMTarget`s.

mod events;
mod follow;
mod host;
mod pools;
mod probe;
mod publish;
mod rates;
mod seen;
mod space;
mod steady;
mod stopped;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use freezeframe_api::v1alpha1::VMTargetStatus;
use futures::future::join_all;
use kube::Client;
use tokio_util::sync::CancellationToken;

use crate::causes::chain;
use crate::governor::Depths;
use crate::hypervisor::VmKey;
use crate::locks::VmLocks;
use crate::metrics::Metrics;
use crate::session::Sessions;
use events::Events;
pub use probe::probe;
use publish::Publisher;
pub use seen::Seen;

/// How often the VMs' directories are looked at.
const SCAN: Duration = Duration::from_secs(1);
/// How often what was published is compared with what the API has.
const COMPARISON: Duration = Duration::from_secs(60);
/// How many VMs are probed at once.
const PROBES: usize = 16;

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
    /// Which chains are too deep.
    pub depths: Depths,
}

impl Targets {
    /// Finds, probes and publishes until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        stop.run_until_cancelled(self.scan_for_ever()).await;
    }

    async fn scan_for_ever(&self) {
        let publisher = Publisher::new(self.client.clone(), self.node.clone());
        let events = Events::new(self.client.clone(), &self.node);
        let seen = Seen::default();
        let mut known = HashMap::new();
        let mut next_comparison = Instant::now();
        let mut beat = tokio::time::interval(SCAN);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            beat.tick().await;
            // What an earlier life of this agent published need not be written again, and what somebody deleted must be.
            if Instant::now() >= next_comparison {
                let Some(there) = publisher.published().await else { continue };
                known = there;
                self.remember(&known);
                next_comparison = Instant::now() + COMPARISON;
            }
            self.scan(&publisher, &events, &seen, &mut known).await;
            self.remember(&known);
        }
    }

    /// Lets sessions know the disks of VMs that may be stopped by then.
    fn remember(&self, known: &HashMap<VmKey, VMTargetStatus>) {
        let disks = known.iter().map(|(vm, status)| (vm.clone(), stopped::known_disks(status)));
        self.sessions.stopped.set_seen(disks.collect());
    }

    async fn scan(
        &self,
        publisher: &Publisher,
        events: &Events,
        seen: &Seen,
        known: &mut HashMap<VmKey, VMTargetStatus>,
    ) {
        let root = &self.sessions.vm_root;
        let mut found = match host::find(root) {
            Ok(found) => found,
            Err(error) => return tracing::warn!(error = chain(&error), "the VMs of this node can't be listed"),
        };
        // A QEMU that ends in good order removes its sockets: the VM is still there, and stopped.
        let stopped: Vec<_> =
            known.keys().filter(|vm| !found.contains(vm) && host::is_there(root, vm)).cloned().collect();
        found.extend(stopped);
        self.metrics.set_targets(found.len());
        // Together: one QEMU that doesn't answer must not keep the others' targets waiting for long.
        for some in found.chunks(PROBES) {
            let mut probes = vec![];
            for vm in some {
                probes.push(self.publish(vm, publisher, events, seen, known.get(vm)));
            }
            known.extend(join_all(probes).await.into_iter().flatten());
        }
        self.metrics.forget_chains_but(&found);
        let gone: Vec<_> = known.keys().filter(|vm| !found.contains(vm)).cloned().collect();
        for vm in gone {
            if publisher.withdraw(&vm).await {
                known.remove(&vm);
            }
        }
    }

    /// Probes one VM and publishes what changed. A VM in a session is left alone: its sockets serve one client.
    async fn publish(
        &self,
        vm: &VmKey,
        publisher: &Publisher,
        events: &Events,
        seen: &Seen,
        before: Option<&VMTargetStatus>,
    ) -> Option<(VmKey, VMTargetStatus)> {
        let _turn = self.locks.try_turn(vm)?;
        let mut status = probe(&self.sessions, vm, &self.node, seen, before).await;
        self.metrics.set_chains(vm, &status.disks);
        self.depths.report(vm, &mut status);
        steady::keep(before, &mut status);
        let news = before != Some(&status) && publisher.publish(vm, &status).await;
        if news || before == Some(&status) {
            publisher.label(vm, stopped::labels(&self.sessions, vm)).await;
        }
        if news && events::is_news(before, &status) {
            // A target that was deleted in the meantime has no news.
            if let Some(target) = publisher.reference(vm).await {
                events.publish(before, &status, &target).await;
            }
        }
        news.then(|| (vm.clone(), status))
    }
}
