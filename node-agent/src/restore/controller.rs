//! Restores' work orders.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use freezeframe_api::v1alpha1::{RestoreContentPhase, RestoreStep, VMRestoreContent, VMRestoreContentStatus};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use kube::runtime::controller::Action;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{Span, info_span};

use super::order::RestoreOrder;
use super::record::{RestoreRecord, Stage};
use super::{Restores, Turn};
use crate::causes::chain;
use crate::hypervisor::VmKey;
use crate::orders::{NotAsked, OrderError, Orders, TRY_AGAIN, Turns, Work};
use crate::report::{report, report_time, write_status};
use crate::session::Progress;
use crate::session::journal::{Journal, JournalError};

/// How often the API is told that the node is at it.
const HEARTBEAT: Duration = Duration::from_secs(60);
/// Shortest time between two reports of a copy's progress.
const REPORT_EVERY: Duration = Duration::from_secs(5);

impl Work for Restores {
    type Content = VMRestoreContent;
    type Order = RestoreOrder;
    type Record = RestoreRecord;

    fn journal(&self) -> &Journal<RestoreRecord> {
        &self.journal
    }

    fn order(content: &VMRestoreContent) -> RestoreOrder {
        RestoreOrder::new(content)
    }

    fn order_of(record: &RestoreRecord) -> &RestoreOrder {
        &record.order
    }

    fn vms(order: &RestoreOrder) -> Vec<VmKey> {
        order.vms()
    }

    fn span(order: &RestoreOrder) -> Span {
        let (namespace, name) = &order.restore;
        info_span!("restore", restore = format!("{namespace}/{name}"), vm = %order.vm)
    }

    /// Where names may have changed hands, and what was to be taken back. Images that were being made wait for the
    /// controller.
    fn must_be_finished(record: &RestoreRecord) -> bool {
        matches!(record.stage, Stage::Switching | Stage::Failed)
    }

    async fn go_on(&self, order: &RestoreOrder) -> Result<bool, JournalError> {
        Ok(matches!(self.advance(order, &NotAsked, &watch::Sender::new(None)).await?, Turn::Over(_)))
    }

    /// A copy that is under way when the agent is to stop is given up, and begun anew by the next agent.
    async fn serve(
        orders: &Orders<Self>,
        content: &VMRestoreContent,
        order: &RestoreOrder,
    ) -> Result<Action, OrderError> {
        if content.metadata.deletion_timestamp.is_some() {
            return delete(orders, content, order).await;
        }
        let common = &orders.context;
        let record = common.work.journal.load(&order.uid)?;
        if record.as_ref().is_none_or(|record| !record.is_unsettled()) && is_reported_over(content) {
            return Ok(Action::await_change());
        }
        let working = async {
            let turns = orders.turns(order).await;
            work(orders, content, order, turns).await
        };
        let turn = tokio::select! {
            turn = working => turn?,
            () = beat(orders, content) => None,
        };
        let Some(turn) = turn else { return Ok(Action::await_change()) };
        let (status, action) = match turn {
            Turn::Over(status) => (status, Action::await_change()),
            Turn::Again(status) => (status, Action::requeue(TRY_AGAIN)),
        };
        common.metrics.restore_ended(&status);
        report(&common.client, content, &status).await?;
        Ok(action)
    }

    /// Ends restores whose object is gone without a word, and forgets those of which nothing is left to do.
    async fn sweep(orders: &Orders<Self>, unwanted: Vec<RestoreRecord>) {
        let restores = &orders.context.work;
        for record in unwanted {
            let _turns = orders.turns(&record.order).await;
            match restores.delete(&record.order, None).await {
                Ok(deletion) if deletion.over => {
                    if let Err(error) = restores.forget(&record.order.uid) {
                        tracing::warn!(%error, "a record of nothing can't be forgotten");
                    }
                }
                Ok(_) => tracing::warn!(content = record.order.content, "a restore's object is gone, its work isn't"),
                Err(error) => tracing::warn!(%error, "a restore whose object is gone can't be ended"),
            }
        }
    }
}

/// Whether the content says already how its step ended: a VM isn't shut down a second time, neither for a failure nor
/// because somebody started it since.
fn is_reported_over(content: &VMRestoreContent) -> bool {
    let Some(status) = &content.status else { return false };
    let over = match status.phase {
        Some(RestoreContentPhase::Failed | RestoreContentPhase::Succeeded) => true,
        Some(RestoreContentPhase::Planned) => content.spec.step == RestoreStep::Plan,
        Some(RestoreContentPhase::Stopped) => content.spec.step == RestoreStep::Stop,
        Some(RestoreContentPhase::Restoring) | None => false,
    };
    over && status.observed_generation == content.metadata.generation
}

/// Never ends: as long as this agent is at it, even if it only waits for the VM's turn, the API is told.
async fn beat(orders: &Orders<Restores>, content: &VMRestoreContent) {
    let told = content.status.as_ref().and_then(|status| status.last_report_time.as_ref());
    let since = told.and_then(|told| Duration::try_from(Timestamp::now().duration_since(told.0)).ok());
    let due = since.map_or(Duration::ZERO, |since| HEARTBEAT.saturating_sub(since));
    let mut beat = tokio::time::interval_at(Instant::now() + due, HEARTBEAT);
    loop {
        beat.tick().await;
        if let Err(error) = report_time(&orders.context.client, content).await {
            tracing::debug!(error = chain(&error), "nobody is told that the restore is worked on");
        }
    }
}

/// Works on a restore and reports its progress; none if the agent is to stop.
async fn work(
    orders: &Orders<Restores>,
    content: &VMRestoreContent,
    order: &RestoreOrder,
    turns: Turns,
) -> Result<Option<Turn>, JournalError> {
    let asked = Asked { orders, content, order, turns: Mutex::new(turns) };
    let (told, news) = watch::channel(None);
    let advance = orders.context.work.advance(order, &asked, &told);
    tokio::select! {
        biased;
        turn = advance => Ok(Some(turn?)),
        () = orders.stop.cancelled() => Ok(None),
        () = report_progress(orders, content, news) => Ok(None),
    }
}

/// Never ends: progress is reported as long as there is some, and what can't be reported isn't missed.
async fn report_progress(
    orders: &Orders<Restores>,
    content: &VMRestoreContent,
    mut news: watch::Receiver<Option<VMRestoreContentStatus>>,
) {
    let mut beat = tokio::time::interval(REPORT_EVERY);
    loop {
        beat.tick().await;
        if news.changed().await.is_err() {
            return std::future::pending().await;
        }
        let status = news.borrow_and_update().clone();
        let client = &orders.context.client;
        if let Some(Err(error)) = async { Some(write_status(client, content, &status?).await) }.await {
            tracing::debug!(error = chain(&error), "progress not reported");
        }
    }
}

async fn delete(
    orders: &Orders<Restores>,
    content: &VMRestoreContent,
    order: &RestoreOrder,
) -> Result<Action, OrderError> {
    if content.finalizers().is_empty() {
        return Ok(Action::await_change());
    }
    let _turns = orders.turns(order).await;
    let deletion = orders.context.work.delete(order, content.status.as_ref()).await?;
    report(&orders.context.client, content, &deletion.status).await?;
    Ok(if deletion.over { Action::await_change() } else { Action::requeue(TRY_AGAIN) })
}

/// Asks the watch's store whether the restore is still wanted, and has the turns of its VMs.
struct Asked<'a> {
    orders: &'a Orders<Restores>,
    content: &'a VMRestoreContent,
    order: &'a RestoreOrder,
    turns: Mutex<Turns>,
}

impl Progress for Asked<'_> {
    fn cancelled(&self) -> bool {
        self.orders.is_unwanted(self.content)
    }

    /// It isn't waited for again: whoever did that with the new VM's turn in hand could wait for ever.
    fn only_reads(&self) {
        let is_new = self.order.new_vm.as_ref() == Some(&self.order.vm);
        if !is_new && self.turns.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.order.vm).is_some() {
            tracing::debug!("the snapshot's VM can be snapshotted while its data is copied");
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_step_that_was_reported_is_not_done_again_until_there_is_another() {
        use RestoreContentPhase::{Failed, Planned, Restoring, Stopped, Succeeded};
        use RestoreStep::{Plan, Restore, Stop};
        for (step, phase, observed, over) in [
            (Plan, Planned, 3, true),
            (Stop, Stopped, 3, true),
            (Stop, Failed, 3, true),
            (Restore, Succeeded, 3, true),
            (Restore, Restoring, 3, false),
            (Restore, Stopped, 2, false),
            (Stop, Planned, 2, false),
        ] {
            let content = content(step, &json!({"phase": phase, "observedGeneration": observed}));
            assert_eq!(is_reported_over(&content), over, "{step:?} {phase:?} {observed}");
        }
    }

    fn content(step: RestoreStep, status: &serde_json::Value) -> VMRestoreContent {
        serde_json::from_value(json!({
            "apiVersion": "freezeframe.dev/v1alpha1",
            "kind": "VMRestoreContent",
            "metadata": {"name": "vmrestore-1", "uid": "1-2", "generation": 3},
            "spec": {
                "vmRestoreRef": {"namespace": "shop", "name": "undo", "uid": "0-1"},
                "source": {"name": "vmsnap-1", "uid": "5-6"},
                "vmName": "db-1",
                "nodeName": "node-a",
                "step": step,
                "stopTimeout": "1m",
            },
            "status": status,
        }))
        .unwrap()
    }
}
