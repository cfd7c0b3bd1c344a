//! Everything that is slow after the cut: copies, checks, and telling how far they are.

use std::convert::Infallible;
use std::time::Duration;

use freezeframe_api::v1alpha1::{BootCheck, VMSnapshotContentStatus, Verify};
use tokio::time::{MissedTickBehavior, interval};

use super::at_rest;
use super::journal::{JournalError, SessionRecord};
use super::outcome::{self, Failure};
use super::{Progress, Sessions};
use crate::boot::BootDisk;
use crate::drivers::{Artifact, DiskTask, DriverError, SnapshotDriver, verify};
use crate::hypervisor::Vm;
use crate::hypervisor::target_file::boot_with;

/// How often a session that waits for a copy looks whether it is still wanted.
const LOOK_FOR_CANCEL: Duration = Duration::from_millis(250);

/// How often it looks how far the copies are.
const LOOK_AT_COPIES: Duration = Duration::from_secs(3);
/// What all copies together must have come further, in percent, to be told: a snapshot costs twenty such reports at the
/// most, however many disks it has.
const STEP: i32 = 5;

/// Why a snapshot isn't complete.
pub(super) enum Incomplete {
    /// It never will be.
    Failed(Failure),
    /// What completing it needs is out of reach. The cut is good, so it isn't given up for that.
    OutOfReach(Failure),
}

impl From<Failure> for Incomplete {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<JournalError> for Incomplete {
    fn from(error: JournalError) -> Self {
        Self::Failed(error.into())
    }
}

impl Sessions {
    /// Completes and checks every disk.
    pub(super) async fn complete_tasks(
        &self,
        record: &mut SessionRecord,
        progress: &dyn Progress,
    ) -> Result<(), Incomplete> {
        // No guard is asked: nothing is held from here on, and a good cut isn't given up because a guard restarts.
        let machine = match self.machine_after_cut(&record.order).await {
            Ok(machine) => machine,
            Err(failure) if self.has_lost_its_copies(record).await => return Err(failure.into()),
            Err(failure) => return Err(Incomplete::OutOfReach(failure)),
        };
        self.go_on_with(machine.vm(), &record.tasks).await;
        let (order, tasks, status) = (record.order.clone(), record.tasks.clone(), outcome::cut(record));
        // A copy may take hours. What it leaves behind when it is dropped, removing finds.
        let completed = tokio::select! {
            biased;
            () = cancelled(progress) => Err(Failure::cancelled().into()),
            started = self.started(&machine, &order) => Err(started.into()),
            never = self.tell_progress(machine.vm(), &tasks, status, progress) => match never {},
            completed = self.complete_each(machine.vm(), record) => completed,
        };
        let still = machine.is_still();
        machine.let_go().await;
        if still && completed.is_ok() {
            record.at_rest = at_rest::look(&self.roots, &record.tasks);
        }
        completed
    }

    /// Whether data was still being copied by a QEMU that is gone.
    async fn has_lost_its_copies(&self, record: &SessionRecord) -> bool {
        let mut drivers = record.tasks.iter().filter_map(|task| self.driver(task).ok());
        drivers.any(|driver| !driver.is_instant()) && matches!(self.open_if_running(&record.order).await, Ok(None))
    }

    /// Has all disks' drivers do in earnest what the cut began. What fails here, completing finds.
    pub(super) async fn go_on_with(&self, vm: &Vm, tasks: &[DiskTask]) {
        for task in tasks {
            let Ok(driver) = self.driver(task) else { continue };
            if let Err(error) = driver.go_on(vm, task).await {
                tracing::warn!(
                    disk = task.disk,
                    error = crate::causes::chain(&error),
                    "what the cut began goes on slowly"
                );
            }
        }
    }

    async fn complete_each(&self, vm: &Vm, record: &mut SessionRecord) -> Result<(), Incomplete> {
        let verify = record.order.verify;
        for at in 0..record.tasks.len() {
            let task = &mut record.tasks[at];
            let completed = complete_and_verify(self.driver(task)?, vm, self, verify, task).await;
            self.journal.save(record)?;
            completed.map_err(|error| incomplete(&error))?;
        }
        if verify == Verify::Boot && record.boot.is_none() {
            record.boot = Some(self.try_to_boot(record).await);
        }
        Ok(())
    }

    /// What comes of it is told, and fails nothing: a guest without an agent is snapshotted as well.
    async fn try_to_boot(&self, record: &SessionRecord) -> BootCheck {
        let artifacts = record.tasks.iter().filter_map(|task| task.artifact.as_ref());
        let disk = |artifact: &Artifact| BootDisk { path: artifact.handle.clone(), format: artifact.format.clone() };
        let disks: Vec<_> = artifacts.map(disk).collect();
        let with = boot_with(&self.vm_root, &record.order.vm).unwrap_or_default();
        self.boots.check(&disks, &with, &self.roots).await
    }

    /// Tells how far the copies are each time they have come a step further, for ever.
    async fn tell_progress(
        &self,
        vm: &Vm,
        tasks: &[DiskTask],
        mut status: VMSnapshotContentStatus,
        progress: &dyn Progress,
    ) -> Infallible {
        let mut beat = interval(LOOK_AT_COPIES);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut told = 0;
        loop {
            beat.tick().await;
            for (task, disk) in tasks.iter().zip(&mut status.disks) {
                disk.progress_percent = self.percent(vm, task).await.or(disk.progress_percent);
            }
            let percents = status.disks.iter().filter_map(|disk| disk.progress_percent);
            let come: i32 = percents.sum();
            if come >= told + STEP * copies(&status) {
                told = come;
                progress.tell(status.clone()).await;
            }
        }
    }

    async fn percent(&self, vm: &Vm, task: &DiskTask) -> Option<i32> {
        // What can't be learned now is learned at the next look, and the copy's end doesn't hang on it.
        let percent = self.driver(task).ok()?.progress(vm, task).await.ok()?;
        percent.map(i32::from)
    }
}

fn incomplete(error: &DriverError) -> Incomplete {
    let failure = Failure::after_cut(error);
    if error.is_out_of_reach() { Incomplete::OutOfReach(failure) } else { Incomplete::Failed(failure) }
}

/// How many disks are copied; one where none is, so that nothing is ever told.
fn copies(status: &VMSnapshotContentStatus) -> i32 {
    let copied = status.disks.iter().filter(|disk| disk.progress_percent.is_some()).count();
    i32::try_from(copied.max(1)).unwrap_or(i32::MAX)
}

async fn complete_and_verify(
    driver: &dyn SnapshotDriver,
    vm: &Vm,
    sessions: &Sessions,
    level: Verify,
    task: &mut DiskTask,
) -> Result<(), DriverError> {
    driver.complete(vm, &sessions.roots, task).await?;
    verify::artifact(level, &sessions.roots, task).await
}

/// Resolves when the snapshot is not wanted any more.
pub(crate) async fn cancelled(progress: &dyn Progress) {
    let mut beat = tokio::time::interval(LOOK_FOR_CANCEL);
    while !progress.cancelled() {
        beat.tick().await;
    }
}
