//! How old the latest good snapshot of each VM is, for those who would be woken when it is too old.

use std::fmt;

use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::{ScheduledVM, VMSnapshotSchedule, VMTarget};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt as _;
use kube::runtime::reflector::{ObjectRef, Store};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;

use super::timing::Timing;
use crate::caches::Guarded;
use crate::clock::Clock;

/// How long after a time of the schedule, and a VM's delay, its snapshot may take to be good: 15 minutes, in seconds.
const PATIENCE: i64 = 15 * 60;

/// Tells of every schedule when it is asked, from the caches. There are as many series as there are VMs under a schedule.
pub struct ScheduleGauges {
    /// All schedules.
    pub schedules: Store<Guarded<VMSnapshotSchedule>>,
    /// Their VMs.
    pub targets: Store<Guarded<VMTarget>>,
    /// What time it is.
    pub clock: Clock,
}

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
        let (state, now) = (self.schedules.state(), self.clock.now());
        let schedules: Vec<_> = state.iter().filter_map(|schedule| schedule.0.as_ref().ok()).collect();
        let vms = || schedules.iter().flat_map(|schedule| vms(schedule).map(move |vm| (*schedule, vm)));
        let ages = vms().map(|(schedule, vm)| (of_vm(schedule, vm), self.age(schedule, vm, now)));
        gauge(
            &mut encoder,
            "freezeframe_schedule_recovery_point_age_seconds",
            "Age of a VM's latest good snapshot; without one, of schedule or VM, whichever is younger",
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
        let limits = schedules.iter().filter_map(|schedule| Some((of_schedule(schedule), limit(schedule, now)?)));
        gauge(
            &mut encoder,
            "freezeframe_schedule_recovery_point_limit_seconds",
            "Age of the time before the last one whose snapshots had their time: what is older lacks two in a row",
            limits,
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

impl ScheduleGauges {
    /// A VM that is new has missed nothing, however old its schedule is.
    fn age(&self, schedule: &VMSnapshotSchedule, vm: &ScheduledVM, now: Timestamp) -> i64 {
        let key = ObjectRef::new(&vm.name).within(&schedule.namespace().unwrap_or_default());
        let seen = self.targets.get(&key).and_then(|target| target.creation_timestamp());
        let began = || schedule.creation_timestamp().into_iter().chain(seen).map(|time| time.0).max();
        last_success(vm).or_else(began).map_or(0, |since| now.duration_since(since).as_secs().max(0))
    }
}

/// Times that are unevenly apart, as those of working hours, are as far apart as they are: no interval tells of a weekend.
/// None for a schedule that can't be followed.
fn limit(schedule: &VMSnapshotSchedule, now: Timestamp) -> Option<i64> {
    let timing = Timing::new(&schedule.spec).ok()?;
    let jitter = schedule.spec.jitter.map_or(0, |jitter| std::time::Duration::from(jitter).as_secs());
    let patience = SignedDuration::from_secs(i64::try_from(jitter).ok()?.checked_add(PATIENCE)?);
    let last = timing.last(now - patience)?;
    let before = timing.last(last - SignedDuration::from_secs(1))?;
    Some(now.duration_since(before).as_secs())
}
