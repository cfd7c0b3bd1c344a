//! Removing what a snapshot made: when it is deleted, and when it failed.

use std::path::{Path, PathBuf};

use freezeframe_api::v1alpha1::{DeletionPolicy, VMSnapshotContentStatus};

use super::Sessions;
use super::flush;
use super::journal::{JournalError, SessionRecord, Stage};
use super::limits;
use super::mounted;
use super::order::Order;
use super::outcome;
use super::window::{self, WindowError};
use crate::causes::chain;
use crate::drivers::{DriverError, Env, Pace, Removal};
use crate::hypervisor::image::ImageError;
use crate::hypervisor::{OpenError, Vm, VmKey};
use crate::locks::Waiting;
use crate::restore::reading;

/// A driver that needs more steps than this for one disk goes round in circles.
const MOST_STEPS: usize = 32;

/// Why artifacts can't be removed now.
#[derive(Debug, thiserror::Error)]
pub enum RemovalError {
    /// The VM's monitor can't be used.
    #[error(transparent)]
    Vm(#[from] OpenError),
    /// The guard owes the VM a thaw, or can't be asked.
    #[error("the guard can't be asked, or still owes VM {0} a thaw")]
    Owed(String),
    /// A driver can't.
    #[error("disk {disk} can't be removed")]
    Driver {
        /// The disk.
        disk: String,
        /// Why.
        #[source]
        source: Box<DriverError>,
    },
    /// Another snapshot's record can't follow its artifact.
    #[error("another snapshot's record can't follow its artifact")]
    Follow(#[source] Box<DriverError>),
    /// The last step of a merge failed.
    #[error("disk {disk} can't be merged")]
    Window {
        /// The disk.
        disk: String,
        /// Why.
        #[source]
        source: Box<WindowError>,
    },
    /// The journal can't be written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A record can't be read, so it isn't known whose the files are that a merge would change.
    #[error(
        "a snapshot's record can't be read, and a file that would be merged or deleted may be that snapshot's: mend the \
         record, or move it away if the snapshot is gone"
    )]
    Unreadable(#[source] JournalError),
    /// Another VM's snapshot may have moved data without its record's knowing yet.
    #[error("snapshot {snapshot} of VM {vm}, which has files in the same directory, is deleted first")]
    OtherFirst {
        /// The other snapshot.
        snapshot: String,
        /// Its VM.
        vm: VmKey,
    },
    /// The agent has no such driver any more.
    #[error("this agent has no driver `{0}`")]
    UnknownDriver(String),
    /// A restored image needs the data.
    #[error("{0} was restored on top of the snapshot's data and needs it")]
    Needed(PathBuf),
    /// Images on top of the data can't be looked for.
    #[error("images that need the snapshot's data can't be looked for")]
    Links(#[source] Box<ImageError>),
    /// A driver doesn't come to an end.
    #[error("disk {0} isn't removed after {MOST_STEPS} steps")]
    Endless(String),
}

/// What a deletion came to.
pub struct Deletion {
    /// The status to report.
    pub status: VMSnapshotContentStatus,
    /// Whether it is over; else it is to be tried again.
    pub over: bool,
    /// Other snapshots whose artifacts moved, by content name.
    pub moved: Vec<String>,
}

impl Sessions {
    /// Deletes a snapshot as its policy says, and makes way for no other. May be called again and again.
    pub async fn delete(&self, order: &Order) -> Result<Deletion, JournalError> {
        self.delete_unless_waiting(order, &Waiting::default()).await
    }

    /// The same, but a merge is cancelled as soon as a snapshot of the VM waits.
    pub async fn delete_unless_waiting(&self, order: &Order, waiting: &Waiting) -> Result<Deletion, JournalError> {
        let over = |status| Deletion { status, over: true, moved: vec![] };
        let Some(mut record) = self.journal.load(&order.uid)? else {
            let record = SessionRecord::nothing(order);
            return Ok(over(outcome::removed(&record, &[])));
        };
        record.order.generation = order.generation;
        if matches!(record.stage, Stage::Removed | Stage::Retained) {
            let kept = if record.stage == Stage::Retained { handles(&record) } else { vec![] };
            return Ok(over(outcome::removed(&record, &kept)));
        }
        if let Some(why) = self.why_not_yet(&record)? {
            return Ok(Deletion { status: outcome::not_removed(&record, &why), over: false, moved: vec![] });
        }
        let whole = record.stage == Stage::Complete && !record.removing;
        let retained = order.deletion_policy == DeletionPolicy::Retain && whole;
        if !record.removing && !retained {
            record.removing = true;
            self.journal.save(&record)?;
        }
        let removed = if retained {
            Box::pin(self.settle_retained(&mut record, waiting)).await
        } else {
            Box::pin(self.remove_artifacts(&mut record, waiting)).await
        };
        match removed {
            Ok(removed) => {
                record.stage = if removed.kept.is_empty() { Stage::Removed } else { Stage::Retained };
                self.journal.save(&record)?;
                Ok(Deletion { status: outcome::removed(&record, &removed.kept), over: true, moved: removed.moved })
            }
            Err(RemovalError::Driver { source, .. }) if matches!(*source, DriverError::MadeWay) => {
                Ok(Deletion { status: record.status.unwrap_or_default(), over: false, moved: vec![] })
            }
            Err(error) => {
                let why = chain(&error);
                tracing::warn!(error = why, "the snapshot can't be deleted yet");
                Ok(Deletion { status: outcome::not_removed(&record, &why), over: false, moved: vec![] })
            }
        }
    }

    /// What a deletion waits for before it is begun, or gone on with. Only one that may have moved another snapshot's data
    /// already is finished first: a restore that was begun waits for it in turn.
    pub(super) fn why_not_yet(&self, record: &SessionRecord) -> Result<Option<String>, JournalError> {
        if record.tasks.iter().any(|task| self.is_half_removed(task)) {
            return Ok(None);
        }
        reading::reader_of(self, record)
    }

    /// Removes every disk's artifacts, step by step; each step's state is on disk before the next.
    pub(super) async fn remove_artifacts(
        &self,
        record: &mut SessionRecord,
        waiting: &Waiting,
    ) -> Result<Removed, RemovalError> {
        let pace = limits::pace(&record.order.limits, waiting);
        let mut removed = Removed { pace, kept: vec![], moved: vec![] };
        if let Some(machine) = self.stopped.take(&record.order) {
            machine.let_go().await;
        }
        if record.tasks.iter().all(|task| task.state.is_null()) {
            return Ok(removed);
        }
        self.refuse_owed(&record.order).await?;
        let needed = crate::restore::image_on_top(&self.roots, &self.drivers, record);
        if let Some(image) = needed.map_err(|error| RemovalError::Links(Box::new(error)))? {
            return Err(RemovalError::Needed(image));
        }
        self.finish_half_removed(record, &mut removed).await?;
        for at in 0..record.tasks.len() {
            self.remove_disk(record, at, &mut removed).await?;
        }
        Ok(removed)
    }

    /// Where the files are that stay. Once they are told, they move no more: what moves them is finished first.
    async fn settle_retained(&self, record: &mut SessionRecord, waiting: &Waiting) -> Result<Removed, RemovalError> {
        let pace = limits::pace(&record.order.limits, waiting);
        let mut removed = Removed { pace, kept: vec![], moved: vec![] };
        self.finish_half_removed(record, &mut removed).await?;
        removed.kept = handles(record);
        Ok(removed)
    }

    async fn refuse_owed(&self, order: &Order) -> Result<(), RemovalError> {
        match self.guard.owed(&order.vm.to_string()).await {
            Ok(false) => Ok(()),
            _ => Err(RemovalError::Owed(order.vm.to_string())),
        }
    }

    /// Finishes what a crash interrupted in the removal of other snapshots of the VM. It may have moved this record's
    /// data without its knowing yet, so the record is read again.
    async fn finish_half_removed(&self, record: &mut SessionRecord, removed: &mut Removed) -> Result<(), RemovalError> {
        let order = record.order.clone();
        for mut other in self.others(record)? {
            if other.order.vm != order.vm {
                // It is not ours to work on: its VM has another turn.
                self.refuse_if_first(record, &other)?;
                continue;
            }
            for at in self.half_removed(&other) {
                let kept = removed.kept.len();
                self.refuse_owed(&order).await?;
                self.remove_disk(&mut other, at, removed).await?;
                // That is the other's to tell: of this snapshot nothing is kept for it.
                removed.kept.truncate(kept);
            }
        }
        if let Some(fresh) = self.journal.load(&order.uid)? {
            *record = SessionRecord { order, ..fresh };
        }
        Ok(())
    }

    async fn remove_disk(
        &self,
        record: &mut SessionRecord,
        at: usize,
        removed: &mut Removed,
    ) -> Result<(), RemovalError> {
        let disk = record.tasks[at].disk.clone();
        let name = record.tasks[at].driver.clone();
        let driver = self.drivers.find(&name).ok_or(RemovalError::UnknownDriver(name))?;
        let failed = |source: DriverError| RemovalError::Driver { disk: disk.clone(), source: Box::new(source) };
        if !record.removed_from.contains(&at) {
            mounted::check(&driver.directories(&record.tasks[at]), &self.roots)
                .map_err(|error| failed(error.into()))?;
            record.removed_from.insert(at);
            self.journal.save(record)?;
        }
        for _ in 0..MOST_STEPS {
            let mut vm = self.open_if_running(&record.order).await?;
            let siblings = self.siblings(record)?;
            let env = Env { vm: vm.as_ref(), roots: &self.roots, siblings: &siblings, pace: &removed.pace };
            let step = driver.remove(&env, &mut record.tasks[at]).await;
            if matches!(step, Ok(Removal::Done)) {
                // Another disk may be kept, and the record with it: what was this one's file may be a sibling's now.
                let task = &mut record.tasks[at];
                (task.state, task.artifact) = (serde_json::Value::Null, None);
            }
            if step.is_err() {
                // It is tried again, maybe after a restart of the host.
                record.removed_from.remove(&at);
            }
            self.journal.save(record)?;
            crate::crash::point("removal-step");
            match step.map_err(failed)? {
                Removal::Again => {}
                Removal::Done => return Ok(()),
                Removal::Kept(why) => {
                    removed.kept.push(format!("disk {disk}: {why}"));
                    return Ok(());
                }
                Removal::Moved { from, to, format } => {
                    removed.moved.extend(self.follow(&record.order, &from, &to, &format)?);
                }
                Removal::Switch(switch) => {
                    if let Some(vm) = &mut vm {
                        flush::before_pause(vm, &self.roots, switch.merged.clone()).await;
                        let id = format!("{}-{at}", record.order.uid);
                        let switched = window::switch(vm, &self.guard, id, &switch).await;
                        switched
                            .map_err(|source| RemovalError::Window { disk: disk.clone(), source: Box::new(source) })?;
                    }
                }
            }
        }
        Err(RemovalError::Endless(disk))
    }

    pub(super) async fn open_if_running(&self, order: &Order) -> Result<Option<Vm>, RemovalError> {
        match Vm::open(&self.vm_root, &order.vm).await {
            Ok(vm) => Ok(Some(vm)),
            Err(OpenError::NotRunning(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// What removing came to, and how fast it may go.
pub(super) struct Removed {
    pace: Pace,
    /// What was kept, and why.
    pub(super) kept: Vec<String>,
    /// Contents of other snapshots whose artifacts moved.
    pub(super) moved: Vec<String>,
}

fn handle(task: &crate::drivers::DiskTask) -> Option<&Path> {
    task.artifact.as_ref().map(|artifact| artifact.handle.as_path())
}

fn handles(record: &SessionRecord) -> Vec<String> {
    let paths = record.tasks.iter().filter_map(handle).map(Path::to_owned);
    paths.map(|path: PathBuf| path.display().to_string()).collect()
}
