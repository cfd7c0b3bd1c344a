//! The status that follows from what was decided about a schedule. Pure.

use std::collections::BTreeMap;

use freezeframe_api::conditions::{self, condition, reasons, types};
use freezeframe_api::v1alpha1::{
    KeptSnapshot, RetentionPlan, ScheduledVM, VMSnapshot, VMSnapshotSchedule, VMSnapshotScheduleStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use k8s_openapi::jiff::{RoundMode, Timestamp, TimestampRound, Unit};
use kube::ResourceExt as _;

use super::judgement::{Judgements, is_active, removed, worth};
use super::keep::{Judged, Worth};
use super::made;
use super::observe::Observed;
use super::plan::Run;

/// Snapshots that are listed of one VM at the most.
const LISTED: usize = 64;

/// Snapshots that are listed in all: an object of the API must not grow over a megabyte or so.
const LISTED_IN_ALL: usize = 4096;

/// Why nothing is done.
#[derive(Clone, Debug)]
pub struct Stopped {
    /// Who stops it.
    pub by: Stop,
    /// The same in words.
    pub message: String,
}

/// Who stops a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Its user.
    Suspend,
    /// An administrator, with everything of its class.
    Pause,
}

/// The status of a schedule that can be followed. Nothing but news makes it differ from the one before.
pub fn status(
    observed: &Observed,
    runs: &[Run],
    judgements: &Judgements,
    next: Option<Timestamp>,
    stopped: Option<&Stopped>,
    now: Timestamp,
) -> VMSnapshotScheduleStatus {
    let mut draft = Draft::new(&observed.schedule, now);
    let mut vms: Vec<ScheduledVM> = runs.iter().map(|run| scheduled_vm(run, judgements, stopped)).collect();
    vms.extend(left_behind(observed, runs, judgements));
    vms.sort_by(|a, b| a.name.cmp(&b.name));
    let successes: Option<Vec<&MicroTime>> =
        runs.iter().map(|run| vms.iter().find(|vm| vm.name == run.vm.name)?.last_successful_time.as_ref()).collect();
    draft.status.last_successful_time = successes.and_then(|times| times.into_iter().min().cloned());
    draft.status.next_time = next.filter(|_| stopped.is_none()).map(Time);
    draft.status.vm_count = count(runs.len());
    draft.status.active_count = count(vms.iter().map(|vm| vm.active.len()).sum());
    draft.status.plan = judgements.iter().map(|(vm, judged)| retention_plan(vm, judged, judgements.len())).collect();
    draft.protection(observed, runs);
    draft.readiness(stopped, &vms);
    draft.status.vms = vms;
    draft.status
}

/// The status of a schedule that can't be followed.
pub fn stalled(schedule: &VMSnapshotSchedule, reason: &str, message: &str, now: Timestamp) -> VMSnapshotScheduleStatus {
    let mut draft = Draft::new(schedule, now);
    draft.set(types::READY, false, reason, message.to_owned());
    draft.set(types::STALLED, true, reason, message.to_owned());
    draft.status.message = Some(message.to_owned());
    draft.status.next_time = None;
    draft.status.vms.iter_mut().for_each(|vm| vm.next_time = None);
    draft.status
}

/// Adds to a status the snapshots that were made in the place of others.
pub fn taken_instead(status: &mut VMSnapshotScheduleStatus, snapshots: &[VMSnapshot]) {
    for snapshot in snapshots {
        let Some(vm) = status.vms.iter_mut().find(|vm| vm.name == snapshot.spec.vm_name) else { continue };
        vm.last_schedule_time = made::time_of(snapshot).map(Time);
        vm.active.push(snapshot.name_any());
        vm.message = None;
    }
    status.active_count = count(status.vms.iter().map(|vm| vm.active.len()).sum());
}

/// Takes from a status what was planned for these VMs and couldn't be done, and says why. The time stays due.
pub fn not_taken(
    status: &mut VMSnapshotScheduleStatus,
    schedule: &VMSnapshotSchedule,
    whys: &BTreeMap<String, String>,
    now: Timestamp,
) {
    if whys.is_empty() {
        return;
    }
    let old = schedule.status.clone().unwrap_or_default();
    for vm in &mut status.vms {
        let Some(why) = whys.get(&vm.name) else { continue };
        let before = old.vms.iter().find(|before| before.name == vm.name);
        vm.last_schedule_time = before.and_then(|before| before.last_schedule_time.clone());
        vm.active = before.map_or(vec![], |before| before.active.clone());
        vm.message = Some(format!("No snapshot: {why}."));
    }
    status.active_count = count(status.vms.iter().map(|vm| vm.active.len()).sum());
    let mut draft = Draft { status: std::mem::take(status), generation: schedule.metadata.generation, now };
    // As it was before: what was planned may have said otherwise, at another time.
    draft.status.conditions.retain(|condition| condition.type_ != types::PROTECTED);
    draft.status.conditions.extend(conditions::find(&old.conditions, types::PROTECTED).cloned());
    let names: Vec<&str> = whys.keys().map(String::as_str).collect();
    let first = whys.values().next().map_or("", String::as_str);
    let message = format!("No snapshot could be made of: {}. {first}.", some(&names));
    draft.set(types::PROTECTED, false, reasons::SNAPSHOT_FAILED, message.clone());
    draft.status.message = Some(message);
    *status = draft.status;
}

fn scheduled_vm(run: &Run, judgements: &Judgements, stopped: Option<&Stopped>) -> ScheduledVM {
    ScheduledVM {
        name: run.vm.name.clone(),
        last_schedule_time: run.mark.map(Time),
        last_successful_time: last_success(judgements, &run.vm.name),
        next_time: run.next.filter(|_| stopped.is_none()).map(whole_seconds),
        active: run.active.iter().map(kube::ResourceExt::name_any).collect(),
        deselected: false,
        message: run.message.clone(),
    }
}

fn last_success(judgements: &Judgements, vm: &str) -> Option<MicroTime> {
    let (judged, _) = judgements.get(vm)?;
    judged.iter().find(|one| one.snapshot.worth == Worth::Good).map(|one| MicroTime(one.snapshot.time))
}

/// VMs that are not selected any more and still have snapshots.
fn left_behind(observed: &Observed, runs: &[Run], judgements: &Judgements) -> Vec<ScheduledVM> {
    let mut others: BTreeMap<&str, Vec<&VMSnapshot>> = BTreeMap::new();
    for snapshot in &observed.snapshots {
        if !runs.iter().any(|run| run.vm.name == snapshot.spec.vm_name) {
            others.entry(&snapshot.spec.vm_name).or_default().push(snapshot);
        }
    }
    let stand = |(vm, snapshots): (&str, Vec<&VMSnapshot>)| ScheduledVM {
        name: vm.to_owned(),
        last_schedule_time: snapshots.iter().filter_map(|snapshot| made::time_of(snapshot)).max().map(Time),
        last_successful_time: last_success(judgements, vm),
        next_time: None,
        active: snapshots.iter().filter(|snapshot| is_active(snapshot)).map(|snapshot| snapshot.name_any()).collect(),
        deselected: true,
        message: None,
    };
    others.into_iter().map(stand).collect()
}

fn retention_plan(vm: &str, (today, then): &(Vec<Judged>, Vec<Judged>), vms: usize) -> RetentionPlan {
    let limit = (LISTED_IN_ALL / vms.max(1)).clamp(1, LISTED);
    let kept = today.iter().filter(|one| !one.reasons.is_empty()).take(limit);
    let keep = kept.map(|one| KeptSnapshot {
        name: one.snapshot.name.clone(),
        time: Some(MicroTime(one.snapshot.time)),
        reasons: one.reasons.clone(),
    });
    let going: Vec<String> = removed(today).cloned().collect();
    let next = removed(then).filter(|name| !going.contains(name)).take(limit).cloned().collect();
    RetentionPlan {
        vm_name: vm.to_owned(),
        keep: keep.collect(),
        remove: going.into_iter().take(limit).collect(),
        next,
    }
}

/// As the server keeps a time; else a status would differ from itself, read back, for ever. The next second, since nothing
/// is taken before the instant.
fn whole_seconds(instant: Timestamp) -> Time {
    let rounding = TimestampRound::new().smallest(Unit::Second).mode(RoundMode::Ceil);
    Time(instant.round(rounding).unwrap_or(instant)) // The last second of all times has no next one.
}

fn count(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

struct Draft {
    status: VMSnapshotScheduleStatus,
    generation: Option<i64>,
    now: Timestamp,
}

impl Draft {
    fn new(schedule: &VMSnapshotSchedule, now: Timestamp) -> Self {
        let mut status = schedule.status.clone().unwrap_or_default();
        status.observed_generation = schedule.metadata.generation;
        Self { status, generation: schedule.metadata.generation, now }
    }

    fn readiness(&mut self, stopped: Option<&Stopped>, vms: &[ScheduledVM]) {
        self.status.conditions.retain(|condition| condition.type_ != types::STALLED);
        let (reason, message) = match stopped {
            Some(stopped) if stopped.by == Stop::Suspend => (reasons::SUSPENDED, stopped.message.clone()),
            Some(stopped) => (reasons::PAUSED, stopped.message.clone()),
            None if vms.is_empty() => (reasons::SCHEDULED, "No VM is selected.".to_owned()),
            None => (reasons::SCHEDULED, format!("{} VMs are taken on schedule.", self.status.vm_count)),
        };
        self.set(types::READY, true, reason, message.clone());
        let told = conditions::find(&self.status.conditions, types::PROTECTED).filter(|found| found.status != "True");
        self.status.message = Some(told.filter(|_| stopped.is_none()).map_or(message, |found| found.message.clone()));
    }

    /// What the last snapshot of each VM that ended says of it.
    fn protection(&mut self, observed: &Observed, runs: &[Run]) {
        let last = |run: &Run| {
            let of_vm = observed.snapshots.iter().filter(|snapshot| snapshot.spec.vm_name == run.vm.name);
            let ended = of_vm.filter_map(|snapshot| Some((made::time_of(snapshot), worth(snapshot)?)));
            ended.max_by_key(|(time, _)| *time).map(|(_, worth)| worth)
        };
        let verdicts: Vec<(&str, Option<Worth>)> = runs.iter().map(|run| (run.vm.name.as_str(), last(run))).collect();
        let named = |wanted: fn(Option<Worth>) -> bool| {
            verdicts.iter().filter(|(_, worth)| wanted(*worth)).map(|(vm, _)| *vm).collect::<Vec<_>>()
        };
        let failed = named(|worth| matches!(worth, Some(Worth::Failed | Worth::Unproved)));
        let without = named(|worth| worth.is_none());
        if !failed.is_empty() {
            let message = format!("The last snapshot is not good of: {}.", some(&failed));
            self.set(types::PROTECTED, false, reasons::SNAPSHOT_FAILED, message);
        } else if !without.is_empty() {
            let message = format!("There is no snapshot yet of: {}.", some(&without));
            self.set(types::PROTECTED, false, reasons::NO_SNAPSHOT, message);
        } else {
            let message = "The last snapshot of each VM is good.".to_owned();
            self.set(types::PROTECTED, true, reasons::COMPLETED, message);
        }
    }

    fn set(&mut self, type_: &str, value: bool, reason: &str, message: String) {
        let new = condition(type_, value, reason, message, self.generation, self.now);
        conditions::set(&mut self.status.conditions, new);
    }
}

/// The first few names.
fn some(names: &[&str]) -> String {
    const NAMED: usize = 5;
    let mut text = names[..names.len().min(NAMED)].join(", ");
    if let Some(more) = names.len().checked_sub(NAMED).filter(|more| *more > 0) {
        text = format!("{text} and {more} more");
    }
    text
}
