//! From complete images to done: the names change hands, or the new VM is made, now or after a crash.

use super::halfway::{self, Rest};
use super::record::{RestoreRecord, Stage};
use super::{Restores, Turn, new_vm, outcome, source, switch};
use crate::causes::chain;
use crate::crash;
use crate::hypervisor::lock::ImageLock;
use crate::session::journal::JournalError;
use crate::session::outcome::Failure;

impl Restores {
    /// From complete images to done.
    pub(super) async fn switch(&self, record: &mut RestoreRecord) -> Result<Turn, JournalError> {
        let held = match record.order.new_vm {
            None => match switch::make_ready(self, record).await {
                Ok(held) => held,
                Err(failure) => return self.fail(record, &failure).await,
            },
            Some(_) => vec![],
        };
        record.stage = Stage::Switching;
        self.journal.save(record)?;
        crash::point("restore-switching");
        self.finish_held(record, held).await
    }

    /// A crash came in between. Where no name has changed hands the VM may have run since.
    pub(super) async fn switch_again(&self, record: &mut RestoreRecord) -> Result<Turn, JournalError> {
        match switch::has_begun(self, record).await {
            Ok(true) => match halfway::look(self, record).await {
                Ok(Rest::GoesOn(held)) => self.finish_held(record, held).await,
                Ok(Rest::GoesBack(why, held)) => self.go_back(record, &why, held).await,
                Err(failure) => Ok(not_yet(record, &failure.message)),
            },
            Ok(false) => self.switch(record).await,
            Err(error) => Ok(not_yet(record, &chain(&error))),
        }
    }

    /// The old images have their names before the restore is on record as failed: from then on what it made is removed.
    async fn go_back(
        &self,
        record: &mut RestoreRecord,
        why: &Failure,
        held: Vec<ImageLock>,
    ) -> Result<Turn, JournalError> {
        match halfway::put_back(self, record).await {
            Ok(()) => {
                drop(held);
                self.fail(record, why).await
            }
            Err(error) => Ok(not_yet(record, &chain(&error))),
        }
    }

    /// No QEMU opens an old image while names change hands, since it is held.
    async fn finish_held(&self, record: &mut RestoreRecord, held: Vec<ImageLock>) -> Result<Turn, JournalError> {
        // What its owner has done to a VM that was made is theirs.
        if new_vm::is_published(self, record) {
            return self.done(record);
        }
        let named = switch::give_names(self, record, held).await.map_err(|error| source::failed(&error));
        let published = named.and_then(|()| match record.order.new_vm.clone() {
            Some(vm) => new_vm::publish(self, record, &vm),
            None => Ok(()),
        });
        match published {
            Ok(()) => self.done(record),
            Err(failure) if record.order.new_vm.is_some() && !new_vm::is_published(self, record) => {
                self.fail(record, &failure).await
            }
            Err(failure) => Ok(not_yet(record, &failure.message)),
        }
    }

    fn done(&self, record: &mut RestoreRecord) -> Result<Turn, JournalError> {
        record.stage = Stage::Done;
        let status = outcome::succeeded(record);
        record.status = Some(status.clone());
        self.journal.save(record)?;
        crash::point("restore-done");
        tracing::info!("the restore is complete");
        Ok(Turn::Over(Box::new(status)))
    }
}

fn not_yet(record: &RestoreRecord, why: &str) -> Turn {
    tracing::error!(why, "a restore can't be finished yet");
    Turn::Again(Box::new(outcome::stuck(record, why)))
}
