//! Whether a work order can be served: the VM, its disks, its drivers, its guest agent. Nothing is changed here.

use std::time::Duration;

use freezeframe_api::conditions::reasons;
use freezeframe_api::v1alpha1::{ConsistencyLevel, Fallback};
use freezeframe_qemu::{BlockGraph, FreezeStatus};
use k8s_openapi::jiff::Timestamp;
use tokio::time::{sleep, timeout};

use super::complete::cancelled;
use super::machine::Machine;
use super::order::Order;
use super::outcome::Failure;
use super::window::Freeze;
use super::{Progress, Sessions, still_wanted};
use crate::causes::chain;
use crate::drivers::DiskTask;
use crate::drivers::choice::{Candidate, candidates, choose};
use crate::drivers::overlay::left_running;
use crate::hypervisor::disks::{Disks, FoundDisk, disks};
use crate::hypervisor::{AGENT_TIMEOUT, QMP_TIMEOUT, Vm};

/// How long the guest agent may take to answer a sync before the freeze.
const AGENT_PATIENCE: Duration = Duration::from_secs(5);
/// How often a guest agent that isn't there is looked for.
const AGENT_POLL: Duration = Duration::from_millis(250);

/// An order that can be served.
pub struct Accepted {
    /// The disks, each with its driver.
    pub tasks: Vec<DiskTask>,
    /// The block graph that they were found in.
    pub graph: BlockGraph,
    /// Whether the VM's virtual CPUs run.
    pub running: bool,
    /// Whether the cut needs them stopped, freeze or not.
    pub needs_pause: bool,
}

/// Waits until the guest agent answers, in the order's time: the guest may be booting. First of all, so that what is found
/// out about the VM isn't old when it is cut. One that doesn't answer is for [`freeze`] to tell of.
pub async fn await_agent(vm: &mut Vm, order: &Order, progress: &dyn Progress) -> Result<(), Failure> {
    if order.required == ConsistencyLevel::Crash || !vm.run_state().await.map_err(|error| busy(&error))?.running {
        return Ok(());
    }
    let until_deadline = Duration::try_from(order.deadline.duration_since(Timestamp::now())).unwrap_or_default();
    let bound = order.agent_timeout.min(until_deadline);
    let answers = async {
        while vm.connect_agent(bound).await.is_err() {
            sleep(AGENT_POLL).await;
        }
    };
    tokio::select! {
        biased;
        () = cancelled(progress) => Err(Failure::cancelled()),
        // Whether it answered is asked again.
        _ = timeout(bound, answers) => still_wanted(order, progress),
    }
}

/// Connects to the order's VM, or opens its disks if it is stopped.
pub async fn open(sessions: &Sessions, order: &Order) -> Result<Machine, Failure> {
    let owed = sessions.guard.owed(&order.vm.to_string()).await;
    match owed {
        Ok(false) => {}
        Ok(true) => {
            let message = format!("the guard still owes VM {} a thaw from an earlier window", order.vm);
            return Err(Failure::new(reasons::THAW_OWED, message));
        }
        Err(error) => return Err(Failure::new(reasons::GUARD_UNAVAILABLE, chain(&error))),
    }
    sessions.machine(order).await
}

/// Finds the disks and chooses a driver for each.
pub async fn accept(sessions: &Sessions, order: &Order, machine: &Machine) -> Result<Accepted, Failure> {
    let vm = machine.vm();
    let candidates = candidates(&order.drivers, &sessions.drivers)
        .map_err(|error| Failure::refused(error.reason(), chain(&error)))?;
    // The one that we opened has no state, and no virtual CPU that ever ran.
    let running = !machine.is_still() && check_state(order, vm).await?;
    if !machine.is_still() {
        let made = left_running::make_way(vm, &sessions.roots).await;
        made.map_err(|error| Failure::refused(reasons::VM_BUSY, chain(&error)))?;
    }
    let Disks { mut found, out_of_reach, graph } = disks(vm, &sessions.roots).await.map_err(|error| busy(&error))?;
    let noted = sessions.note_not_followed(&order.vm, &mut found);
    noted.map_err(|error| Failure::refused(reasons::VM_BUSY, chain(&error)))?;
    let wanted = select(order, found, &out_of_reach, machine.left_out())?;
    let tasks = wanted.iter().enumerate().map(|(index, disk)| task(order, index, disk, &candidates));
    let tasks = tasks.collect::<Result<Vec<_>, _>>()?;
    let iothreads = vm.qmp().query_iothreads(QMP_TIMEOUT).await.map_err(|error| busy(&error))?;
    // Whether one transaction over disks on different iothreads is one instant has not been shown.
    Ok(Accepted { tasks, graph, running, needs_pause: !iothreads.is_empty() })
}

/// Whether the virtual CPUs run; a state in which a cut would be unsafe is refused.
async fn check_state(order: &Order, vm: &Vm) -> Result<bool, Failure> {
    let state = vm.run_state().await.map_err(|error| busy(&error))?;
    let refuse = |reason, what: String| Err(Failure::refused(reason, format!("VM {} {what}", order.vm)));
    let migration = vm.qmp().query_migrate_status(QMP_TIMEOUT).await.map_err(|error| busy(&error))?;
    let settled = ["none", "completed", "failed", "cancelled"];
    if let Some(status) = migration.filter(|status| !settled.contains(&status.as_str())) {
        return refuse(reasons::VM_BUSY, format!("has a migration under way ({status})"));
    }
    match state.status.as_str() {
        "running" => Ok(true),
        "paused" if order.may_be_crash() => Ok(false),
        "paused" => refuse(reasons::VM_PAUSED, "is paused, so its guest agent can't freeze anything".into()),
        other => refuse(reasons::VM_BUSY, format!("is in state `{other}`")),
    }
}

/// The disks that the order means: none is left out that the user didn't leave out.
fn select(
    order: &Order,
    found: Vec<FoundDisk>,
    out_of_reach: &[String],
    left_out: &[String],
) -> Result<Vec<FoundDisk>, Failure> {
    let elsewhere = |name: &String| out_of_reach.contains(name) || left_out.contains(name);
    let known = |name: &String| found.iter().any(|disk| disk.name == *name) || elsewhere(name);
    if let Some(missing) =
        order.include.iter().chain(&order.exclude).chain(order.targets.keys()).find(|name| !known(name))
    {
        let names: Vec<_> = found.iter().map(|disk| disk.name.as_str()).collect();
        let message = format!("VM {} has no disk `{missing}`; it has {}", order.vm, names.join(", "));
        return Err(Failure::refused(reasons::DISK_NOT_FOUND, message));
    }
    if let Some(name) = out_of_reach.iter().find(|name| order.wants(name, false)) {
        let message = format!("disk `{name}` stores its data past QEMU's block layer; exclude it to go without it");
        return Err(Failure::refused(reasons::DISK_NOT_SUPPORTED, message));
    }
    let disks: Vec<_> = found.into_iter().filter(|disk| order.wants(&disk.name, disk.is_read_only())).collect();
    if disks.is_empty() {
        return Err(Failure::refused(reasons::NO_DISKS, format!("VM {} has no disk to take", order.vm)));
    }
    Ok(disks)
}

fn task(order: &Order, index: usize, disk: &FoundDisk, candidates: &[Candidate]) -> Result<DiskTask, Failure> {
    let (candidate, reason) = choose(&disk.facts, order.targets.get(&disk.name).map(String::as_str), candidates)
        .map_err(|why| {
            let message = format!("no driver of the class can take disk `{}` of VM {}: {why}", disk.name, order.vm);
            Failure::refused(reasons::DISK_NOT_SUPPORTED, message)
        })?;
    Ok(DiskTask {
        disk: disk.name.clone(),
        driver: candidate.driver.name().to_owned(),
        reason,
        parameters: candidate.parameters.clone(),
        id: order.id(),
        index,
        node: disk.node.clone(),
        format: disk.facts.format.clone(),
        size: disk.size,
        path: disk.facts.path.clone().ok(),
        chain: disk.facts.chain.iter().flatten().map(|image| image.layer.clone()).collect(),
        vm: order.vm.clone(),
        snapshot: order.snapshot.1.clone(),
        target: order.targets.get(&disk.name).cloned(),
        start_with: None,
        state: serde_json::Value::Null,
        artifact: None,
    })
}

/// Makes sure that the guest can be frozen; none where the order does without or may do without.
pub async fn freeze(vm: &mut Vm, order: &Order) -> Result<Option<Freeze>, Failure> {
    if order.required == ConsistencyLevel::Crash || !vm.run_state().await.map_err(|error| busy(&error))?.running {
        return Ok(None);
    }
    match can_freeze(vm, order).await {
        Ok(()) => Ok(Some(Freeze { mountpoints: order.mountpoints.clone(), timeout: order.freeze_timeout })),
        Err(failure) if order.fallback == Fallback::Degrade && failure.reason != reasons::GUEST_ALREADY_FROZEN => {
            tracing::warn!(reason = failure.reason, message = failure.message, "the guest will not be frozen");
            Ok(None)
        }
        Err(failure) => Err(failure),
    }
}

async fn can_freeze(vm: &mut Vm, order: &Order) -> Result<(), Failure> {
    let refuse = |reason, what: String| Failure::new(reason, format!("VM {}: {what}", order.vm));
    let unavailable = |error: freezeframe_qemu::Error| {
        refuse(reasons::GUEST_AGENT_UNAVAILABLE, format!("the guest agent doesn't answer: {}", chain(&error)))
    };
    let agent = vm.connect_agent(AGENT_PATIENCE).await.map_err(unavailable)?;
    if agent.fsfreeze_status(AGENT_TIMEOUT).await.map_err(unavailable)? == FreezeStatus::Frozen {
        let what = "the guest is frozen already, by somebody else; thaw it first".to_owned();
        return Err(refuse(reasons::GUEST_ALREADY_FROZEN, what));
    }
    let info = agent.info(AGENT_TIMEOUT).await.map_err(unavailable)?;
    let freeze = if order.mountpoints.is_empty() { "guest-fsfreeze-freeze" } else { "guest-fsfreeze-freeze-list" };
    if !info.enabled(freeze) || !info.enabled("guest-fsfreeze-thaw") {
        return Err(refuse(reasons::FREEZE_FAILED, format!("the guest agent doesn't allow {freeze} and thaw")));
    }
    if order.mountpoints.is_empty() {
        // A loop-mounted file system whose backing one is frozen first blocks the guest agent for ever.
        let mounted = agent.filesystems(AGENT_TIMEOUT).await.map_err(unavailable)?;
        if let Some(found) = mounted.iter().find(|filesystem| filesystem.is_loop()) {
            let what = format!("{} is loop-mounted; name the mount points to freeze", found.mountpoint);
            return Err(refuse(reasons::FREEZE_FAILED, what));
        }
    }
    Ok(())
}

/// Fails if a disk came, went, or changed its size or node since it was planned, or the VM was paused or let go.
pub async fn unchanged(
    sessions: &Sessions,
    machine: &Machine,
    order: &Order,
    running: bool,
    tasks: &[DiskTask],
) -> Result<(), Failure> {
    if !machine.is_still() && check_state(order, machine.vm()).await? != running {
        let message = format!("VM {} was paused or let go on while the snapshot was prepared", order.vm);
        return Err(Failure::new(reasons::VM_CHANGED, message));
    }
    let Disks { found, out_of_reach, .. } = disks(machine.vm(), &sessions.roots).await.map_err(|error| busy(&error))?;
    same_disks(&select(order, found, &out_of_reach, machine.left_out())?, tasks)
}

fn same_disks(now: &[FoundDisk], tasks: &[DiskTask]) -> Result<(), Failure> {
    let is =
        |disk: &FoundDisk, task: &DiskTask| disk.name == task.disk && disk.node == task.node && disk.size == task.size;
    let changed = tasks.iter().find(|task| !now.iter().any(|disk| is(disk, task))).map(|task| &task.disk);
    let added = now.iter().map(|disk| &disk.name).find(|name| !tasks.iter().any(|task| task.disk == **name));
    match changed.or(added) {
        None => Ok(()),
        Some(disk) => {
            let message = format!("disk `{disk}` came, went or changed while the snapshot was prepared");
            Err(Failure::new(reasons::VM_CHANGED, message))
        }
    }
}

fn busy(error: &freezeframe_qemu::Error) -> Failure {
    Failure::new(reasons::VM_BUSY, format!("the VM's monitor failed: {}", chain(error)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drivers::{DiskFacts, Writers};
    use crate::hypervisor::VmKey;

    fn found(name: &str, size: u64) -> FoundDisk {
        let absent = || Err("not looked at".to_owned());
        FoundDisk {
            name: name.into(),
            node: format!("node-{name}"),
            size,
            overlay_bytes: 0,
            chain_depth: 0,
            apart: false,
            strays: Ok(()),
            facts: DiskFacts {
                format: "qcow2".into(),
                source: String::new(),
                path: absent(),
                device: Err(String::new()),
                on_device: None,
                filesystem: None,
                chain: Err(String::new()),
                encrypted: false,
                has_bitmaps: false,
                writers: Writers::Guest,
                not_followed: None,
            },
        }
    }

    fn task(name: &str, size: u64) -> DiskTask {
        DiskTask {
            disk: name.into(),
            driver: "overlay".into(),
            reason: String::new(),
            parameters: std::collections::BTreeMap::new(),
            id: "0".into(),
            index: 0,
            node: format!("node-{name}"),
            format: "qcow2".into(),
            size,
            path: None,
            chain: vec![],
            vm: VmKey { namespace: "n".into(), name: "v".into() },
            snapshot: "s".into(),
            target: None,
            start_with: None,
            state: serde_json::Value::Null,
            artifact: None,
        }
    }

    #[test]
    fn a_disk_that_comes_goes_or_grows_in_the_meantime_fails_the_snapshot() {
        let planned = [task("a", 1), task("b", 1)];
        assert!(same_disks(&[found("a", 1), found("b", 1)], &planned).is_ok());
        for now in
            [vec![found("a", 1)], vec![found("a", 1), found("b", 2)], vec![found("a", 1), found("b", 1), found("c", 1)]]
        {
            assert_eq!(same_disks(&now, &planned).unwrap_err().reason, reasons::VM_CHANGED);
        }
    }
}
