//! What a session works on: the VM's own QEMU, or one of ours that has a stopped VM's disks.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use freezeframe_api::conditions::reasons;
use tokio::sync::watch;

use super::Sessions;
use super::journal::JournalError;
use super::order::Order;
use super::outcome::Failure;
use crate::causes::chain;
use crate::drivers::overlay::followed::{self, may_have_layer_elsewhere};
use crate::hypervisor::still::{Still, StillError};
use crate::hypervisor::target_file::{self, KnownDisk, TargetFileError};
use crate::hypervisor::{OpenError, Vm, VmKey};

/// After a start the `VMTarget`s have to be read first; the agent has reached the API by then.
const TARGETS_PATIENCE: Duration = Duration::from_secs(15);
/// How often a session of a stopped VM looks whether it still is.
const LOOK_FOR_START: Duration = Duration::from_millis(500);

/// A QEMU that has the VM's disks.
pub enum Machine {
    /// The VM's own.
    Own(Vm),
    /// One of ours, while the VM is stopped.
    Still {
        /// It.
        still: Still,
        /// Disks of the VM that it doesn't have open, since the order leaves them out.
        left_out: Vec<String>,
    },
    /// One of ours that looks at the disks of a VM that stopped after the cut: it may be started at any time.
    Look(Still),
}

impl Machine {
    /// The VM.
    pub fn vm(&self) -> &Vm {
        match self {
            Self::Own(vm) => vm,
            Self::Still { still, .. } | Self::Look(still) => still.vm(),
        }
    }

    /// The VM, to talk to its guest as well.
    pub fn vm_mut(&mut self) -> &mut Vm {
        match self {
            Self::Own(vm) => vm,
            Self::Still { still, .. } | Self::Look(still) => still.vm_mut(),
        }
    }

    /// Whether it has the disks of a stopped VM, and keeps the VM from starting.
    pub fn is_still(&self) -> bool {
        matches!(self, Self::Still { .. })
    }

    /// Disks that exist, though the machine doesn't have them.
    pub fn left_out(&self) -> &[String] {
        match self {
            Self::Own(_) | Self::Look(_) => &[],
            Self::Still { left_out, .. } => left_out,
        }
    }

    /// Lets the disks of a stopped VM go: it may be started, or something else be done to them.
    pub async fn let_go(self) {
        if let Self::Still { still, .. } | Self::Look(still) = self {
            still.stop().await;
        }
    }
}

/// What is known of VMs that don't run, and the QEMUs that have their disks between two turns of a session.
pub struct StoppedVms {
    seen: watch::Sender<Option<HashMap<VmKey, Vec<KnownDisk>>>>,
    held: Mutex<HashMap<String, Machine>>,
}

impl StoppedVms {
    /// Knows nothing before [`Self::set_seen`] has been called: who asks waits for it.
    #[must_use]
    pub fn awaiting_targets() -> Self {
        Self { seen: watch::Sender::new(None), held: Mutex::default() }
    }

    /// Knows no more than what the VMs' own files say.
    #[must_use]
    pub fn with_files_only() -> Self {
        Self { seen: watch::Sender::new(Some(HashMap::new())), held: Mutex::default() }
    }

    /// Remembers the disks that each VM was last seen with.
    pub fn set_seen(&self, disks: HashMap<VmKey, Vec<KnownDisk>>) {
        self.seen.send_replace(Some(disks));
    }

    /// The disks of a stopped VM: by its own file, else as it was last seen; none if nobody knows.
    pub async fn disks(&self, root: &Path, vm: &VmKey) -> Result<Vec<KnownDisk>, TargetFileError> {
        if let Some((file, _)) = target_file::read(root, vm)?.filter(|(file, _)| !file.disks.is_empty()) {
            return Ok(file.disks);
        }
        let mut seen = self.seen.subscribe();
        let seen = tokio::time::timeout(TARGETS_PATIENCE, seen.wait_for(Option::is_some)).await;
        let Ok(Ok(seen)) = seen else { return Ok(vec![]) };
        Ok(seen.as_ref().and_then(|seen| seen.get(vm)).cloned().unwrap_or_default())
    }

    /// Keeps a machine for the session's next turn.
    pub(super) fn keep(&self, order: &Order, machine: Machine) {
        if machine.is_still() {
            self.held().insert(order.uid.clone(), machine);
        }
    }

    /// The machine that was kept for an order.
    pub(super) fn take(&self, order: &Order) -> Option<Machine> {
        self.held().remove(&order.uid)
    }

    fn held(&self) -> MutexGuard<'_, HashMap<String, Machine>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sessions {
    /// The QEMU in which a VM's disks can be cut: its own if it runs, else one of ours.
    pub(super) async fn machine(&self, order: &Order) -> Result<Machine, Failure> {
        let Some(vm) = self.running(order).await? else { return self.still(order).await };
        Ok(Machine::Own(vm))
    }

    /// The QEMU in which what was cut can be completed: that of the cut, if it was kept.
    pub(super) async fn machine_after_cut(&self, order: &Order) -> Result<Machine, Failure> {
        if let Some(machine) = self.stopped.take(order) {
            return Ok(machine);
        }
        if let Some(vm) = self.running(order).await? {
            return Ok(Machine::Own(vm));
        }
        let (disks, _) = self.known_disks(order).await?;
        let still = Still::look(&order.vm, &disks, &self.roots).await;
        still.map(Machine::Look).map_err(|error| unopened(&error))
    }

    async fn running(&self, order: &Order) -> Result<Option<Vm>, Failure> {
        match Vm::open(&self.vm_root, &order.vm).await {
            Ok(vm) => Ok(Some(vm)),
            Err(OpenError::NotRunning(_)) => Ok(None),
            Err(error) => Err(Failure::refused(reasons::VM_BUSY, chain(&error))),
        }
    }

    async fn still(&self, order: &Order) -> Result<Machine, Failure> {
        if !order.may_be_crash() {
            let message = format!(
                "VM {} doesn't run, so nothing in it can be frozen; with required level Crash, or fallback Degrade, \
                 its disks are taken as they lie",
                order.vm
            );
            return Err(Failure::refused(reasons::VM_NOT_RUNNING, message));
        }
        let (disks, left_out) = self.known_disks(order).await?;
        let still = Still::start(&order.vm, &disks, &self.roots).await.map_err(|error| unopened(&error))?;
        Ok(Machine::Still { still, left_out })
    }

    /// The disks of a stopped VM that the order means, and the names of the others.
    async fn known_disks(&self, order: &Order) -> Result<(Vec<KnownDisk>, Vec<String>), Failure> {
        let known = self.stopped.disks(&self.vm_root, &order.vm).await;
        let known = known.map_err(|error| Failure::refused(reasons::DISK_NOT_FOUND, chain(&error)))?;
        if known.is_empty() {
            let message = format!(
                "VM {} doesn't run, and its disks aren't known: it was never seen running, and no {} names them",
                order.vm,
                target_file::FILE
            );
            return Err(Failure::refused(reasons::VM_NOT_RUNNING, message));
        }
        let now = self.disks_now(&order.vm, &known);
        let now = now.map_err(|error| Failure::refused(reasons::DISK_NOT_FOUND, chain(&error)))?.into_iter();
        let (wanted, others): (Vec<_>, Vec<_>) = now.partition(|disk| order.wants(&disk.name, disk.read_only));
        Ok((wanted, others.into_iter().map(|disk| disk.name).collect()))
    }

    /// What disks that were last known as `known` are by now.
    pub(crate) fn disks_now(&self, vm: &VmKey, known: &[KnownDisk]) -> Result<Vec<KnownDisk>, JournalError> {
        let mut now: Vec<_> = known.iter().map(|disk| followed::now(disk, &self.roots)).collect();
        let may_have_layers = now.iter().map(|disk| may_have_layer_elsewhere(&disk.format, &disk.path));
        let layers = self.layers_elsewhere(vm, may_have_layers)?;
        // A layer on a device is the image of the next.
        for _ in 0..layers.len() {
            for (image, layer) in &layers {
                for disk in now.iter_mut().filter(|disk| disk.path == *image) {
                    (disk.path, disk.format) = (layer.clone(), "qcow2".into());
                }
            }
        }
        Ok(now)
    }

    /// Fails once a VM whose disks we have is being started: what was cut then may not be of one instant.
    pub(super) async fn still_stopped(&self, order: &Order) -> Result<(), Failure> {
        match Vm::open(&self.vm_root, &order.vm).await {
            Err(OpenError::NotRunning(_)) => Ok(()),
            Ok(_) | Err(OpenError::Monitor { .. }) => {
                let message = format!("VM {} was started while its snapshot was taken", order.vm);
                Err(Failure::new(reasons::VM_CHANGED, message))
            }
        }
    }

    /// Resolves when the VM whose disks we have is being started; never for a VM that runs.
    pub(super) async fn started(&self, machine: &Machine, order: &Order) -> Failure {
        if !machine.is_still() {
            return std::future::pending().await;
        }
        let mut beat = tokio::time::interval(LOOK_FOR_START);
        loop {
            beat.tick().await;
            if let Err(failure) = self.still_stopped(order).await {
                return failure;
            }
        }
    }
}

fn unopened(error: &StillError) -> Failure {
    let reason = match error {
        StillError::Disk { .. } => reasons::DISK_NOT_FOUND,
        StillError::Start { .. } => reasons::PREPARE_FAILED,
        StillError::Reach { .. } | StillError::Graph { .. } | StillError::Qemu { .. } => reasons::VM_BUSY,
    };
    Failure::refused(reason, chain(error))
}
