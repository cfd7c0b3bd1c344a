//! A session: one snapshot of one VM, from work order to report.
//!
//! ```text
//!  accept ─► plan ─► prepare ─► flush ─► window ─► complete ─► report
//!            │       │                   │         │
//!            └───────┴──── take back ◄───┴─────────┘          (any failure, in reverse, until nothing is left)
//! ```
//!
//! - *accept*: find the disks, choose a driver for each. Nothing is made, so a refusal leaves nothing.
//! - *plan*: every file and node that will be made gets its name, and the names go to the [`journal`] first.
//! - *prepare*: everything slow: layers, copies' targets, opening them in QEMU.
//! - *flush*: the guest's caches and the host's, so that the freeze has little to write.
//! - *window*: freeze, cut, thaw; see [`window`]. Whatever happens in it, the guest goes on.
//! - *complete*: wait for copies, check, hold names by descriptor.
//!
//! A session that is interrupted by a crash of the agent leaves its record. Before the cut is on record everything is
//! taken back ([`removal`]); after it, completing is simply called again.

mod accept;
pub mod at_rest;
mod complete;
mod elsewhere;
mod filled;
mod flush;
mod host_cuts;
pub mod journal;
mod limits;
pub mod machine;
mod measured;
mod mounted;
pub mod order;
pub mod outcome;
mod overwritten;
mod removal;
pub mod shortening;
mod shortening_stopped;
mod siblings;
mod space;
pub mod space_watch;
mod still_cut;
pub mod window;
mod window_error;

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use freezeframe_api::conditions::reasons;
use freezeframe_api::v1alpha1::{ConsistencyLevel, Fallback, Pause, VMSnapshotContentStatus, Verify};
use freezeframe_guard::client::Guard;
use k8s_openapi::jiff::Timestamp;

use crate::boot::Boots;
use crate::causes::chain;
use crate::crash;
use crate::drivers::overlay::followed::image_and_layer;
use crate::drivers::{Cut, DiskTask, Drivers, SnapshotDriver};
use crate::hypervisor::Vm;
use crate::hypervisor::image::ImageRoots;
use crate::locks::Waiting;
use crate::restore::record::RestoreRecord;
use complete::Incomplete;
pub(crate) use complete::cancelled;
use journal::{Journal, JournalError, SessionRecord, Stage};
use machine::{Machine, StoppedVms};
use order::Order;
use outcome::Failure;
use space_watch::SpaceWatch;
use window::{Freeze, Measured, Plan};

/// What sessions of this node share.
pub struct Sessions {
    /// Root of all VMs' directories.
    pub vm_root: PathBuf,
    /// Where images may be.
    pub roots: ImageRoots,
    /// The guard of this node.
    pub guard: Guard,
    /// The records.
    pub journal: Journal,
    /// The restores' records: what they copy from stays as it is.
    pub restores: Journal<RestoreRecord>,
    /// What takes the disks.
    pub drivers: Drivers,
    /// VMs that don't run.
    pub stopped: StoppedVms,
    /// How fast guests write, and what counts as little space.
    pub space: SpaceWatch,
    /// What tries whether disks boot.
    pub boots: Arc<Boots>,
}

/// What a session asks and tells while it runs.
#[async_trait]
pub trait Progress: Send + Sync {
    /// Whether the snapshot was deleted in the meantime.
    fn cancelled(&self) -> bool;

    /// Tells how far the copies are. Nobody need listen: the next one says more.
    async fn tell(&self, _status: VMSnapshotContentStatus) {}

    /// Tells that what is still to be done only reads a VM's images, which a record keeps as they are: its turn isn't
    /// needed any more.
    fn only_reads(&self) {}
}

/// Whether a session is over, or has reached a point that should be reported before it goes on.
pub enum Turn {
    /// Report this status; then call again.
    Report(Box<VMSnapshotContentStatus>),
    /// Over: report this status.
    Over(Box<VMSnapshotContentStatus>),
}

impl Sessions {
    fn driver(&self, task: &DiskTask) -> Result<&dyn SnapshotDriver, Failure> {
        let unknown = || Failure::new(reasons::UNKNOWN_DRIVER, format!("this agent has no driver `{}`", task.driver));
        self.drivers.find(&task.driver).map(AsRef::as_ref).ok_or_else(unknown)
    }

    /// Whether the snapshot is complete a moment after the cut, so that there is nothing to report in between.
    fn is_instant(&self, record: &SessionRecord) -> bool {
        let is_instant = |task: &DiskTask| self.drivers.find(&task.driver).is_some_and(|driver| driver.is_instant());
        !matches!(record.order.verify, Verify::Full | Verify::Boot) && record.tasks.iter().all(is_instant)
    }

    /// Takes a snapshot, or goes on with one that was interrupted, until there is something to report.
    pub async fn advance(&self, order: &Order, progress: &dyn Progress) -> Result<Turn, JournalError> {
        // On the heap: it is large, and whoever waits for it needn't be.
        Box::pin(self.go_on(order, progress)).await
    }

    async fn go_on(&self, order: &Order, progress: &dyn Progress) -> Result<Turn, JournalError> {
        let Some(mut record) = self.journal.load(&order.uid)? else { return self.begin(order, progress).await };
        match record.stage {
            Stage::Cut => self.complete(&mut record, progress).await,
            Stage::Complete | Stage::Removed | Stage::Retained => Ok(Turn::Over(record.status.into_boxed())),
            Stage::Failed => self.take_back(&mut record).await,
            Stage::Open => {
                let message =
                    "the node's agent was restarted before the cut was on record; what it made was taken back";
                self.fail(&mut record, &Failure::new(reasons::AGENT_RESTARTED, message)).await
            }
        }
    }

    async fn begin(&self, order: &Order, progress: &dyn Progress) -> Result<Turn, JournalError> {
        let mut record = SessionRecord::nothing(order);
        tracing::info!("taking the snapshot");
        match Box::pin(self.cut(&mut record, progress)).await {
            Ok(()) if self.is_instant(&record) => self.complete(&mut record, progress).await,
            Ok(()) => Ok(Turn::Report(Box::new(outcome::cut(&record)))),
            Err(failure) => self.fail(&mut record, &failure).await,
        }
    }

    /// Everything up to a good cut. A stopped VM's disks are kept open for what comes after it.
    async fn cut(&self, record: &mut SessionRecord, progress: &dyn Progress) -> Result<(), Failure> {
        still_wanted(&record.order, progress)?;
        let mut machine = accept::open(self, &record.order).await?;
        let cut = self.cut_machine(&mut machine, record, progress).await;
        match cut {
            Ok(()) => self.stopped.keep(&record.order, machine),
            // What was made is about to be taken back, and is locked as long as it is open.
            Err(_) => machine.let_go().await,
        }
        cut
    }

    async fn cut_machine(
        &self,
        machine: &mut Machine,
        record: &mut SessionRecord,
        progress: &dyn Progress,
    ) -> Result<(), Failure> {
        let order = record.order.clone();
        if let Machine::Own(vm) = &*machine {
            shortening::make_way(vm).await?;
        }
        if !machine.is_still() {
            accept::await_agent(machine.vm_mut(), &order, progress).await?;
        }
        let accepted = accept::accept(self, &order, machine).await?;
        record.tasks = accepted.tasks;
        for task in &mut record.tasks {
            self.driver(task)?.plan(task, &accepted.graph, &self.roots)?;
        }
        space::check(record, &self.drivers, &self.space)?;
        self.journal.save(record)?;
        crash::point("planned");
        for at in 0..record.tasks.len() {
            let task = &mut record.tasks[at];
            let prepared = self.driver(task)?.prepare(machine.vm(), &self.roots, task).await;
            self.journal.save(record)?;
            prepared?;
        }
        space::check_areas(record, &self.drivers, &self.space)?;
        crash::point("prepared");
        let freeze = accept::freeze(machine.vm_mut(), &order).await?;
        flush::flush(machine.vm_mut(), &record.tasks, freeze.is_some()).await;
        still_wanted(&order, progress)?;
        accept::unchanged(self, machine, &order, accepted.running, &record.tasks).await?;
        let plan = self.plan(&record.tasks, &order, freeze, accepted.running, accepted.needs_pause)?;
        let measured = match machine {
            Machine::Own(vm) => self.window(vm, &order, &plan).await?,
            Machine::Still { .. } | Machine::Look(_) => self.still_cut(machine, &order, &plan, &record.tasks).await?,
        };
        check_level(&order, &measured, &plan)?;
        record.measured = Some(measured);
        record.stage = Stage::Cut;
        self.journal.save(record)?;
        crash::point("recorded");
        self.go_on_with(machine.vm(), &record.tasks).await;
        Ok(())
    }

    /// What the window does to all disks.
    fn plan(
        &self,
        tasks: &[DiskTask],
        order: &Order,
        freeze: Option<Freeze>,
        running: bool,
        needs_pause: bool,
    ) -> Result<Plan, Failure> {
        let mut pause = needs_pause || freeze.is_none() || order.pause == Pause::Always;
        let mut all = Cut::default();
        for driver in self.drivers.iter() {
            let group: Vec<_> = tasks.iter().filter(|task| task.driver == driver.name()).collect();
            if group.is_empty() {
                continue;
            }
            pause |= driver.needs_pause();
            let cut = driver.cut(&group, &self.roots)?;
            all.actions.extend(cut.actions);
            all.exchanges.extend(cut.exchanges);
            all.host.extend(cut.host);
        }
        let Cut { actions, exchanges, host } = all;
        let id = order.uid.clone();
        Ok(Plan { id, freeze, pause, running, max_hold: order.max_hold, actions, exchanges, host, job: None })
    }

    /// The window, and a second one without a freeze where that was all that failed and the order allows it.
    async fn window(&self, vm: &mut Vm, order: &Order, plan: &Plan) -> Result<Measured, Failure> {
        match window::run(vm, &self.guard, plan).await {
            Err(error) if error.is_of_the_freeze() && order.fallback == Fallback::Degrade => {
                tracing::warn!(error = chain(&error), "the guest can't be frozen; cutting while it is paused");
                let plan = Plan { freeze: None, pause: true, id: format!("{}-degraded", plan.id), ..plan.clone() };
                Ok(window::run(vm, &self.guard, &plan).await?)
            }
            other => Ok(other?),
        }
    }

    /// Everything after a good cut. May be called again and again.
    async fn complete(&self, record: &mut SessionRecord, progress: &dyn Progress) -> Result<Turn, JournalError> {
        match self.complete_tasks(record, progress).await {
            Ok(()) => {
                record.stage = Stage::Complete;
                let status = outcome::ready(record);
                record.status = Some(status.clone());
                self.journal.save(record)?;
                let measured = record.measured.as_ref();
                let (level, hold) = (measured.map(proved), measured.and_then(|measured| measured.hold));
                tracing::info!(?level, ?hold, disks = record.tasks.len(), "the snapshot is complete");
                Ok(Turn::Over(Box::new(status)))
            }
            Err(Incomplete::OutOfReach(failure)) => {
                tracing::warn!(
                    reason = failure.reason,
                    message = failure.message,
                    "the snapshot can't be completed yet"
                );
                Ok(Turn::Report(Box::new(outcome::waiting(record, &failure))))
            }
            Err(Incomplete::Failed(failure)) => self.fail(record, &failure).await,
        }
    }

    async fn fail(&self, record: &mut SessionRecord, failure: &Failure) -> Result<Turn, JournalError> {
        tracing::warn!(reason = failure.reason, message = failure.message, "the snapshot failed");
        record.stage = Stage::Failed;
        record.status = Some(outcome::failed(record, failure));
        self.journal.save(record)?;
        self.take_back(record).await
    }

    /// Removes what a failed session made; what can't be removed yet is tried again at the next call.
    async fn take_back(&self, record: &mut SessionRecord) -> Result<Turn, JournalError> {
        let status = record.status.clone().into_boxed();
        if let Some(why) = self.why_not_yet(record)? {
            tracing::warn!(why, "a failed snapshot isn't taken back yet");
            return Ok(Turn::Report(status));
        }
        match self.remove_artifacts(record, &Waiting::default()).await {
            Ok(removed) => {
                // What was to be its layer may be the disk by now, which the former one's VM must be told.
                let is_disk = !removed.kept.is_empty() && record.tasks.iter().any(|t| image_and_layer(t).is_some());
                record.stage = if is_disk { Stage::Retained } else { Stage::Removed };
                self.journal.save(record)?;
                Ok(Turn::Over(status))
            }
            Err(error) => {
                tracing::warn!(error = chain(&error), "a failed snapshot can't be taken back yet");
                Ok(Turn::Report(status))
            }
        }
    }
}

/// An empty status stands for a record that has none: it is never reported as anything good.
trait IntoBoxed {
    fn into_boxed(self) -> Box<VMSnapshotContentStatus>;
}

impl IntoBoxed for Option<VMSnapshotContentStatus> {
    fn into_boxed(self) -> Box<VMSnapshotContentStatus> {
        Box::new(self.unwrap_or_default())
    }
}

fn still_wanted(order: &Order, progress: &dyn Progress) -> Result<(), Failure> {
    if progress.cancelled() {
        return Err(Failure::cancelled());
    }
    if Timestamp::now() > order.deadline {
        let message = format!("the cut didn't come about before {}", order.deadline);
        return Err(Failure::new(reasons::DEADLINE_EXCEEDED, message));
    }
    Ok(())
}

/// The level that a window proved: every frozen file system was still frozen when it was thawed, and none was missed.
fn proved(measured: &Measured) -> ConsistencyLevel {
    match (measured.frozen, measured.thawed) {
        (Some((frozen, _)), Some(thawed)) if frozen > 0 && frozen == thawed => ConsistencyLevel::Filesystem,
        _ => ConsistencyLevel::Crash,
    }
}

fn check_level(order: &Order, measured: &Measured, plan: &Plan) -> Result<(), Failure> {
    let level = proved(measured);
    if level >= order.required || order.fallback == Fallback::Degrade {
        return Ok(());
    }
    if plan.freeze.is_none() || level == ConsistencyLevel::Filesystem {
        let message =
            format!("{:?} consistency can't be proved by this version; at best it is {level:?}", order.required);
        return Err(Failure::new(reasons::LEVEL_NOT_PROVABLE, message));
    }
    let message = format!(
        "{} file systems were frozen but {} thawed: something in the guest thawed them before the cut was over",
        measured.frozen.map_or(0, |(frozen, _)| frozen),
        measured.thawed.map_or_else(|| "an unknown number".to_owned(), |thawed| thawed.to_string()),
    );
    Err(Failure::new(reasons::WINDOW_BROKEN, message))
}
