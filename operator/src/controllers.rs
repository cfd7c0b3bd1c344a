//! Watches and controllers: which change of which object has which snapshot looked at again.
//!
//! There is one watch a kind. Each fills its cache before it passes an event on, so what an event wakes sees its cause.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use freezeframe_api::v1alpha1::{VMSnapshot, VMSnapshotClass, VMSnapshotContent, VMTarget};
use futures::channel::mpsc::{UnboundedReceiver, UnboundedSender, unbounded};
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use kube::runtime::controller::{Action, Config, Controller, Error as ControllerError};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher;
use kube::{Resource, ResourceExt as _};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, error, info_span, warn};

use crate::caches::{Caches, Guarded, Source, Sources};
use crate::context::Context;
use crate::error::Error;
use crate::{content, vmsnapshot};

/// Objects of one kind that are worked on at a time: each waits for the server most of the time.
const CONCURRENCY: u16 = 16;

/// How long reconciles may go on after the stop. One that is cut off is begun anew by the next process.
const LINGER: Duration = Duration::from_secs(10);

type Ref = ObjectRef<Guarded<VMSnapshot>>;

/// Runs the controllers until `stop` is cancelled and the reconciles under way have ended, ten seconds later at the
/// latest. Dropping the future ends them at once.
pub async fn run(ctx: Arc<Context>, sources: Sources, stop: CancellationToken) {
    let (wake, woken) = unbounded();
    let contents = sources.contents.watch(ctx.client.clone()).inspect_ok(wake_snapshot(wake.clone()));
    let snapshots =
        sources.snapshots.watch(ctx.client.clone()).inspect_ok(wake_followers(ctx.caches.snapshots.clone(), wake));
    let of_contents = Controller::for_stream(contents, ctx.caches.contents.clone())
        .with_config(Config::default().concurrency(CONCURRENCY))
        .graceful_shutdown_on(stop.clone().cancelled_owned())
        .run(
            |object, ctx| measured(content::CONTROLLER, content::reconcile, object, ctx),
            |object, error, ctx| error_policy(content::CONTROLLER, &*object, error, &ctx),
            ctx.clone(),
        );
    let of_snapshots = snapshot_controller(&ctx, snapshots, woken, sources.targets, sources.classes)
        .graceful_shutdown_on(stop.clone().cancelled_owned())
        .run(
            |object, ctx| measured(vmsnapshot::CONTROLLER, vmsnapshot::reconcile, object, ctx),
            |object, error, ctx| error_policy(vmsnapshot::CONTROLLER, &*object, error, &ctx),
            ctx.clone(),
        );
    tokio::select! {
        _ = async { futures::join!(of_contents.for_each(report), of_snapshots.for_each(report)) } => {}
        () = async { stop.cancelled().await; tokio::time::sleep(LINGER).await } => warn!("reconciles were cut off"),
    }
}

fn snapshot_controller(
    ctx: &Context,
    snapshots: impl Stream<Item = watcher::Result<Guarded<VMSnapshot>>> + Send + 'static,
    woken: UnboundedReceiver<Ref>,
    targets: Source<VMTarget>,
    classes: Source<VMSnapshotClass>,
) -> Controller<Guarded<VMSnapshot>> {
    let Caches { snapshots: cache, .. } = ctx.caches.clone();
    let (by_target, by_class) = (cache.clone(), cache.clone());
    Controller::for_stream(snapshots, cache)
        .with_config(Config::default().concurrency(CONCURRENCY))
        .reconcile_on(woken)
        .watches_stream(targets.watch(ctx.client.clone()), move |target: Guarded<VMTarget>| {
            unsettled(&by_target, |snapshot| {
                snapshot.namespace() == target.namespace() && snapshot.spec.vm_name == target.name_any()
            })
        })
        .watches_stream(classes.watch(ctx.client.clone()), move |class: Guarded<VMSnapshotClass>| {
            let name = class.name_any();
            unsettled(&by_class, |snapshot| snapshot.spec.class_name.as_ref().is_none_or(|wanted| *wanted == name))
        })
}

fn wake_snapshot(wake: UnboundedSender<Ref>) -> impl FnMut(&Guarded<VMSnapshotContent>) + Send + 'static {
    move |content| {
        if let Ok(content) = &content.0 {
            let owner = &content.spec.vm_snapshot_ref;
            send(&wake, ObjectRef::new(&owner.name).within(&owner.namespace));
        }
    }
}

/// Wakes those that wait for the VM of a snapshot which needs it no more.
fn wake_followers(
    cache: Store<Guarded<VMSnapshot>>,
    wake: UnboundedSender<Ref>,
) -> impl FnMut(&Guarded<VMSnapshot>) + Send + 'static {
    move |touched| {
        let Ok(snapshot) = &touched.0 else { return };
        let gone = cache.get(&ObjectRef::from_obj(touched)).is_none();
        if gone || vmsnapshot::is_settled(snapshot) || snapshot.metadata.deletion_timestamp.is_some() {
            for follower in
                unsettled(&cache, |other| vmsnapshot::same_vm(snapshot, other) && other.uid() != snapshot.uid())
            {
                send(&wake, follower);
            }
        }
    }
}

fn send(wake: &UnboundedSender<Ref>, snapshot: Ref) {
    // The receiver is gone when the controller is; then there is nobody to wake.
    if wake.unbounded_send(snapshot).is_err() {
        warn!("the controller of snapshots has ended");
    }
}

fn unsettled(cache: &Store<Guarded<VMSnapshot>>, wanted: impl Fn(&VMSnapshot) -> bool) -> Vec<Ref> {
    let matches = |object: &Arc<Guarded<VMSnapshot>>| {
        object.0.as_ref().is_ok_and(|snapshot| !vmsnapshot::is_settled(snapshot) && wanted(snapshot))
    };
    cache.state().iter().filter(|object| matches(object)).map(|object| ObjectRef::from_obj(&**object)).collect()
}

fn measured<K, F>(
    controller: &'static str,
    reconcile: impl FnOnce(Arc<K>, Arc<Context>) -> F,
    object: Arc<K>,
    ctx: Arc<Context>,
) -> impl Future<Output = Result<Action, Error>> + Send
where
    K: Resource<DynamicType = ()>,
    F: Future<Output = Result<Action, Error>> + Send,
{
    let key = key(controller, &*object);
    let span = info_span!("reconcile", object = key);
    let reconcile = reconcile(object, ctx.clone());
    async move {
        let start = Instant::now();
        let result = reconcile.await;
        ctx.metrics.count_reconcile(controller, start.elapsed());
        if result.is_ok() {
            ctx.retries.after_success(&key);
        }
        result
    }
    .instrument(span)
}

fn error_policy<K: Resource<DynamicType = ()>>(
    controller: &'static str,
    object: &K,
    error: &Error,
    ctx: &Context,
) -> Action {
    let (kind, key) = (error.kind(), key(controller, object));
    ctx.metrics.count_error(controller, kind);
    let wait = ctx.retries.after_error(&key, kind);
    warn!(object = key, error = error as &dyn std::error::Error, ?wait, "reconcile broke off");
    wait.map_or_else(Action::await_change, Action::requeue)
}

fn key<K: Resource<DynamicType = ()>>(controller: &str, object: &K) -> String {
    format!("{controller}/{}/{}", object.namespace().unwrap_or_default(), object.name_any())
}

async fn report<K>(result: Result<(ObjectRef<K>, Action), ControllerError<Error, watcher::Error>>)
where
    K: Resource<DynamicType = ()>,
{
    match result {
        // A failed reconcile is logged by the error policy; an object that went while it was in line needs no word.
        Ok(_) | Err(ControllerError::ReconcilerFailed(..) | ControllerError::ObjectNotFound(_)) => {}
        Err(error) => error!(error = &error as &dyn std::error::Error, "watch"),
    }
}
