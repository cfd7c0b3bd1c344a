//! Whether a VM's chains are deeper than its snapshots' classes want, and shortening those that are.

use std::path::Path;

use super::Sessions;
use super::journal::{JournalError, SessionRecord, Stage};
use super::limits;
use crate::drivers::overlay::shorten::{self, TooDeep};
use crate::drivers::{DriverError, Env, Sibling};
use crate::hypervisor::still::StillError;
use crate::hypervisor::{OpenError, Vm, VmKey};
use crate::locks::Waiting;
use crate::restore::reading;

/// Why a VM's chains can't be looked at, or not be shortened now.
#[derive(Debug, thiserror::Error)]
pub enum ShorteningError {
    /// The VM's monitor can't be used.
    #[error(transparent)]
    Vm(#[from] OpenError),
    /// The guard owes the VM a thaw, or can't be asked.
    #[error("the guard can't be asked, or still owes VM {0} a thaw")]
    Owed(VmKey),
    /// The driver can't.
    #[error("the chains of VM {vm} can't be shortened now")]
    Driver {
        /// The VM.
        vm: VmKey,
        /// Why.
        #[source]
        source: Box<DriverError>,
    },
    /// A stopped VM's disks can't be opened.
    #[error(transparent)]
    Still(#[from] StillError),
    /// The journal can't be read.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// Ends what an agent that died left unfinished: QEMU would refuse to cut a disk beside it.
pub(super) async fn make_way(vm: &Vm) -> Result<(), DriverError> {
    shorten::make_way(vm).await
}

/// How deep a VM's chains are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Depth {
    /// None is deeper than it may be, or nobody says how deep they may be.
    Enough,
    /// It can't be seen now: the VM is being started, its disks aren't known, or something else is done to its layers.
    Unseen,
    /// Some are deeper, and snapshots need all of their images: which, in words.
    Needed(Vec<String>),
    /// Some are deeper, and something else is in the way: what, in words.
    Hindered(Vec<String>),
}

impl Sessions {
    /// VMs with snapshots whose classes limit the depth of chains.
    pub fn limited(&self) -> Result<Vec<VmKey>, JournalError> {
        let limited = self.journal.all()?.into_iter().filter(|record| depth_of(record).is_some());
        let mut vms: Vec<_> = limited.map(|record| record.order.vm).collect();
        vms.sort();
        vms.dedup();
        Ok(vms)
    }

    /// Shortens the chains of a VM that are deeper than they may be. Cut off anywhere it leaves every image as it reads;
    /// it makes way for a snapshot that waits.
    pub async fn shorten(&self, vm: &VmKey, waiting: &Waiting) -> Result<Depth, ShorteningError> {
        let records: Vec<_> = self.journal.all()?.into_iter().filter(|record| is_of(record, vm)).collect();
        let Some(deepest) = records.iter().filter_map(depth_of).min() else { return Ok(Depth::Enough) };
        let copied = !reading::of_vm(self, vm)?.is_empty();
        if copied || records.iter().any(|record| self.is_under_way(record)) {
            return Ok(Depth::Unseen);
        }
        if !matches!(self.guard.owed(&vm.to_string()).await, Ok(false)) {
            return Err(ShorteningError::Owed(vm.clone()));
        }
        let opened = match Vm::open(&self.vm_root, vm).await {
            Ok(opened) => opened,
            Err(OpenError::NotRunning(_)) => return self.shorten_stopped(vm, deepest, &records, waiting).await,
            Err(error) => return Err(error.into()),
        };
        let siblings: Vec<_> = records.iter().flat_map(|record| self.files_of(record)).collect();
        let pace = limits::slowest(records.iter().map(|record| &record.order.limits), waiting);
        let env = Env { vm: Some(&opened), roots: &self.roots, siblings: &siblings, pace: &pace };
        match Box::pin(shorten::shorten(&env, &opened, deepest)).await {
            Ok(left) => Ok(self.depth(&left, deepest, &records)),
            Err(error) => unfinished(vm, error),
        }
    }

    pub(super) fn depth(&self, left: &[TooDeep], deepest: usize, records: &[SessionRecord]) -> Depth {
        if left.is_empty() {
            return Depth::Enough;
        }
        let disks = left.iter().map(|disk| said(disk, deepest, records, self)).collect();
        let hindered = left.iter().any(|disk| disk.hindrance.is_some());
        if hindered { Depth::Hindered(disks) } else { Depth::Needed(disks) }
    }

    /// Whether it may change by itself which files the snapshots have.
    fn is_under_way(&self, record: &SessionRecord) -> bool {
        let kept = record.stage == Stage::Retained;
        matches!(record.stage, Stage::Open | Stage::Cut | Stage::Failed)
            || !kept && record.tasks.iter().any(|task| self.is_half_removed(task))
    }

    pub(super) fn files_of(&self, record: &SessionRecord) -> Vec<Sibling> {
        let retained = record.stage == Stage::Retained;
        let files = record.tasks.iter().filter_map(|task| self.drivers.find(&task.driver)?.place(task));
        files.map(|handle| Sibling { handle, retained }).collect()
    }
}

pub(super) fn unfinished(vm: &VmKey, error: DriverError) -> Result<Depth, ShorteningError> {
    match error {
        DriverError::MadeWay => Ok(Depth::Unseen),
        source => Err(ShorteningError::Driver { vm: vm.clone(), source: Box::new(source) }),
    }
}

fn is_of(record: &SessionRecord, vm: &VmKey) -> bool {
    record.order.vm == *vm && record.stage != Stage::Removed
}

/// How deep chains may be by one snapshot's class, as it was when it was taken.
fn depth_of(record: &SessionRecord) -> Option<usize> {
    let limit = record.order.limits.max_chain_depth.filter(|_| record.stage != Stage::Removed)?;
    usize::try_from(limit).ok()
}

fn said(disk: &TooDeep, deepest: usize, records: &[SessionRecord], sessions: &Sessions) -> String {
    let TooDeep { disk: name, depth, needed, hindrance } = disk;
    let snapshot = |file: &Path| {
        let has = |record: &&SessionRecord| sessions.files_of(record).iter().any(|sibling| sibling.handle == file);
        records.iter().find(has).map(|record| record.order.snapshot.1.clone())
    };
    let names: Vec<_> = needed.iter().filter_map(|file| snapshot(file)).collect();
    let deep =
        format!("disk {name} reads through {depth} images, and its snapshots' classes want {deepest} at the most");
    match hindrance {
        Some(why) => format!("{deep}: {why}"),
        None if names.is_empty() => format!("{deep}: none of them may be left out"),
        None => format!(
            "{deep}: snapshots need them, the oldest first: {}; deleting snapshots makes it shorter",
            names.join(", ")
        ),
    }
}
