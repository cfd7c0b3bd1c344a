//! Watches this node's work orders and runs a session for each.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use freezeframe_api::v1alpha1::{ContentPhase, VMSnapshotContent, VMSnapshotContentStatus};
use futures::channel::mpsc;
use futures::{SinkExt, StreamExt};
use kube::api::ListParams;
use kube::runtime::controller::{Action, Config as ControllerConfig};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::{Controller, watcher};
use kube::{Api, Client, ResourceExt};
use tokio::sync::RwLock;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, info_span};

use crate::locks::VmLocks;
use crate::metrics::Metrics;
use crate::report::{ReportError, call, report};
use crate::session::journal::{JournalError, SessionRecord, Stage};
use crate::session::order::Order;
use crate::session::{Progress, Sessions, Turn};

/// How soon what couldn't be removed is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(5);
/// Longest time between two tries of a report.
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);
/// How often the journal is compared with the cluster.
const SWEEP: Duration = Duration::from_secs(600);

/// What a reconcile needs.
pub struct Context {
    /// The API.
    pub client: Client,
    /// The sessions of this node.
    pub sessions: Arc<Sessions>,
    /// One operation per VM.
    pub locks: VmLocks,
    /// What is counted.
    pub metrics: Metrics,
}

/// Why a work order couldn't be served to its end this time.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Report(#[from] ReportError),
}

struct Shared {
    context: Context,
    store: Store<VMSnapshotContent>,
    moved: mpsc::Sender<ObjectRef<VMSnapshotContent>>,
    /// Read by each work order that is being served.
    serving: RwLock<()>,
}

/// Runs until `stop`; sessions under way are finished first, so no window is left open.
pub async fn run(context: Context, node: &str, stop: CancellationToken) {
    let contents: Api<VMSnapshotContent> = Api::all(context.client.clone());
    let watched = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
    let (moved, to_follow) = mpsc::channel(64);
    let controller = Controller::new(contents, watched);
    let store = controller.store();
    let shared = Arc::new(Shared { context, store, moved, serving: RwLock::default() });
    recover(&shared, &stop);
    tokio::spawn(stop.clone().run_until_cancelled_owned(sweep(shared.clone(), node.to_owned())));
    let serving = controller
        .with_config(ControllerConfig::default().concurrency(64))
        .reconcile_on(to_follow)
        .graceful_shutdown_on(stop.clone().cancelled_owned())
        .run(reconcile, |content, error, shared| error_policy(&content, error, &shared), shared.clone())
        .for_each(|result| async move {
            if let Err(error) = result {
                tracing::warn!(error = crate::session::outcome::chain(&error), "work order not finished");
            }
        });
    tokio::select! {
        () = serving => {}
        // Stopped before its first list, the controller would wait for that list for ever.
        () = at_rest(&shared, &stop) => {}
    }
}

/// Resolves when the agent is to stop and no work order is being served.
async fn at_rest(shared: &Shared, stop: &CancellationToken) {
    stop.cancelled().await;
    drop(shared.serving.write().await);
}

fn error_policy(content: &VMSnapshotContent, error: &Error, _: &Shared) -> Action {
    tracing::warn!(content = content.name_any(), error = crate::session::outcome::chain(error), "will try again");
    let jitter = content.uid().map_or(0, |uid| uid.bytes().map(u64::from).sum::<u64>() % 1000);
    Action::requeue(LONGEST_BACKOFF / 10 + Duration::from_millis(jitter))
}

async fn reconcile(content: Arc<VMSnapshotContent>, shared: Arc<Shared>) -> Result<Action, Error> {
    let _serving = shared.serving.read().await;
    let order = Order::new(&content);
    let (namespace, name) = &order.snapshot;
    let span = info_span!("session", snapshot = format!("{namespace}/{name}"), vm = %order.vm);
    serve(&content, &order, &shared).instrument(span).await
}

async fn serve(content: &VMSnapshotContent, order: &Order, shared: &Shared) -> Result<Action, Error> {
    if content.metadata.deletion_timestamp.is_some() {
        return delete(content, order, shared).await;
    }
    if let Some(settled) = settled(order, shared)? {
        report(&shared.context.client, content, &settled.status.unwrap_or_default()).await?;
        return Ok(Action::await_change());
    }
    let _turn = shared.context.locks.turn_of_snapshot(&order.vm).await;
    let asked = Asked { shared, content };
    loop {
        match shared.context.sessions.advance(order, &asked).await? {
            Turn::Over(status) => {
                shared.context.metrics.session_ended(&status);
                report(&shared.context.client, content, &status).await?;
                return Ok(Action::await_change());
            }
            Turn::Report(status) => {
                report(&shared.context.client, content, &status).await?;
                if status.phase == Some(ContentPhase::Failed) {
                    return Ok(Action::requeue(TRY_AGAIN));
                }
            }
        }
    }
}

/// A record that needs no more work, if that is what the journal has.
fn settled(order: &Order, shared: &Shared) -> Result<Option<SessionRecord>, JournalError> {
    let record = shared.context.sessions.journal.load(&order.uid)?;
    Ok(record.filter(|record| !is_unsettled(record)))
}

async fn delete(content: &VMSnapshotContent, order: &Order, shared: &Shared) -> Result<Action, Error> {
    if content.finalizers().is_empty() {
        return Ok(Action::await_change());
    }
    let _turn = shared.context.locks.turn_after_snapshots(&order.vm).await;
    let waiting = shared.context.locks.waiting(&order.vm);
    let deletion = shared.context.sessions.delete_unless_waiting(order, &waiting).await?;
    for name in &deletion.moved {
        // The other end is the controller itself; if it is gone, so is the need.
        let _ = shared.moved.clone().send(ObjectRef::new(name)).await;
    }
    let unchanged = content.status.as_ref().is_some_and(|old| same_but_for_times(old, &deletion.status));
    if !unchanged {
        report(&shared.context.client, content, &deletion.status).await?;
    }
    if deletion.over {
        shared.context.metrics.deletion_ended();
        return Ok(Action::await_change());
    }
    Ok(Action::requeue(TRY_AGAIN))
}

fn same_but_for_times(a: &VMSnapshotContentStatus, b: &VMSnapshotContentStatus) -> bool {
    let timeless = |status: &VMSnapshotContentStatus| {
        let mut status = status.clone();
        for condition in &mut status.conditions {
            condition.last_transition_time.0 = k8s_openapi::jiff::Timestamp::UNIX_EPOCH;
        }
        status
    };
    timeless(a) == timeless(b)
}

/// Asks the watch's store whether the snapshot is still wanted, and tells the API how far it is.
struct Asked<'a> {
    shared: &'a Shared,
    content: &'a VMSnapshotContent,
}

#[async_trait]
impl Progress for Asked<'_> {
    fn cancelled(&self) -> bool {
        let now = self.shared.store.get(&ObjectRef::from_obj(self.content));
        now.is_none_or(|now| now.uid() != self.content.uid() || now.metadata.deletion_timestamp.is_some())
    }

    async fn tell(&self, status: VMSnapshotContentStatus) {
        if let Err(error) = report(&self.shared.context.client, self.content, &status).await {
            tracing::debug!(error = crate::session::outcome::chain(&error), "nobody is told how far the copies are");
        }
    }
}

/// Nobody can cancel while the cluster isn't asked.
struct NotAsked;

impl Progress for NotAsked {
    fn cancelled(&self) -> bool {
        false
    }
}

/// Goes on with what a crash interrupted, without waiting for the API: the VM's files must be right first.
fn recover(shared: &Arc<Shared>, stop: &CancellationToken) {
    let records = shared.context.sessions.journal.all().unwrap_or_else(|error| {
        tracing::error!(error = crate::session::outcome::chain(&error), "the journal can't be read");
        vec![]
    });
    for record in records.into_iter().filter(is_unsettled) {
        let (namespace, name) = &record.order.snapshot;
        let span = info_span!("recovery", snapshot = format!("{namespace}/{name}"), vm = %record.order.vm);
        let recovery = recover_one(shared.clone(), record.order, stop.clone());
        tokio::spawn(recovery.instrument(span));
    }
}

/// Tries until nothing is left to do: right after a crash the guard may still have the VM.
async fn recover_one(shared: Arc<Shared>, order: Order, stop: CancellationToken) {
    loop {
        match recover_step(&shared, &order).await {
            Ok(true) => return tracing::info!("went on with an interrupted snapshot"),
            Ok(false) => {}
            Err(error) => tracing::error!(%error, "an interrupted snapshot can't be gone on with"),
        }
        if stop.run_until_cancelled(tokio::time::sleep(TRY_AGAIN)).await.is_none() {
            return;
        }
    }
}

/// One try; whether there is no more to do. The controller may have been faster, or the snapshot deleted.
async fn recover_step(shared: &Shared, order: &Order) -> Result<bool, JournalError> {
    let _turn = shared.context.locks.turn(&order.vm).await;
    let record = shared.context.sessions.journal.load(&order.uid)?;
    if !record.as_ref().is_some_and(is_unsettled) {
        return Ok(true);
    }
    Ok(matches!(shared.context.sessions.advance(order, &NotAsked).await?, Turn::Over(_)))
}

fn is_unsettled(record: &SessionRecord) -> bool {
    matches!(record.stage, Stage::Open | Stage::Cut | Stage::Failed)
}

/// Forgets records of which neither artifact nor object is left, and counts those that nobody asks for.
async fn sweep(shared: Arc<Shared>, node: String) {
    let mut beat = tokio::time::interval(SWEEP);
    loop {
        beat.tick().await;
        let Ok(records) = shared.context.sessions.journal.all() else { continue };
        let contents: Api<VMSnapshotContent> = Api::all(shared.context.client.clone());
        let ours = ListParams::default().fields(&format!("spec.nodeName={node}"));
        let Ok(listed) = call("the list of this node's contents", contents.list(&ours)).await else { continue };
        let wanted: HashSet<_> = listed.items.iter().filter_map(ResourceExt::uid).collect();
        let unwanted = records.into_iter().filter(|record| !wanted.contains(&record.order.uid));
        let (gone, left): (Vec<_>, Vec<_>) = unwanted.partition(|record| record.stage == Stage::Removed);
        for record in gone {
            if let Err(error) = shared.context.sessions.journal.forget(&record.order.uid) {
                tracing::warn!(%error, "a record of nothing can't be forgotten");
            }
        }
        for record in &left {
            tracing::warn!(content = record.order.content, stage = ?record.stage, "a snapshot's object is gone, its data isn't");
        }
        shared.context.metrics.set_orphans(left.len());
    }
}
