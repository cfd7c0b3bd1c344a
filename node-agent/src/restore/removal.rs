//! Taking back what a restore made: when it failed, and when it is deleted before it is done.

use freezeframe_api::v1alpha1::VMRestoreContentStatus;

use super::order::RestoreOrder;
use super::record::{RestoreRecord, Stage};
use super::{Restores, Turn, new_vm, outcome, switch};
use crate::causes::chain;
use crate::session::journal::JournalError;
use crate::session::outcome::Failure;

/// What a deletion came to.
pub struct Deletion {
    /// The status to report.
    pub status: VMRestoreContentStatus,
    /// Whether it is over; else it is to be tried again.
    pub over: bool,
}

impl Restores {
    /// Removes what a failed restore made; what can't be removed yet is tried again at the next call.
    pub(super) async fn take_back(&self, record: &mut RestoreRecord) -> Result<Turn, JournalError> {
        let status = Box::new(record.status.clone().unwrap_or_default());
        let new_vm = new_vm::take_back(self, record).map_err(|error| chain(&error));
        let images = switch::take_back(self, record).await.map_err(|error| chain(&error));
        if let Err(why) = new_vm.and(images) {
            tracing::warn!(why, "a failed restore can't be taken back yet");
            return Ok(Turn::Again(status));
        }
        record.stage = Stage::TakenBack;
        self.journal.save(record)?;
        Ok(Turn::Over(status))
    }

    /// Ends a restore that is deleted: what isn't finished is taken back, or finished if a name has changed hands. The
    /// images of a finished one are the user's. May be called again and again.
    pub async fn delete(
        &self,
        order: &RestoreOrder,
        before: Option<&VMRestoreContentStatus>,
    ) -> Result<Deletion, JournalError> {
        let over = |before: Option<&_>| Deletion { status: outcome::removed(order, before, None), over: true };
        let Some(mut record) = self.journal.load(&order.uid)? else { return Ok(over(before)) };
        let turn = match record.stage {
            Stage::Open => self.fail(&mut record, &Failure::cancelled()).await?,
            Stage::Switching => self.end_switching(&mut record).await?,
            Stage::Failed => self.take_back(&mut record).await?,
            Stage::Stopped | Stage::Done | Stage::TakenBack => return Ok(over(record.status.as_ref().or(before))),
        };
        Ok(match turn {
            Turn::Over(status) => over(Some(&status)),
            Turn::Again(status) => {
                let why = "what it made can't be removed, or finished, yet";
                Deletion { status: outcome::removed(order, Some(&status), Some(why)), over: false }
            }
        })
    }

    async fn end_switching(&self, record: &mut RestoreRecord) -> Result<Turn, JournalError> {
        let begun = switch::has_begun(self, record).await.unwrap_or(true) || new_vm::is_published(self, record);
        if begun { self.switch_again(record).await } else { self.fail(record, &Failure::cancelled()).await }
    }

    /// Forgets a record of which neither an object nor anything unfinished is left.
    pub fn forget(&self, uid: &str) -> Result<(), JournalError> {
        self.journal.forget(uid)
    }
}
