//! What can be said of one VM at this moment.

use std::path::PathBuf;
use std::time::Duration;

use freezeframe_api::conditions::{condition, reasons, set, types};
use freezeframe_api::names::{DiskName, DriverName, NodeName};
use freezeframe_api::v1alpha1::{
    AgentState, DriverChoice, GuestAgentStatus, RunState, StartWith, TargetDisk, VMTargetStatus,
};
use k8s_openapi::jiff::Timestamp;

use super::stopped::Files;
use super::{follow, rates, space};
use crate::causes::chain;
use crate::drivers::{Drivers, Layer, SnapshotDriver, Verdict};
use crate::hypervisor::device::number_of;
use crate::hypervisor::disks::{FoundDisk, disks};
use crate::hypervisor::{AGENT_TIMEOUT, OpenError, Vm, VmKey};
use crate::session::Sessions;
use crate::session::outcome;

/// A probe must not keep a snapshot waiting for long.
const AGENT_PATIENCE: Duration = Duration::from_millis(500);

/// Probes a VM. What can't be learned now is kept from `before`.
pub async fn probe(
    sessions: &Sessions,
    vm: &VmKey,
    node: &str,
    files: &Files,
    before: Option<&VMTargetStatus>,
) -> VMTargetStatus {
    let mut status = before.cloned().unwrap_or_default();
    status.node_name = NodeName(node.to_owned());
    status.message = None;
    let mut exhausted = vec![];
    match Vm::open(&sessions.vm_root, vm).await {
        Ok(mut opened) => exhausted = look(&mut opened, vm, sessions, &mut status).await,
        Err(OpenError::NotRunning(_)) => {
            sessions.space.forget(vm);
            files.look(sessions, vm, &mut status).await;
            status.guest_agent.state = AgentState::Absent;
            status.disks.iter_mut().for_each(|disk| disk.write_bytes_per_second = None);
        }
        Err(error) => {
            status.run_state = RunState::Unknown;
            status.message = Some(chain(&error));
        }
    }
    if status.run_state == RunState::Paused && !exhausted.is_empty() {
        let disks = exhausted.join(", ");
        status.message =
            Some(format!("QEMU stopped the VM: there is no space left for what it writes to disk {disks}"));
    }
    conditions(&mut status, !exhausted.is_empty());
    status
}

/// Looks at a running VM; returns the disks that QEMU has no space left for.
async fn look(vm: &mut Vm, key: &VmKey, sessions: &Sessions, status: &mut VMTargetStatus) -> Vec<String> {
    let mut exhausted = vec![];
    status.qemu_version = Some(vm.qmp().version().to_owned());
    match vm.run_state().await {
        Ok(state) if state.running => status.run_state = RunState::Running,
        Ok(state) => {
            status.run_state = RunState::Paused;
            status.message = Some(format!("QEMU says `{}`", state.status));
        }
        Err(error) => {
            status.run_state = RunState::Unknown;
            status.message = Some(chain(&error));
        }
    }
    match disks(vm, &sessions.roots).await {
        Ok(mut found) => {
            follow::note_elsewhere(sessions, key, status, &mut found.found);
            status.disks = found.found.iter().map(|disk| target_disk(disk, &sessions.drivers)).collect();
            rates::measure(vm, key, &found.graph, &sessions.space).await;
            rates::tell(key, &sessions.space, &mut status.disks);
            space::report(status, &space::low(&found.found, sessions.space.low_percent));
            follow::report(status, &follow::not_followed(&found.found));
            exhausted = space::exhausted(&found.graph);
        }
        Err(error) => status.message = Some(format!("the disks can't be read: {}", chain(&error))),
    }
    status.guest_agent = guest_agent(vm, &status.guest_agent).await;
    exhausted
}

async fn guest_agent(vm: &mut Vm, before: &GuestAgentStatus) -> GuestAgentStatus {
    let version = before.version.clone();
    match vm.connect_agent(AGENT_PATIENCE).await {
        Ok(agent) => {
            // The version of an agent that answers a sync but not this is what it was.
            let info = agent.info(AGENT_TIMEOUT).await.ok();
            let version = info.map(|info| info.version).or(version);
            GuestAgentStatus { state: AgentState::Connected, version }
        }
        Err(freezeframe_qemu::Error::Timeout { .. }) => GuestAgentStatus { state: AgentState::NotResponding, version },
        Err(_) => GuestAgentStatus { state: AgentState::Absent, version },
    }
}

/// A disk, with each driver's verdict on it.
pub fn target_disk(disk: &FoundDisk, drivers: &Drivers) -> TargetDisk {
    let parameters = std::collections::BTreeMap::new();
    let choice = |driver: &dyn SnapshotDriver| {
        let (usable, message) = match driver.can_take(&disk.facts, &parameters) {
            Verdict::Usable(why) => (true, why),
            Verdict::Unusable(why) => (false, why),
        };
        DriverChoice { name: DriverName(driver.name().to_owned()), usable, message: Some(message) }
    };
    TargetDisk {
        name: DiskName(disk.name.clone()),
        format: disk.facts.format.clone(),
        source: disk.facts.source.clone(),
        size_bytes: i64::try_from(disk.size).unwrap_or(i64::MAX),
        read_only: disk.is_read_only(),
        chain_depth: i32::try_from(disk.chain_depth).unwrap_or(i32::MAX),
        overlay_bytes: i64::try_from(disk.overlay_bytes).unwrap_or(i64::MAX),
        write_bytes_per_second: None,
        start_with: start_with(disk),
        drivers: drivers.iter().map(|driver| choice(driver.as_ref())).collect(),
    }
}

/// The disk's own image, where the command line leads elsewhere.
fn start_with(disk: &FoundDisk) -> Option<StartWith> {
    let device = || Some(PathBuf::from(&disk.facts.source)).filter(|path| number_of(path).is_ok());
    let path = disk.facts.path.clone().ok().or_else(device).filter(|_| disk.apart)?;
    Some(outcome::start_with(&Layer { path, format: disk.facts.format.clone() }))
}

fn conditions(status: &mut VMTargetStatus, exhausted: bool) {
    let now = Timestamp::now();
    let running = status.run_state == RunState::Running;
    let (reason, message) = match status.run_state {
        RunState::Running => (reasons::COMPLETED, String::new()),
        RunState::Paused if exhausted => (reasons::NO_SPACE, status.message.clone().unwrap_or_default()),
        RunState::Paused => (reasons::VM_PAUSED, status.message.clone().unwrap_or_default()),
        RunState::Stopped => (reasons::VM_NOT_RUNNING, "no QEMU process answers".into()),
        RunState::Unknown => (reasons::VM_BUSY, status.message.clone().unwrap_or_default()),
    };
    set(&mut status.conditions, condition(types::READY, running, reason, message, None, now));
    let (connected, reason) = match status.guest_agent.state {
        AgentState::Connected => (true, reasons::COMPLETED),
        AgentState::NotResponding | AgentState::Absent => (false, reasons::GUEST_AGENT_UNAVAILABLE),
    };
    set(&mut status.conditions, condition(types::AGENT_CONNECTED, connected, reason, "", None, now));
}
