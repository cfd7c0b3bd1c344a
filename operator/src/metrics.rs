//! Metrics of the operator. Labels are bounded: no names of objects, but for the gauges of `schedule::gauges`, which tell
//! of what there is.

use std::fmt;
use std::time::Duration;

use freezeframe_api::conditions::{find, types};
use freezeframe_api::v1alpha1::{Phase, VMSnapshot, VMSnapshotStatus};
use k8s_openapi::jiff::Timestamp;
use kube::runtime::reflector::Store;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::caches::Guarded;
use crate::error::ErrorKind;

const PHASES: [Phase; 7] =
    [Phase::Pending, Phase::Preparing, Phase::Cutting, Phase::Completing, Phase::Ready, Phase::Failed, Phase::Deleting];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Outcome {
    result: &'static str,
    reason: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ErrorLabels {
    controller: &'static str,
    kind: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ControllerLabel {
    controller: &'static str,
}

/// The counters. Clones share them.
#[derive(Clone, Debug)]
pub struct Metrics {
    outcomes: Family<Outcome, Counter>,
    ready_seconds: Histogram,
    errors: Family<ErrorLabels, Counter>,
    durations: Family<ControllerLabel, Histogram>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            outcomes: Family::default(),
            ready_seconds: Histogram::new(exponential_buckets(0.1, 2.0, 14)), // up to 14 minutes
            errors: Family::default(),
            durations: Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.001, 4.0, 8))),
        }
    }
}

impl Metrics {
    /// Makes the counters visible.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("freezeframe");
        registry.register("snapshots", "Snapshots that came to an end, by result and reason", self.outcomes.clone());
        registry.register(
            "snapshot_ready_seconds",
            "Time from a snapshot's creation to Ready",
            self.ready_seconds.clone(),
        );
        registry.register("reconcile_errors", "Reconciles that broke off, by kind of error", self.errors.clone());
        registry.register("reconcile_duration_seconds", "Duration of a reconcile", self.durations.clone());
    }

    /// Counts a snapshot that came to an end with this change of its status.
    pub fn count_outcome(&self, snapshot: &VMSnapshot, new: &VMSnapshotStatus, now: Timestamp) {
        let old = snapshot.status.as_ref().map_or(Phase::Pending, |status| status.phase);
        let result = match new.phase {
            _ if old == new.phase => return,
            Phase::Ready => "ready",
            Phase::Failed => "failed",
            _ => return,
        };
        let reason = find(&new.conditions, types::READY).map(|ready| ready.reason.clone()).unwrap_or_default();
        self.outcomes.get_or_create(&Outcome { result, reason }).inc();
        if let (Phase::Ready, Some(created)) = (new.phase, snapshot.metadata.creation_timestamp.as_ref()) {
            self.ready_seconds.observe(now.duration_since(created.0).as_secs_f64());
        }
    }

    /// Counts a reconcile that broke off.
    pub fn count_error(&self, controller: &'static str, kind: ErrorKind) {
        self.errors.get_or_create(&ErrorLabels { controller, kind: kind.as_str() }).inc();
    }

    /// Counts a reconcile.
    pub fn count_reconcile(&self, controller: &'static str, duration: Duration) {
        self.durations.get_or_create(&ControllerLabel { controller }).observe(duration.as_secs_f64());
    }
}

/// Counts the snapshots of each phase when it is asked, from the cache.
pub struct PhaseGauge(pub Store<Guarded<VMSnapshot>>);

impl fmt::Debug for PhaseGauge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PhaseGauge")
    }
}

impl Collector for PhaseGauge {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let phases: Vec<Phase> = self
            .0
            .state()
            .iter()
            .filter_map(|snapshot| snapshot.0.as_ref().ok()) // One that can't be read was logged as it arrived.
            .map(|snapshot| snapshot.status.as_ref().map_or(Phase::Pending, |status| status.phase))
            .collect();
        let mut family = encoder.encode_descriptor(
            "freezeframe_snapshots_current",
            "Snapshots by phase",
            None,
            MetricType::Gauge,
        )?;
        for phase in PHASES {
            let count = phases.iter().filter(|other| **other == phase).count();
            let gauge = ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX));
            gauge.encode(family.encode_family(&[("phase", format!("{phase:?}"))])?)?;
        }
        Ok(())
    }
}
