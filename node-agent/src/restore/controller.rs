//! Watches this node's restores and works on each, one operation per VM.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use freezeframe_api::v1alpha1::{RestoreContentPhase, RestoreStep, VMRestoreContent, VMRestoreContentStatus};
use futures::StreamExt;
use kube::api::ListParams;
use kube::runtime::controller::{Action, Config as ControllerConfig};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::{Controller, watcher};
use kube::{Api, Client, ResourceExt};
use tokio::sync::{RwLock, watch};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, info_span};

use super::order::RestoreOrder;
use super::record::{RestoreRecord, Stage};
use super::{Restores, Told, Turn, says_the_same};
use crate::locks::{VmLocks, VmTurn};
use crate::metrics::Metrics;
use crate::report::{ReportError, call, write_status};
use crate::session::Progress;
use crate::session::journal::JournalError;
use crate::session::outcome::chain;

/// How soon what couldn't be done is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(5);
/// Shortest time between two reports of a copy's progress.
const REPORT_EVERY: Duration = Duration::from_secs(5);
/// How often the journal is compared with the cluster.
const SWEEP: Duration = Duration::from_secs(600);

/// What a reconcile needs.
pub struct Context {
    /// The API.
    pub client: Client,
    /// The restores of this node.
    pub restores: Arc<Restores>,
    /// One operation per VM.
    pub locks: VmLocks,
    /// What is counted.
    pub metrics: Metrics,
}

/// Why a restore couldn't be worked on to its end this time.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Report(#[from] ReportError),
}

struct Shared {
    context: Context,
    store: Store<VMRestoreContent>,
    /// Read by each restore that is being worked on.
    serving: RwLock<()>,
    stop: CancellationToken,
}

/// Runs until `stop`. A copy that is under way then is given up, and begun anew by the next agent.
pub async fn run(context: Context, node: &str, stop: CancellationToken) {
    let contents: Api<VMRestoreContent> = Api::all(context.client.clone());
    let watched = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
    let controller = Controller::new(contents, watched);
    let store = controller.store();
    let shared = Arc::new(Shared { context, store, serving: RwLock::default(), stop: stop.clone() });
    recover(&shared);
    tokio::spawn(stop.clone().run_until_cancelled_owned(sweep(shared.clone(), node.to_owned())));
    let serving = controller
        .with_config(ControllerConfig::default().concurrency(64))
        .graceful_shutdown_on(stop.clone().cancelled_owned())
        .run(reconcile, |content, error, _| error_policy(&content, error), shared.clone())
        .for_each(|result| async move {
            if let Err(error) = result {
                tracing::warn!(error = chain(&error), "restore not finished");
            }
        });
    tokio::select! {
        () = serving => {}
        // Stopped before its first list, the controller would wait for that list for ever.
        () = at_rest(&shared, &stop) => {}
    }
}

async fn at_rest(shared: &Shared, stop: &CancellationToken) {
    stop.cancelled().await;
    drop(shared.serving.write().await);
}

fn error_policy(content: &VMRestoreContent, error: &Error) -> Action {
    tracing::warn!(content = content.name_any(), error = chain(error), "will try again");
    Action::requeue(TRY_AGAIN)
}

async fn reconcile(content: Arc<VMRestoreContent>, shared: Arc<Shared>) -> Result<Action, Error> {
    let _serving = shared.serving.read().await;
    let order = RestoreOrder::new(&content);
    let (namespace, name) = &order.restore;
    let span = info_span!("restore", restore = format!("{namespace}/{name}"), vm = %order.vm);
    serve(&content, &order, &shared).instrument(span).await
}

async fn serve(content: &VMRestoreContent, order: &RestoreOrder, shared: &Shared) -> Result<Action, Error> {
    if content.metadata.deletion_timestamp.is_some() {
        return delete(content, order, shared).await;
    }
    let record = shared.context.restores.journal.load(&order.uid)?;
    if record.as_ref().is_none_or(|record| !record.is_unsettled()) && is_reported_over(content) {
        return Ok(Action::await_change());
    }
    let _turns = turns(&shared.context.locks, order).await;
    let Some(turn) = work(content, order, shared).await? else { return Ok(Action::await_change()) };
    let (status, action) = match turn {
        Turn::Over(status) => (status, Action::await_change()),
        Turn::Again(status) => (status, Action::requeue(TRY_AGAIN)),
    };
    shared.context.metrics.restore_ended(&status);
    report(shared, content, &status).await?;
    Ok(action)
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

/// The turns of all VMs of a restore, always in the same order, so that two restores can't wait for each other.
async fn turns(locks: &VmLocks, order: &RestoreOrder) -> Vec<VmTurn> {
    let mut turns = vec![];
    for vm in order.vms() {
        turns.push(locks.turn(&vm).await);
    }
    turns
}

/// Works on a restore and reports its progress; none if the agent is to stop.
async fn work(content: &VMRestoreContent, order: &RestoreOrder, shared: &Shared) -> Result<Option<Turn>, Error> {
    let asked = Asked { store: &shared.store, content };
    let (told, news) = watch::channel(None);
    let advance = shared.context.restores.advance(order, &asked, &told);
    tokio::select! {
        biased;
        turn = advance => Ok(Some(turn?)),
        () = shared.stop.cancelled() => Ok(None),
        () = report_progress(shared, content, news) => Ok(None),
    }
}

/// Never ends: progress is reported as long as there is some, and what can't be reported isn't missed.
async fn report_progress(
    shared: &Shared,
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
        if let Some(Err(error)) = async { Some(write_status(&shared.context.client, content, &status?).await) }.await {
            tracing::debug!(error = chain(&error), "progress not reported");
        }
    }
}

async fn report(shared: &Shared, content: &VMRestoreContent, status: &VMRestoreContentStatus) -> Result<(), Error> {
    let mut status = status.clone();
    if let Some(before) = &content.status {
        if says_the_same(before, &status) {
            return Ok(());
        }
        keep_times(before, &mut status);
    }
    Ok(write_status(&shared.context.client, content, &status).await?)
}

/// A condition that didn't change its status is as old as it was.
fn keep_times(before: &VMRestoreContentStatus, status: &mut VMRestoreContentStatus) {
    for condition in &mut status.conditions {
        let same = before.conditions.iter().find(|old| old.type_ == condition.type_ && old.status == condition.status);
        if let Some(old) = same {
            condition.last_transition_time = old.last_transition_time.clone();
        }
    }
}

async fn delete(content: &VMRestoreContent, order: &RestoreOrder, shared: &Shared) -> Result<Action, Error> {
    if content.finalizers().is_empty() {
        return Ok(Action::await_change());
    }
    let _turns = turns(&shared.context.locks, order).await;
    let deletion = shared.context.restores.delete(order, content.status.as_ref()).await?;
    report(shared, content, &deletion.status).await?;
    Ok(if deletion.over { Action::await_change() } else { Action::requeue(TRY_AGAIN) })
}

/// Asks the watch's store whether the restore is still wanted.
struct Asked<'a> {
    store: &'a Store<VMRestoreContent>,
    content: &'a VMRestoreContent,
}

impl Progress for Asked<'_> {
    fn cancelled(&self) -> bool {
        let now = self.store.get(&ObjectRef::from_obj(self.content));
        now.is_none_or(|now| now.uid() != self.content.uid() || now.metadata.deletion_timestamp.is_some())
    }
}

/// Nobody can cancel while the cluster isn't asked.
struct NotAsked;

impl Progress for NotAsked {
    fn cancelled(&self) -> bool {
        false
    }
}

/// Finishes what a crash interrupted where names may have changed hands, and what was to be taken back, without waiting
/// for the API: the VM's files must be right first. Images that were being made wait for the controller.
fn recover(shared: &Arc<Shared>) {
    let records = shared.context.restores.journal.all().unwrap_or_else(|error| {
        tracing::error!(error = chain(&error), "the journal of restores can't be read");
        vec![]
    });
    for record in records.into_iter().filter(must_be_finished) {
        let (namespace, name) = &record.order.restore;
        let span = info_span!("recovery", restore = format!("{namespace}/{name}"), vm = %record.order.vm);
        tokio::spawn(recover_one(shared.clone(), record.order).instrument(span));
    }
}

fn must_be_finished(record: &RestoreRecord) -> bool {
    matches!(record.stage, Stage::Switching | Stage::Failed)
}

async fn recover_one(shared: Arc<Shared>, order: RestoreOrder) {
    loop {
        match recover_step(&shared, &order).await {
            Ok(true) => return tracing::info!("went on with an interrupted restore"),
            Ok(false) => {}
            Err(error) => tracing::error!(%error, "an interrupted restore can't be gone on with"),
        }
        if shared.stop.run_until_cancelled(tokio::time::sleep(TRY_AGAIN)).await.is_none() {
            return;
        }
    }
}

/// One try; whether there is no more to do. The controller may have been faster.
async fn recover_step(shared: &Shared, order: &RestoreOrder) -> Result<bool, JournalError> {
    let _turns = turns(&shared.context.locks, order).await;
    if !shared.context.restores.journal.load(&order.uid)?.as_ref().is_some_and(must_be_finished) {
        return Ok(true);
    }
    let told: Told = watch::Sender::new(None);
    Ok(matches!(shared.context.restores.advance(order, &NotAsked, &told).await?, Turn::Over(_)))
}

/// Ends restores whose object is gone without a word, and forgets those of which nothing is left to do.
async fn sweep(shared: Arc<Shared>, node: String) {
    let mut beat = tokio::time::interval(SWEEP);
    loop {
        beat.tick().await;
        let restores = &shared.context.restores;
        let Ok(records) = restores.journal.all() else { continue };
        let contents: Api<VMRestoreContent> = Api::all(shared.context.client.clone());
        let ours = ListParams::default().fields(&format!("spec.nodeName={node}"));
        let Ok(listed) = call("the list of this node's restores", contents.list(&ours)).await else { continue };
        let wanted: HashSet<_> = listed.items.iter().filter_map(ResourceExt::uid).collect();
        for record in records.into_iter().filter(|record| !wanted.contains(&record.order.uid)) {
            let _turns = turns(&shared.context.locks, &record.order).await;
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
