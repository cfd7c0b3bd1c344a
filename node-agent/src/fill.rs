//! Watches complete snapshots: how full the space gets of those that can overflow, and whether somebody wrote to those
//! whose images nothing protects. Says so before, and when, they lose their contents.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use freezeframe_api::v1alpha1::{ContentPhase, VMSnapshotContent};
use kube::{Api, Client, ResourceExt};
use tokio_util::sync::CancellationToken;

use crate::causes::chain;
use crate::drivers::{DiskTask, Fill};
use crate::locks::VmLocks;
use crate::metrics::Metrics;
use crate::report::{ReportError, call, report};
use crate::session::Sessions;
use crate::session::journal::{JournalError, SessionRecord, Stage};
use crate::session::order::Order;
use crate::session::outcome::{filled, spoilt};

/// What watching needs.
pub struct FillWatch {
    /// The API.
    pub client: Client,
    /// The sessions of this node.
    pub sessions: Arc<Sessions>,
    /// A snapshot that is being deleted is left alone.
    pub locks: VmLocks,
    /// What is measured.
    pub metrics: Metrics,
    /// How often it looks.
    pub every: Duration,
}

impl FillWatch {
    /// Looks until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        Box::pin(stop.run_until_cancelled(self.look_for_ever())).await;
    }

    async fn look_for_ever(&self) {
        // What was written down but couldn't be reported yet, by UID.
        let mut unreported = HashSet::new();
        let mut beat = tokio::time::interval(self.every);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            beat.tick().await;
            if let Err(error) = self.look(&mut unreported).await {
                tracing::warn!(error = chain(&error), "the journal can't be read");
            }
        }
    }

    async fn look(&self, unreported: &mut HashSet<String>) -> Result<(), JournalError> {
        self.metrics.forget_fills();
        let records = self.sessions.journal.all()?;
        let looked_at = |record: &SessionRecord| is_whole(record) || unreported.contains(&record.order.uid);
        for record in records.into_iter().filter(looked_at).collect::<Vec<_>>() {
            let overwritten = overwritten(&self.sessions, &record)?;
            let fills = fills(&self.sessions, &record).await;
            for (disk, fill) in &fills {
                self.metrics.set_fill(&record.order.content, disk, fill.percent);
            }
            let uid = record.order.uid.clone();
            let news = self.write_down(&record.order, &fills, &overwritten)?;
            let Some(news) = news.or_else(|| unreported.take(&uid).map(|_| record)) else { continue };
            if let Err(error) = self.tell(&news).await {
                tracing::warn!(error = chain(&error), "how full a snapshot is can't be reported");
                unreported.insert(uid);
            }
        }
        Ok(())
    }

    /// The record with the new status, if that says anything new. A VM that is being worked on is looked at next time.
    fn write_down(
        &self,
        order: &Order,
        fills: &[(String, Fill)],
        overwritten: &[(String, String)],
    ) -> Result<Option<SessionRecord>, JournalError> {
        // The turn first: what was loaded before it may have been written anew since.
        let Some(_turn) = self.locks.try_turn(&order.vm) else { return Ok(None) };
        let Some(record) = self.sessions.journal.load(&order.uid)?.filter(is_whole) else { return Ok(None) };
        let spoilt = spoilt(&record, overwritten);
        let Some(status) = spoilt.or_else(|| filled(&record, fills)) else { return Ok(None) };
        if status.phase == Some(ContentPhase::Failed) {
            tracing::warn!(content = record.order.content, "a snapshot lost its contents");
        }
        let news = SessionRecord { status: Some(status), ..record };
        self.sessions.journal.save(&news)?;
        Ok(Some(news))
    }

    async fn tell(&self, record: &SessionRecord) -> Result<(), ReportError> {
        let contents: Api<VMSnapshotContent> = Api::all(self.client.clone());
        let name = &record.order.content;
        let found = call(&format!("content {name}"), contents.get_opt(name)).await?;
        let ours = found.filter(|content| content.uid().as_deref() == Some(&record.order.uid));
        match (ours, &record.status) {
            (Some(content), Some(status)) => report(&self.client, &content, status).await,
            // Gone, and so is the need to report.
            _ => Ok(()),
        }
    }
}

/// Whether a snapshot is complete and was good when last looked at.
fn is_whole(record: &SessionRecord) -> bool {
    let ready = record.status.as_ref().is_some_and(|status| status.phase == Some(ContentPhase::Ready));
    record.stage == Stage::Complete && !record.removing && ready
}

/// The disks whose snapshot somebody wrote to, and what to say of each.
fn overwritten(sessions: &Sessions, record: &SessionRecord) -> Result<Vec<(String, String)>, JournalError> {
    let mut found = vec![];
    for task in &record.tasks {
        found.extend(sessions.overwritten(task)?.map(|why| (task.disk.clone(), why)));
    }
    Ok(found)
}

async fn fills(sessions: &Sessions, record: &SessionRecord) -> Vec<(String, Fill)> {
    let mut fills = vec![];
    for task in &record.tasks {
        fills.extend(fill(sessions, task).await.map(|fill| (task.disk.clone(), fill)));
    }
    fills
}

async fn fill(sessions: &Sessions, task: &DiskTask) -> Option<Fill> {
    let found = sessions.drivers.find(&task.driver)?.fill(task).await;
    // What can't be looked at isn't called overflowed; it is looked at again.
    found.unwrap_or_else(|error| {
        tracing::warn!(disk = task.disk, error = chain(&error), "it can't be seen how full a snapshot is");
        None
    })
}

#[cfg(test)]
mod tests;
