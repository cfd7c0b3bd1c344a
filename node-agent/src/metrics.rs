//! What the agent counts and measures.

use std::collections::HashMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use freezeframe_api::conditions;
use freezeframe_api::conditions::types;
use freezeframe_api::v1alpha1::{
    ContentPhase, RestoreContentPhase, TargetDisk, VMRestoreContentStatus, VMSnapshotContentStatus,
};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::hypervisor::VmKey;

/// Labels of a finished session or restore; both have few values.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ResultLabels {
    /// `Ready`, or `Succeeded` for a restore; else `Failed`.
    pub result: String,
    /// The condition reason.
    pub reason: String,
}

/// Labels of a snapshot that can overflow: as many as there are thick volumes' snapshots.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FillLabels {
    content: String,
    disk: String,
}

/// Labels of a VM's disk.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DiskLabels {
    namespace: String,
    vm: String,
    disk: String,
}

/// The agent's metrics; a clone counts into the same.
#[derive(Clone)]
pub struct Metrics {
    sessions: Family<ResultLabels, Counter>,
    freeze: Histogram,
    hold: Histogram,
    pause: Histogram,
    deletions: Counter,
    restores: Family<ResultLabels, Counter>,
    targets: Gauge,
    orphans: Gauge,
    fills: Family<FillLabels, Gauge<f64, AtomicU64>>,
    chain_depths: Family<DiskLabels, Gauge>,
    overlay_bytes: Family<DiskLabels, Gauge>,
    /// The disks that have numbers: what is gone must not be told of.
    disks: Arc<Mutex<HashMap<VmKey, Vec<DiskLabels>>>>,
}

impl Metrics {
    /// Registers everything.
    pub fn new(registry: &mut Registry) -> Self {
        let buckets = || Histogram::new(exponential_buckets(0.001, 2.0, 15));
        let metrics = Self {
            sessions: Family::default(),
            freeze: buckets(),
            hold: buckets(),
            pause: buckets(),
            deletions: Counter::default(),
            restores: Family::default(),
            targets: Gauge::default(),
            orphans: Gauge::default(),
            fills: Family::default(),
            chain_depths: Family::default(),
            overlay_bytes: Family::default(),
            disks: Arc::default(),
        };
        let registry = registry.sub_registry_with_prefix("freezeframe_agent");
        registry.register("sessions", "Snapshots that ended on this node", metrics.sessions.clone());
        let time = |registry: &mut Registry, name: &str, help: &str, histogram: &Histogram| {
            registry.register_with_unit(name, help, Unit::Seconds, histogram.clone());
        };
        time(registry, "freeze", "Freeze sent to freeze answered: the guest's part", &metrics.freeze);
        time(registry, "hold", "Freeze answered to thaw sent: our part", &metrics.hold);
        time(registry, "pause", "Virtual CPUs stopped by us, where they were", &metrics.pause);
        registry.register("deletions", "Snapshots deleted on this node", metrics.deletions.clone());
        registry.register("restores", "Restores that ended on this node", metrics.restores.clone());
        registry.register("targets", "VMs found on this node", metrics.targets.clone());
        registry.register(
            "orphans",
            "Snapshots on this node without an object in the cluster",
            metrics.orphans.clone(),
        );
        let help = "How full the space of a snapshot is that can overflow, in percent";
        registry.register("snapshot_fill_percent", help, metrics.fills.clone());
        registry.register("chain_depth", "Images below a disk's own", metrics.chain_depths.clone());
        let help = "What the images of a disk above the lowest take, in bytes";
        registry.register("overlay_bytes", help, metrics.overlay_bytes.clone());
        metrics
    }

    /// Sets how long a VM's chains are and what their layers take, and forgets the disks that it has no more.
    pub fn set_chains(&self, vm: &VmKey, disks: &[TargetDisk]) {
        let labels = |disk: &TargetDisk| DiskLabels {
            namespace: vm.namespace.clone(),
            vm: vm.name.clone(),
            disk: disk.name.0.clone(),
        };
        let now: Vec<_> = disks.iter().map(labels).collect();
        for (labels, disk) in now.iter().zip(disks) {
            self.chain_depths.get_or_create(labels).set(disk.chain_depth.into());
            self.overlay_bytes.get_or_create(labels).set(disk.overlay_bytes);
        }
        let before = self.disks().insert(vm.clone(), now.clone()).unwrap_or_default();
        self.forget(before.iter().filter(|labels| !now.contains(labels)));
    }

    /// Forgets the disks of all VMs but these.
    pub fn forget_chains_but(&self, vms: &[VmKey]) {
        let gone = |vm: &VmKey, _: &mut Vec<DiskLabels>| !vms.contains(vm);
        let gone: Vec<_> = self.disks().extract_if(gone).collect();
        self.forget(gone.iter().flat_map(|(_, disks)| disks));
    }

    fn forget<'a>(&self, disks: impl Iterator<Item = &'a DiskLabels>) {
        for labels in disks {
            self.chain_depths.remove(labels);
            self.overlay_bytes.remove(labels);
        }
    }

    fn disks(&self) -> MutexGuard<'_, HashMap<VmKey, Vec<DiskLabels>>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets how full snapshots are: those that are gone must not be told of.
    pub fn forget_fills(&self) {
        self.fills.clear();
    }

    /// Sets how full one disk's snapshot is.
    pub fn set_fill(&self, content: &str, disk: &str, percent: f64) {
        self.fills.get_or_create(&FillLabels { content: content.into(), disk: disk.into() }).set(percent);
    }

    /// Counts a session that ended.
    pub fn session_ended(&self, status: &VMSnapshotContentStatus) {
        let result = match status.phase {
            Some(ContentPhase::Ready) => "Ready",
            Some(ContentPhase::Failed) => "Failed",
            _ => return,
        };
        let reason = conditions::find(&status.conditions, types::READY).map_or("", |ready| &ready.reason);
        self.sessions.get_or_create(&ResultLabels { result: result.into(), reason: reason.into() }).inc();
        let Some(evidence) = &status.consistency else { return };
        let seconds = |millis: i64| Duration::from_millis(millis.unsigned_abs()).as_secs_f64();
        evidence.freeze_millis.into_iter().for_each(|millis| self.freeze.observe(seconds(millis)));
        evidence.hold_millis.into_iter().for_each(|millis| self.hold.observe(seconds(millis)));
        if evidence.pause_millis > 0 {
            self.pause.observe(seconds(evidence.pause_millis));
        }
    }

    /// Counts a deletion that ended.
    pub fn deletion_ended(&self) {
        self.deletions.inc();
    }

    /// Counts a restore that ended.
    pub fn restore_ended(&self, status: &VMRestoreContentStatus) {
        let result = match status.phase {
            Some(RestoreContentPhase::Succeeded) => "Succeeded",
            Some(RestoreContentPhase::Failed) => "Failed",
            _ => return,
        };
        let reason = conditions::find(&status.conditions, types::READY).map_or("", |ready| &ready.reason);
        self.restores.get_or_create(&ResultLabels { result: result.into(), reason: reason.into() }).inc();
    }

    /// Sets the number of VMs.
    pub fn set_targets(&self, number: usize) {
        self.targets.set(i64::try_from(number).unwrap_or(i64::MAX));
    }

    /// Sets the number of snapshots that nobody asks for any more.
    pub fn set_orphans(&self, number: usize) {
        self.orphans.set(i64::try_from(number).unwrap_or(i64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use freezeframe_api::names::DiskName;

    use super::*;

    fn disk(name: &str) -> TargetDisk {
        TargetDisk {
            name: DiskName(name.into()),
            format: "qcow2".into(),
            source: "/x".into(),
            size_bytes: 1,
            read_only: false,
            chain_depth: 3,
            overlay_bytes: 4096,
            write_bytes_per_second: None,
            start_with: None,
            drivers: vec![],
        }
    }

    #[test]
    fn a_disk_has_numbers_as_long_as_it_is_there_and_no_longer() {
        let mut registry = Registry::default();
        let metrics = Metrics::new(&mut registry);
        let scraped = || {
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
            text
        };
        let vm = VmKey { namespace: "shop".into(), name: "db".into() };
        metrics.set_chains(&vm, &[disk("vda"), disk("vdb")]);
        let told = scraped();
        assert!(told.contains(r#"freezeframe_agent_chain_depth{namespace="shop",vm="db",disk="vda"} 3"#), "{told}");
        assert!(
            told.contains(r#"freezeframe_agent_overlay_bytes{namespace="shop",vm="db",disk="vdb"} 4096"#),
            "{told}"
        );
        metrics.set_chains(&vm, &[disk("vda")]);
        metrics.forget_chains_but(std::slice::from_ref(&vm));
        assert!(scraped().contains("vda") && !scraped().contains("vdb"), "{}", scraped());
        metrics.forget_chains_but(&[]);
        assert!(!scraped().contains("vda"), "{}", scraped());
    }
}
