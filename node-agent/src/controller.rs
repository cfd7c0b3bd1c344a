//! Snapshots' work orders: a session runs for each.

use async_trait::async_trait;
use freezeframe_api::conditions::{condition, reasons, set, types};
use freezeframe_api::v1alpha1::{ContentPhase, VMSnapshotContent, VMSnapshotContentStatus};
use futures::SinkExt;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use kube::runtime::controller::Action;
use kube::runtime::reflector::ObjectRef;
use tracing::{Span, info_span};

use crate::causes::chain;
use crate::hypervisor::VmKey;
use crate::orders::{NotAsked, OrderError, Orders, TRY_AGAIN, Work};
use crate::report::report;
use crate::session::journal::{Journal, JournalError, SessionRecord, Stage};
use crate::session::order::Order;
use crate::session::outcome::is_waiting;
use crate::session::{Progress, Sessions, Turn};

impl Work for Sessions {
    type Content = VMSnapshotContent;
    type Order = Order;
    type Record = SessionRecord;

    fn journal(&self) -> &Journal {
        &self.journal
    }

    fn order(content: &VMSnapshotContent) -> Order {
        Order::new(content)
    }

    fn order_of(record: &SessionRecord) -> &Order {
        &record.order
    }

    fn vms(order: &Order) -> Vec<VmKey> {
        vec![order.vm.clone()]
    }

    fn span(order: &Order) -> Span {
        let (namespace, name) = &order.snapshot;
        info_span!("session", snapshot = format!("{namespace}/{name}"), vm = %order.vm)
    }

    fn must_be_finished(record: &SessionRecord) -> bool {
        matches!(record.stage, Stage::Open | Stage::Cut | Stage::Failed)
    }

    async fn go_on(&self, order: &Order) -> Result<bool, JournalError> {
        Ok(matches!(self.advance(order, &NotAsked).await?, Turn::Over(_)))
    }

    async fn serve(orders: &Orders<Self>, content: &VMSnapshotContent, order: &Order) -> Result<Action, OrderError> {
        if content.metadata.deletion_timestamp.is_some() {
            return delete(orders, content, order).await;
        }
        let common = &orders.context;
        match due(common.work.journal.load(&order.uid)?, content) {
            Due::Work => {}
            Due::Report(status) => {
                report(&common.client, content, &status).await?;
                return Ok(Action::await_change());
            }
            Due::Nothing => {
                tracing::warn!("this agent has no record of what its node reported; it is left as it is");
                return Ok(Action::await_change());
            }
        }
        let _turn = common.locks.turn_of_snapshot(&order.vm).await;
        let asked = Asked { orders, content };
        loop {
            match common.work.advance(order, &asked).await? {
                Turn::Over(status) => {
                    common.metrics.session_ended(&status);
                    report(&common.client, content, &status).await?;
                    return Ok(Action::await_change());
                }
                Turn::Report(status) => {
                    report(&common.client, content, &status).await?;
                    if is_waiting(&status) {
                        return Ok(Action::requeue(TRY_AGAIN));
                    }
                }
            }
        }
    }

    /// Forgets records of which neither artifact nor object is left, and counts those that nobody asks for.
    async fn sweep(orders: &Orders<Self>, unwanted: Vec<SessionRecord>) {
        let (gone, left): (Vec<_>, Vec<_>) = unwanted.into_iter().partition(|record| record.stage == Stage::Removed);
        for record in gone {
            if let Err(error) = orders.context.work.journal.forget(&record.order.uid) {
                tracing::warn!(%error, "a record of nothing can't be forgotten");
            }
        }
        for record in &left {
            tracing::warn!(content = record.order.content, stage = ?record.stage, "a snapshot's object is gone, its data isn't");
        }
        orders.context.metrics.set_orphans(left.len());
    }
}

/// What is to be done for a snapshot that is wanted.
#[derive(Debug, PartialEq)]
enum Due {
    /// Begin it, or go on with it.
    Work,
    /// Say again what came of it.
    Report(Box<VMSnapshotContentStatus>),
    /// Nothing: its record was lost with the agent's state directory. Its images may be good, so nothing else is said of
    /// them, and what was cut once isn't cut again.
    Nothing,
}

fn due(record: Option<SessionRecord>, content: &VMSnapshotContent) -> Due {
    match record {
        Some(record) if Sessions::must_be_finished(&record) => Due::Work,
        Some(record) => Due::Report(Box::new(record.status.unwrap_or_default())),
        None => match content.status.as_ref().and_then(|status| status.phase) {
            None => Due::Work,
            // Nobody can complete it, and until it is over the VM's other snapshots wait.
            Some(ContentPhase::Completing) => Due::Report(Box::new(lost(content))),
            Some(_) => Due::Nothing,
        },
    }
}

/// What is said of a snapshot whose record was lost before its images were complete: they are named still.
fn lost(content: &VMSnapshotContent) -> VMSnapshotContentStatus {
    let message = "the agent's record was lost before the images were complete; what was made is left where it is";
    let mut status = content.status.clone().unwrap_or_default();
    status.phase = Some(ContentPhase::Failed);
    let (reason, generation) = (reasons::AGENT_RESTARTED, content.metadata.generation);
    set(&mut status.conditions, condition(types::READY, false, reason, message, generation, Timestamp::now()));
    status
}

async fn delete(orders: &Orders<Sessions>, content: &VMSnapshotContent, order: &Order) -> Result<Action, OrderError> {
    if content.finalizers().is_empty() {
        return Ok(Action::await_change());
    }
    let common = &orders.context;
    let _turn = common.locks.turn_after_snapshots(&order.vm).await;
    let waiting = common.locks.waiting(&order.vm);
    let deletion = common.work.delete_unless_waiting(order, &waiting).await?;
    for name in &deletion.moved {
        // The other end is the controller itself; if it is gone, so is the need.
        let _ = orders.moved.clone().send(ObjectRef::new(name)).await;
    }
    report(&common.client, content, &deletion.status).await?;
    if deletion.over {
        common.metrics.deletion_ended();
        return Ok(Action::await_change());
    }
    Ok(Action::requeue(TRY_AGAIN))
}

/// Asks the watch's store whether the snapshot is still wanted, and tells the API how far it is.
struct Asked<'a> {
    orders: &'a Orders<Sessions>,
    content: &'a VMSnapshotContent,
}

#[async_trait]
impl Progress for Asked<'_> {
    fn cancelled(&self) -> bool {
        self.orders.is_unwanted(self.content)
    }

    async fn tell(&self, status: VMSnapshotContentStatus) {
        if let Err(error) = report(&self.orders.context.client, self.content, &status).await {
            tracing::debug!(error = chain(&error), "nobody is told how far the copies are");
        }
    }
}

#[cfg(test)]
mod tests {
    use freezeframe_api::conditions::find;
    use serde_json::json;

    use super::*;

    fn content(phase: Option<ContentPhase>) -> VMSnapshotContent {
        let content = json!({
            "metadata": {"name": "vmsnap-1", "uid": "1"},
            "spec": {
                "nodeName": "node-1",
                "vmName": "db-1",
                "vmSnapshotRef": {"namespace": "shop", "name": "one", "uid": "2"},
                "drivers": [],
                "consistency": {},
                "quiesce": {},
                "deadline": "2026-01-01T00:00:00Z",
                "deletionPolicy": "Delete",
            },
            "status": phase.map(|phase| json!({"phase": phase})),
        });
        serde_json::from_value(content).unwrap()
    }

    fn record(content: &VMSnapshotContent, stage: Stage) -> SessionRecord {
        SessionRecord { stage, status: content.status.clone(), ..SessionRecord::nothing(&Order::new(content)) }
    }

    #[test]
    fn what_a_lost_record_had_come_to_is_neither_begun_again_nor_reported_on() {
        for phase in [ContentPhase::Ready, ContentPhase::Failed] {
            assert_eq!(due(None, &content(Some(phase))), Due::Nothing, "{phase:?}");
        }
        assert_eq!(due(None, &content(None)), Due::Work);
    }

    #[test]
    fn a_snapshot_that_nobody_can_complete_has_failed_and_still_names_its_images() {
        let mut incomplete = content(Some(ContentPhase::Completing));
        let disk = json!({"name": "vda", "driver": "copy", "sizeBytes": 1, "state": "Copying",
            "handle": "/copies/vda.qcow2"});
        let status = json!({"phase": "Completing", "disks": [disk]});
        incomplete.status = Some(serde_json::from_value(status).unwrap());
        let Due::Report(told) = due(None, &incomplete) else { panic!("nothing is told") };
        assert_eq!(told.phase, Some(ContentPhase::Failed));
        assert_eq!(told.disks, incomplete.status.unwrap().disks);
        assert_eq!(find(&told.conditions, types::READY).unwrap().reason, reasons::AGENT_RESTARTED);
    }

    #[test]
    fn a_record_is_gone_on_with_until_it_needs_no_more_work() {
        let ready = content(Some(ContentPhase::Ready));
        for stage in [Stage::Open, Stage::Cut, Stage::Failed] {
            assert_eq!(due(Some(record(&ready, stage)), &ready), Due::Work, "{stage:?}");
        }
        let status = Box::new(ready.status.clone().unwrap());
        assert_eq!(due(Some(record(&ready, Stage::Complete)), &ready), Due::Report(status));
    }
}
