//! Decides what to do about a schedule. Pure: from what was observed and the time of day.

use std::collections::BTreeSet;
use std::time::Duration;

use freezeframe_api::conditions::reasons;
use freezeframe_api::v1alpha1::{
    ConcurrencyPolicy, ScheduleDeletionPolicy, VMSnapshot, VMSnapshotSchedule, VMSnapshotScheduleStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt as _;

use super::judgement::{is_active, judgements, protection, removed};
use super::made;
use super::observe::{Classes, Observed, Vm};
use super::status::{Stop, Stopped, status};
use super::timing::Timing;

/// What to do, in this order, and when to look again if nothing changes before.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// The writes.
    pub actions: Vec<Action>,
    /// How long until the mere passing of time changes the decision. None: never.
    pub again: Option<Duration>,
}

/// One write.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Delete a snapshot that is being taken, for the next one takes its place.
    Replace(Box<VMSnapshot>),
    /// Have a snapshot taken.
    Create(Box<VMSnapshot>),
    /// Have a snapshot taken in the place of one that the server refused.
    CreateInstead(Box<VMSnapshot>),
    /// Give a snapshot these owners.
    SetOwners(Box<VMSnapshot>, Vec<OwnerReference>),
    /// Tell the user.
    WriteStatus(Box<VMSnapshotScheduleStatus>),
    /// Remove those of these snapshots that the server too has nothing to say for.
    Prune(BTreeSet<String>),
}

/// How one VM stands, and what is to be done about it.
#[derive(Clone, Debug)]
pub struct Run {
    /// The VM.
    pub vm: Vm,
    /// The latest time for which there is, or was, a snapshot.
    pub mark: Option<Timestamp>,
    /// The time that a snapshot is due for.
    pub due: Option<Timestamp>,
    /// Since when a snapshot has been due, be it for an earlier time.
    pub waits_since: Option<Timestamp>,
    /// When the next one will be due.
    pub next: Option<Timestamp>,
    /// Its snapshots that are being taken.
    pub active: Vec<VMSnapshot>,
    /// What is in the way, or went wrong.
    pub message: Option<String>,
}

/// Decides.
pub fn plan(observed: &Observed, now: Timestamp) -> Plan {
    let schedule = &observed.schedule;
    if schedule.metadata.deletion_timestamp.is_some() {
        return Plan::default();
    }
    let (timing, vms) = match (Timing::new(&schedule.spec), &observed.vms) {
        (Ok(timing), Ok(vms)) => (timing, vms),
        (Err(error), _) => return stalled(schedule, error.reason(), &error.to_string(), now),
        (_, Err(message)) => return stalled(schedule, reasons::INVALID_SELECTOR, message, now),
    };
    let stopped = stopped(schedule, &observed.classes);
    let mut runs: Vec<Run> = vms.iter().map(|vm| run(vm, observed, &timing, now)).collect();
    let mut actions = vec![];
    if stopped.is_none() {
        start(&mut runs, observed, &mut actions);
    }
    actions.extend(ownership(observed));
    let next = runs.iter().filter_map(|run| run.next).min();
    let judgements = judgements(observed, &timing, next.unwrap_or(now), now);
    let new = status(observed, &runs, &judgements, timing.next(now), stopped.as_ref(), now);
    if schedule.status.as_ref() != Some(&new) {
        actions.push(Action::WriteStatus(Box::new(new)));
    }
    let removed: BTreeSet<String> = judgements.values().flat_map(|(today, _)| removed(today)).cloned().collect();
    if stopped.is_none() && !removed.is_empty() {
        actions.push(Action::Prune(removed));
    }
    Plan { actions, again: next.filter(|_| stopped.is_none()).map(|next| until(next, now)) }
}

fn stalled(schedule: &VMSnapshotSchedule, reason: &'static str, message: &str, now: Timestamp) -> Plan {
    let new = super::status::stalled(schedule, reason, message, now);
    let news = schedule.status.as_ref() != Some(&new);
    Plan { actions: news.then(|| Action::WriteStatus(Box::new(new))).into_iter().collect(), again: None }
}

fn stopped(schedule: &VMSnapshotSchedule, classes: &Classes) -> Option<Stopped> {
    if schedule.spec.suspend {
        return Some(Stopped { by: Stop::Suspend, message: "The schedule is suspended.".to_owned() });
    }
    let class = classes.paused(schedule.spec.template.class_name.as_deref())?;
    Some(Stopped { by: Stop::Pause, message: format!("Everything of VMSnapshotClass {class} is paused.") })
}

/// How a VM stands. A time that is still to come doesn't count as one for which there was a snapshot: a clock was wrong.
fn run(vm: &Vm, observed: &Observed, timing: &Timing, now: Timestamp) -> Run {
    let of_vm = || observed.snapshots.iter().filter(|snapshot| snapshot.spec.vm_name == vm.name);
    let told = observed.schedule.status.iter().flat_map(|status| &status.vms);
    let told = told.filter(|told| told.name == vm.name).filter_map(|told| Some(told.last_schedule_time.as_ref()?.0));
    let mark = of_vm().filter_map(made::time_of).chain(told).filter(|mark| *mark <= now).max();
    let active = of_vm().filter(|snapshot| is_active(snapshot)).cloned().collect();
    let mut run = Run { vm: vm.clone(), mark, due: None, waits_since: None, next: None, active, message: None };
    let Some((uid, vm_since)) = &vm.found else {
        run.message = Some(format!("There is no VMTarget {}.", vm.name));
        return run;
    };
    let delay = timing.delay(uid);
    let schedule_since = observed.schedule.creation_timestamp().map_or(Timestamp::UNIX_EPOCH, |time| time.0);
    let since = mark.unwrap_or(schedule_since.max(*vm_since));
    run.next = timing.next(now - delay).map(|next| next + delay);
    if let Some(time) = timing.last(now - delay).filter(|time| *time > since) {
        run.waits_since = timing.next(since).map(|first| first + delay);
        judge_lateness(&mut run, &observed.schedule, time, time + delay, now);
    }
    run
}

fn judge_lateness(run: &mut Run, schedule: &VMSnapshotSchedule, time: Timestamp, due: Timestamp, now: Timestamp) {
    let deadline = schedule.spec.starting_deadline.map(|deadline| signed(deadline.into()));
    if deadline.is_some_and(|deadline| now.duration_since(due) > deadline) {
        run.message = Some(format!("The snapshot of {time} was missed: it could not be started in time."));
    } else {
        run.due = Some(time);
    }
}

/// Starts what is due, the one that waits longest first, as far as there is room. Of those that wait equally long the one
/// whose last snapshot is the oldest goes first, so that no VM is left behind by its name. The others stand by, lest a VM
/// whose snapshots the server always refuses keep a place.
fn start(runs: &mut [Run], observed: &Observed, actions: &mut Vec<Action>) {
    let schedule = &observed.schedule;
    let under_way = observed.snapshots.iter().filter(|snapshot| is_active(snapshot)).count();
    let limit = schedule.spec.max_concurrent.and_then(|limit| usize::try_from(limit).ok());
    let mut room = limit.map_or(usize::MAX, |limit| limit.saturating_sub(under_way));
    let mut due: Vec<&mut Run> = runs.iter_mut().filter(|run| run.due.is_some()).collect();
    due.sort_by_key(|run| (run.waits_since, run.mark, run.vm.name.clone()));
    for run in due {
        let Some(time) = run.due else { continue };
        if !run.active.is_empty() {
            if let Some(message) = reason_to_wait(run, observed) {
                run.message = Some(message);
                continue;
            }
            actions.extend(run.active.drain(..).map(|snapshot| Action::Replace(Box::new(snapshot))));
        } else if let Some(less) = room.checked_sub(1) {
            room = less;
        } else {
            run.message = Some(format!("{} snapshots of the schedule are being taken already.", limit.unwrap_or(0)));
            let started = actions.iter().any(|action| matches!(action, Action::Create(_)));
            let instead = || Action::CreateInstead(Box::new(made::snapshot(schedule, &run.vm.name, time)));
            actions.extend(started.then(instead));
            continue;
        }
        let snapshot = made::snapshot(schedule, &run.vm.name, time);
        run.mark = Some(time);
        run.active.push(snapshot.clone());
        actions.push(Action::Create(Box::new(snapshot)));
    }
}

/// Why those that are being taken keep the next one waiting, if they do.
fn reason_to_wait(run: &Run, observed: &Observed) -> Option<String> {
    let names = || run.active.iter().map(kube::ResourceExt::name_any).collect::<Vec<_>>().join(", ");
    match observed.schedule.spec.concurrency_policy {
        ConcurrencyPolicy::Forbid => Some(format!("{} is still being taken.", names())),
        ConcurrencyPolicy::Replace => {
            let needed =
                |snapshot: &VMSnapshot| !protection(snapshot, &observed.restored, &observed.classes).is_empty();
            run.active.iter().any(needed).then(|| format!("{} is still being taken and is protected.", names()))
        }
    }
}

/// Has each snapshot say, as the policy wants it, whether it goes with the schedule. Snapshots outlive changes of it. One
/// that is held has no owner: a deletion that only the hold keeps from its end can't be taken back.
fn ownership(observed: &Observed) -> Vec<Action> {
    let owner = made::owner(&observed.schedule);
    let delete = observed.schedule.spec.deletion_policy == ScheduleDeletionPolicy::Delete;
    let wanted = |snapshot: &VMSnapshot| delete && !snapshot.spec.hold;
    let alive = observed.snapshots.iter().filter(|snapshot| snapshot.metadata.deletion_timestamp.is_none());
    let wrong =
        alive.filter(|snapshot| wanted(snapshot) != snapshot.owner_references().iter().any(|has| has.uid == owner.uid));
    wrong
        .map(|snapshot| {
            let mut owners = snapshot.owner_references().to_vec();
            owners.retain(|has| has.uid != owner.uid);
            owners.extend(wanted(snapshot).then(|| owner.clone()));
            Action::SetOwners(Box::new(snapshot.clone()), owners)
        })
        .collect()
}

fn until(instant: Timestamp, now: Timestamp) -> Duration {
    // A millisecond more, for timers count in these; and no time at all if the instant is past.
    Duration::try_from(instant.duration_since(now)).unwrap_or_default() + Duration::from_millis(1)
}

fn signed(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}
