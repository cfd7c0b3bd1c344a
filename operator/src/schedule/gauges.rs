//! How old the latest good snapshot of each VM is, for those who would be woken when it is too old.

use std::fmt;

use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::{ScheduledVM, VMSnapshotSchedule};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use kube::runtime::reflector::Store;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;

use super::timing::Timing;
use crate::caches::Guarded;
use crate::clock::Clock;

/// Tells of every schedule when it is asked, from the cache. There are as many series as there are VMs under a schedule.
pub struct ScheduleGauges(pub Store<Guarded<VMSnapshotSchedule>>, pub Clock);

impl fmt::Debug for ScheduleGauges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ScheduleGauges")
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfVm {
    namespace: String,
    schedule: String,
    vm: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfSchedule {
    namespace: String,
    schedule: String,
    /// Whether it is suspended, or its class paused.
    stopped: &'static str,
}

impl Collector for ScheduleGauges {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let (state, now) = (self.0.state(), self.1.now());
        let schedules: Vec<_> = state.iter().filter_map(|schedule| schedule.0.as_ref().ok()).collect();
        let vms = || schedules.iter().flat_map(|schedule| vms(schedule).map(move |vm| (*schedule, vm)));
        let ages = vms().map(|(schedule, vm)| (of_vm(schedule, vm), age(schedule, vm, now)));
        gauge(
            &mut encoder,
            "freezeframe_schedule_recovery_point_age_seconds",
            "Age of a VM's latest good snapshot; without one, age of the schedule",
            ages,
        )?;
        let successes = vms().filter_map(|(schedule, vm)| Some((of_vm(schedule, vm), last_success(vm)?.as_second())));
        gauge(
            &mut encoder,
            "freezeframe_schedule_last_success_timestamp_seconds",
            "Cut of a VM's latest good snapshot",
            successes,
        )?;
        let ready = schedules.iter().map(|schedule| (of_schedule(schedule), i64::from(is_ready(schedule))));
        gauge(&mut encoder, "freezeframe_schedule_ready", "1 for a schedule that can be followed, else 0", ready)?;
        let intervals = schedules.iter().filter_map(|schedule| Some((of_schedule(schedule), interval(schedule, now)?)));
        gauge(
            &mut encoder,
            "freezeframe_schedule_interval_seconds",
            "Time between the last time of a schedule and the next one, jitter included",
            intervals,
        )
    }
}

fn gauge<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (L, i64)>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in values {
        ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

/// The VMs that are still selected: of the others nobody wants a new snapshot.
fn vms(schedule: &VMSnapshotSchedule) -> impl Iterator<Item = &ScheduledVM> {
    schedule.status.iter().flat_map(|status| &status.vms).filter(|vm| !vm.deselected)
}

fn ready(schedule: &VMSnapshotSchedule) -> Option<&Condition> {
    find(&schedule.status.as_ref()?.conditions, types::READY)
}

fn is_ready(schedule: &VMSnapshotSchedule) -> bool {
    ready(schedule).is_some_and(|ready| ready.status == "True")
}

fn of_vm(schedule: &VMSnapshotSchedule, vm: &ScheduledVM) -> OfVm {
    OfVm { namespace: schedule.namespace().unwrap_or_default(), schedule: schedule.name_any(), vm: vm.name.clone() }
}

fn of_schedule(schedule: &VMSnapshotSchedule) -> OfSchedule {
    let reason = ready(schedule).map_or("", |ready| &ready.reason);
    let is_stopped = [reasons::SUSPENDED, reasons::PAUSED].contains(&reason);
    OfSchedule {
        namespace: schedule.namespace().unwrap_or_default(),
        schedule: schedule.name_any(),
        stopped: if is_stopped { "true" } else { "false" },
    }
}

fn last_success(vm: &ScheduledVM) -> Option<Timestamp> {
    vm.last_successful_time.as_ref().map(|time| time.0)
}

fn age(schedule: &VMSnapshotSchedule, vm: &ScheduledVM, now: Timestamp) -> i64 {
    let since = last_success(vm).or_else(|| schedule.creation_timestamp().map(|time| time.0));
    since.map_or(0, |since| now.duration_since(since).as_secs().max(0))
}

/// None for a schedule that can't be followed.
fn interval(schedule: &VMSnapshotSchedule, now: Timestamp) -> Option<i64> {
    let timing = Timing::new(&schedule.spec).ok()?;
    let jitter = schedule.spec.jitter.map_or(0, |jitter| std::time::Duration::from(jitter).as_secs());
    let between = timing.next(now)?.duration_since(timing.last(now)?).as_secs();
    between.checked_add(i64::try_from(jitter).ok()?)
}
