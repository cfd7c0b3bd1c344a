//! Watches this node's work orders of one kind and has each served, one operation per VM.
//!
//! What an order asks for, and how it is done, is its [`Work`]'s: a snapshot's or a restore's.

use std::collections::{HashMap, HashSet};
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::channel::mpsc;
use kube::api::ListParams;
use kube::core::ClusterResourceScope;
use kube::runtime::controller::{Action, Config as ControllerConfig};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::{Controller, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::RwLock;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span};

use crate::causes::chain;
use crate::hypervisor::VmKey;
use crate::locks::{VmLocks, VmTurn};
use crate::metrics::Metrics;
use crate::report::{ReportError, call};
use crate::session::Progress;
use crate::session::journal::{Journal, JournalError, Record};

/// How soon what couldn't be done is tried again.
pub(crate) const TRY_AGAIN: Duration = Duration::from_secs(5);
/// Least time until an order is tried again after an error; orders are spread over a second more.
const BACKOFF: Duration = Duration::from_secs(1);
/// How often the journal is compared with the cluster.
const SWEEP: Duration = Duration::from_secs(600);

/// Why a work order couldn't be served to its end this time.
#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    /// Its record can't be read or written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The API doesn't know how far it is.
    #[error(transparent)]
    Report(#[from] ReportError),
}

/// The object that gives an order.
pub trait WorkOrder:
    Resource<DynamicType = (), Scope = ClusterResourceScope> + Clone + Debug + DeserializeOwned + Send + Sync + 'static
{
}

impl<K> WorkOrder for K where
    K: Resource<DynamicType = (), Scope = ClusterResourceScope>
        + Clone
        + Debug
        + DeserializeOwned
        + Send
        + Sync
        + 'static
{
}

/// The turns of an order's VMs.
pub(crate) type Turns = HashMap<VmKey, VmTurn>;

/// What is done for orders of one kind.
pub trait Work: Sized + Send + Sync + 'static {
    /// The object.
    type Content: WorkOrder;
    /// The same in plain types.
    type Order: Clone + Send + Sync;
    /// What is remembered of it over a crash.
    type Record: Record + Send + Sync;

    /// The records.
    fn journal(&self) -> &Journal<Self::Record>;
    /// Reads an object.
    fn order(content: &Self::Content) -> Self::Order;
    /// The order that a record is of.
    fn order_of(record: &Self::Record) -> &Self::Order;
    /// Every VM that is worked on, in an order that all agree on.
    fn vms(order: &Self::Order) -> Vec<VmKey>;
    /// What is logged with all that is done for it.
    fn span(order: &Self::Order) -> Span;
    /// Whether a crash left what must be put right without waiting for the API: the VM's files come first.
    fn must_be_finished(record: &Self::Record) -> bool;
    /// Goes on with such a record, with the VMs' turns; whether there is no more to do.
    fn go_on(&self, order: &Self::Order) -> impl Future<Output = Result<bool, JournalError>> + Send;
    /// Does what an object asks for, and reports it.
    fn serve(
        orders: &Orders<Self>,
        content: &Self::Content,
        order: &Self::Order,
    ) -> impl Future<Output = Result<Action, OrderError>> + Send;
    /// Sees to records whose objects are gone.
    fn sweep(orders: &Orders<Self>, unwanted: Vec<Self::Record>) -> impl Future<Output = ()> + Send;
}

/// What serving orders needs.
pub struct Context<W> {
    /// The API.
    pub client: Client,
    /// What is done.
    pub work: Arc<W>,
    /// One operation per VM.
    pub locks: VmLocks,
    /// What is counted.
    pub metrics: Metrics,
}

/// The orders of one kind that are being served.
pub struct Orders<W: Work> {
    pub(crate) context: Context<W>,
    /// Told of orders that are to be looked at again.
    pub(crate) moved: mpsc::Sender<ObjectRef<W::Content>>,
    pub(crate) stop: CancellationToken,
    store: Store<W::Content>,
    /// Read by each order that is being served.
    serving: RwLock<()>,
}

/// Runs until `stop`; what is being served then is waited for, so no window is left open.
pub async fn run<W: Work>(context: Context<W>, node: &str, stop: CancellationToken) {
    let contents: Api<W::Content> = Api::all(context.client.clone());
    let (moved, to_follow) = mpsc::channel(64);
    let controller = Controller::new(contents, watcher::Config::default().fields(&of_node(node)));
    let store = controller.store();
    let orders = Arc::new(Orders { context, moved, stop: stop.clone(), store, serving: RwLock::default() });
    recover(&orders);
    tokio::spawn(stop.clone().run_until_cancelled_owned(sweep(orders.clone(), node.to_owned())));
    let serving = controller
        .with_config(ControllerConfig::default().concurrency(64))
        .reconcile_on(to_follow)
        .graceful_shutdown_on(stop.clone().cancelled_owned())
        .run(reconcile, |content, error, _| error_policy(content.as_ref(), error), orders.clone())
        .for_each(|result| async move {
            if let Err(error) = result {
                tracing::warn!(error = chain(&error), "work order not finished");
            }
        });
    tokio::select! {
        () = serving => {}
        // Stopped before its first list, the controller would wait for that list for ever.
        () = at_rest(&orders) => {}
    }
}

fn of_node(node: &str) -> String {
    format!("spec.nodeName={node}")
}

/// Resolves when the agent is to stop and no work order is being served.
async fn at_rest<W: Work>(orders: &Orders<W>) {
    orders.stop.cancelled().await;
    drop(orders.serving.write().await);
}

fn error_policy(content: &impl WorkOrder, error: &OrderError) -> Action {
    tracing::warn!(content = content.name_any(), error = chain(error), "will try again");
    let jitter = content.uid().map_or(0, |uid| uid.bytes().map(u64::from).sum::<u64>() % 1000);
    Action::requeue(BACKOFF + Duration::from_millis(jitter))
}

async fn reconcile<W: Work>(content: Arc<W::Content>, orders: Arc<Orders<W>>) -> Result<Action, OrderError> {
    let _serving = orders.serving.read().await;
    let order = W::order(&content);
    W::serve(&orders, &content, &order).instrument(W::span(&order)).await
}

impl<W: Work> Orders<W> {
    /// The turns of all VMs of an order, always one after the other in the same order, so that no two wait for each
    /// other.
    pub(crate) async fn turns(&self, order: &W::Order) -> Turns {
        let mut turns = Turns::new();
        for vm in W::vms(order) {
            let turn = self.context.locks.turn(&vm).await;
            turns.insert(vm, turn);
        }
        turns
    }

    /// Whether the object is gone, or going: the watch's store knows.
    pub(crate) fn is_unwanted(&self, content: &W::Content) -> bool {
        let now = self.store.get(&ObjectRef::from_obj(content));
        now.is_none_or(|now| now.uid() != content.uid() || now.meta().deletion_timestamp.is_some())
    }
}

/// Nobody can cancel while the cluster isn't asked.
pub(crate) struct NotAsked;

impl Progress for NotAsked {
    fn cancelled(&self) -> bool {
        false
    }
}

/// Goes on with what a crash interrupted.
fn recover<W: Work>(orders: &Arc<Orders<W>>) {
    let records = orders.context.work.journal().all().unwrap_or_else(|error| {
        tracing::error!(error = chain(&error), "the journal can't be read");
        vec![]
    });
    for record in records.into_iter().filter(W::must_be_finished) {
        let order = W::order_of(&record).clone();
        let span = W::span(&order);
        tokio::spawn(recover_one(orders.clone(), order, record.uid().to_owned()).instrument(span));
    }
}

/// Tries until nothing is left to do: right after a crash the guard may still have the VM.
async fn recover_one<W: Work>(orders: Arc<Orders<W>>, order: W::Order, uid: String) {
    loop {
        match recover_step(&orders, &order, &uid).await {
            Ok(true) => return tracing::info!("went on with what was interrupted"),
            Ok(false) => {}
            Err(error) => tracing::error!(%error, "what was interrupted can't be gone on with"),
        }
        if orders.stop.run_until_cancelled(tokio::time::sleep(TRY_AGAIN)).await.is_none() {
            return;
        }
    }
}

/// One try; whether there is no more to do. The controller may have been faster, or the object deleted.
async fn recover_step<W: Work>(orders: &Orders<W>, order: &W::Order, uid: &str) -> Result<bool, JournalError> {
    let _turns = orders.turns(order).await;
    let record = orders.context.work.journal().load(uid)?;
    if !record.as_ref().is_some_and(W::must_be_finished) {
        return Ok(true);
    }
    orders.context.work.go_on(order).await
}

/// Compares the journal with the cluster, again and again.
async fn sweep<W: Work>(orders: Arc<Orders<W>>, node: String) {
    let mut beat = tokio::time::interval(SWEEP);
    loop {
        beat.tick().await;
        let Ok(records) = orders.context.work.journal().all() else { continue };
        let contents: Api<W::Content> = Api::all(orders.context.client.clone());
        let ours = ListParams::default().fields(&of_node(&node));
        let Ok(listed) = call("the list of this node's orders", contents.list(&ours)).await else { continue };
        let wanted: HashSet<_> = listed.items.iter().filter_map(ResourceExt::uid).collect();
        let unwanted = records.into_iter().filter(|record| !wanted.contains(record.uid()));
        W::sweep(&orders, unwanted.collect()).await;
    }
}
