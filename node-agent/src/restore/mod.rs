//! A restore: one snapshot's disks brought back, in place or as a new VM's.
//!
//! ```text
//!  plan ─► (in place: the VM stops, its state is kept as a snapshot) ─► make ─► switch ─► done
//!                                                                        │        │
//!                                          take back ◄───────────────────┴────────┘   (until the first name changes hands)
//! ```
//!
//! - *plan*: what would be done; nothing is. A dry run ends here.
//! - *stop*: a restore in place sees to it that the VM doesn't run. The operator then has the VM's state kept as a
//!   snapshot of its own, and only says `Restore` when that is complete.
//! - *make*: each new image, under a name of its own, complete and on disk. Full copies for a new VM are made without the
//!   turn of the snapshot's VM ([`reading`]).
//! - *switch*: the images get the disks' names ([`switch`]), or a new VM gets its directory ([`new_vm`]).
//!
//! What is made is named in the journal first. A restore that a crash interrupted goes on where it was; one that failed
//! or was cancelled is taken back, unless a name has changed hands: then it goes on, but for a VM that was written to in
//! between ([`halfway`]).

mod controller;
mod directory;
mod finish;
mod halfway;
mod links;
mod make;
mod names;
mod new_vm;
pub mod order;
mod outcome;
mod plan;
pub(crate) mod reading;
pub mod record;
mod removal;
mod source;
mod stop;
mod switch;
mod tool;
mod volumes;

use std::sync::Arc;

use freezeframe_api::v1alpha1::{BootCheck, RestoreContentPhase, RestoreStep, RestoreVerify, VMRestoreContentStatus};
use tokio::sync::watch;

use crate::boot::{BootDisk, Boots};
use crate::crash;
use crate::hypervisor::target_file;
use crate::session::journal::{Journal, JournalError};
use crate::session::outcome::Failure;
use crate::session::{Progress, Sessions, cancelled};
pub(crate) use links::image_on_top;
use order::RestoreOrder;
use record::{DiskRestore, Method, RestoreRecord, Stage};

/// What restores of this node share.
pub struct Restores {
    /// The snapshots' records, and where VMs and images are.
    pub sessions: Arc<Sessions>,
    /// The records.
    pub journal: Journal<RestoreRecord>,
    /// What tries whether disks boot.
    pub boots: Arc<Boots>,
}

/// Where a restore's progress is told while it works.
pub type Told = watch::Sender<Option<VMRestoreContentStatus>>;

/// What came of working on a restore.
pub enum Turn {
    /// Report this status; there is nothing more to do before the order changes.
    Over(Box<VMRestoreContentStatus>),
    /// Report this status, and try again later.
    Again(Box<VMRestoreContentStatus>),
}

impl Restores {
    /// Does what an order's step asks for, or goes on with what was interrupted. May be dropped at any await, and
    /// called again.
    pub async fn advance(
        &self,
        order: &RestoreOrder,
        progress: &dyn Progress,
        told: &Told,
    ) -> Result<Turn, JournalError> {
        let stopped = |record: &RestoreRecord| record.stage == Stage::Stopped;
        let same =
            |record: &RestoreRecord| (record.order.step, record.order.generation) == (order.step, order.generation);
        let found = self.journal.load(&order.uid)?.filter(|record| !stopped(record) || same(record));
        let Some(mut record) = found else { return self.begin(order, progress, told).await };
        record.order.generation = order.generation;
        match record.stage {
            Stage::Open => self.work_again(&mut record, progress, told).await,
            Stage::Switching => self.switch_again(&mut record).await,
            Stage::Failed => self.take_back(&mut record).await,
            Stage::Stopped | Stage::Done | Stage::TakenBack => {
                Ok(Turn::Over(Box::new(record.status.unwrap_or_default())))
            }
        }
    }

    async fn begin(&self, order: &RestoreOrder, progress: &dyn Progress, told: &Told) -> Result<Turn, JournalError> {
        if let Some(going) = source::is_moving(self, order)? {
            return Ok(Turn::Again(Box::new(outcome::waiting(order, &going))));
        }
        let disks = match self.before(order, progress).await {
            Ok(disks) => disks,
            Err(failure) => {
                tracing::warn!(reason = failure.reason, message = failure.message, "the restore was refused");
                return self.stop_or_plan_ended(order, Stage::TakenBack, outcome::failed(order, &[], &failure));
            }
        };
        let planned = |phase| outcome::planned(order, &disks, phase);
        match order.step {
            RestoreStep::Plan => Ok(Turn::Over(Box::new(planned(RestoreContentPhase::Planned)))),
            RestoreStep::Stop => self.stop_or_plan_ended(order, Stage::Stopped, planned(RestoreContentPhase::Stopped)),
            RestoreStep::Restore => {
                tracing::info!(disks = disks.len(), "bringing disks back");
                let mut record = RestoreRecord::new(order, disks);
                self.journal.save(&record)?;
                crash::point("restore-planned");
                self.work(&mut record, progress, told).await
            }
        }
    }

    /// What stopping the VM came to is on record: it isn't shut down a second time if that can't be reported at once, or
    /// is asked again.
    fn stop_or_plan_ended(
        &self,
        order: &RestoreOrder,
        stage: Stage,
        status: VMRestoreContentStatus,
    ) -> Result<Turn, JournalError> {
        if order.step == RestoreStep::Stop {
            let record = RestoreRecord { stage, status: Some(status.clone()), ..RestoreRecord::new(order, vec![]) };
            self.journal.save(&record)?;
        }
        Ok(Turn::Over(Box::new(status)))
    }

    /// Everything before something is made.
    async fn before(&self, order: &RestoreOrder, progress: &dyn Progress) -> Result<Vec<DiskRestore>, Failure> {
        if progress.cancelled() {
            return Err(Failure::cancelled());
        }
        let disks = plan::plan(self, order).await?;
        if order.new_vm.is_none() && order.step == RestoreStep::Stop {
            stop::see_stopped(self, order, &disks, progress).await?;
        }
        Ok(disks)
    }

    /// A crash came in between, and the VM's turn was free: another snapshot may have been removed, and what the record
    /// names may be another's data since.
    async fn work_again(
        &self,
        record: &mut RestoreRecord,
        progress: &dyn Progress,
        told: &Told,
    ) -> Result<Turn, JournalError> {
        if let Some(going) = source::is_moving(self, &record.order)? {
            return Ok(Turn::Again(Box::new(outcome::stuck(record, &going))));
        }
        match source::check_unmoved(self, record) {
            Ok(()) => self.work(record, progress, told).await,
            Err(failure) => self.fail(record, &failure).await,
        }
    }

    async fn work(
        &self,
        record: &mut RestoreRecord,
        progress: &dyn Progress,
        told: &Told,
    ) -> Result<Turn, JournalError> {
        let only_reads = record.only_reads();
        if only_reads {
            progress.only_reads();
        }
        let made = tokio::select! {
            biased;
            () = cancelled(progress) => Err(Failure::cancelled()),
            made = self.make(record, told) => made,
        };
        // Nothing may have moved it, but somebody may have written to it.
        let unmoved = || if only_reads { source::check_unmoved(self, record) } else { Ok(()) };
        match made.and_then(|()| unmoved()) {
            Ok(()) => self.switch(record).await,
            Err(failure) => self.fail(record, &failure).await,
        }
    }

    /// Makes all images.
    async fn make(&self, record: &mut RestoreRecord, told: &Told) -> Result<(), Failure> {
        if record.order.new_vm.is_none() {
            stop::not_running(self, &record.order.vm).await?;
        }
        let id = record.order.id();
        plan::check_space(self, &record.order, &record.disks).await?;
        self.note_links(record)?;
        directory::make(&self.sessions.roots, &record.order, &record.disks)?;
        for at in 0..record.disks.len() {
            told.send_replace(Some(outcome::restoring(record, None)));
            let percent = |percent| drop(told.send_replace(Some(outcome::restoring(record, Some((at, percent))))));
            let made = make::make(self, &record.disks[at], &id, &percent).await?;
            record.disks[at].made = Some(made);
            self.journal.save(record)?;
            crash::point("restore-made");
        }
        if record.order.verify == RestoreVerify::Boot && record.boot.is_none() {
            told.send_replace(Some(outcome::restoring(record, None)));
            record.boot = Some(self.try_to_boot(record).await);
            self.journal.save(record)?;
        }
        Ok(())
    }

    /// Before any name changes hands, so that nobody else has the images open. What comes of it is told, and no more:
    /// a guest without an agent, or with a data disk alone, is restored as well.
    async fn try_to_boot(&self, record: &RestoreRecord) -> BootCheck {
        let id = record.order.id();
        let image = |disk: &DiskRestore| BootDisk { path: disk.unfinished(&id), format: disk.format.clone() };
        let images: Vec<_> = record.disks.iter().map(image).collect();
        let with = target_file::boot_with(&self.sessions.vm_root, &record.order.vm).unwrap_or_default();
        self.boots.check(&images, &with, &self.sessions.roots).await
    }

    /// The snapshot's record says where images may depend on its data, before the first does.
    fn note_links(&self, record: &RestoreRecord) -> Result<(), Failure> {
        let Some(mut snapshot) = self.sessions.journal.load(&record.order.source)? else { return Ok(()) };
        let before = snapshot.linked_in.len();
        for disk in record.disks.iter().filter(|disk| disk.method == Method::Link) {
            let directory = disk.path.parent().map(ToOwned::to_owned);
            snapshot.linked_in.extend(directory.filter(|new| !snapshot.linked_in.contains(new)));
        }
        if snapshot.linked_in.len() != before {
            self.sessions.journal.save(&snapshot)?;
        }
        Ok(())
    }

    async fn fail(&self, record: &mut RestoreRecord, failure: &Failure) -> Result<Turn, JournalError> {
        tracing::warn!(reason = failure.reason, message = failure.message, "the restore failed");
        record.stage = Stage::Failed;
        record.status = Some(outcome::failed(&record.order, &record.disks, failure));
        self.journal.save(record)?;
        crash::point("restore-failed");
        self.take_back(record).await
    }
}
