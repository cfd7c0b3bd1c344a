//! Whether a snapshot's data is what was cut, where somebody may write to an image of it, or to one below.

use super::Sessions;
use super::journal::{JournalError, Stage};
use crate::drivers::DiskTask;

impl Sessions {
    /// Why a complete snapshot's data of a disk isn't what was cut any more. Of an image that it shares with an older
    /// snapshot, that one's record tells.
    ///
    /// # Errors
    ///
    /// If the journal can't be read.
    pub fn overwritten(&self, task: &DiskTask) -> Result<Option<String>, JournalError> {
        let Some(driver) = self.drivers.find(&task.driver) else { return Ok(None) };
        let own = driver.overwritten(task, &self.roots);
        let Some(below) = driver.lies_on(task, &self.roots).filter(|_| own.is_none()) else { return Ok(own) };
        let records = self.journal.all()?;
        let tasks = records.iter().filter(|record| record.stage != Stage::Removed).flat_map(|record| &record.tasks);
        let mut whose = tasks.filter(|other| driver.place(other).as_ref() == Some(&below));
        Ok(whose.find_map(|other| driver.overwritten(other, &self.roots)))
    }
}
