//! Watches and controllers: what they watch has the objects looked at again that it is news to.
//!
//! There is one watch a kind. Each fills its cache before it passes an event on, so what an event wakes sees its cause.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use freezeframe_api::v1alpha1::{
    VMRestore, VMRestoreContent, VMSnapshot, VMSnapshotClass, VMSnapshotSchedule, VMTarget,
};
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
use crate::wakes::{self, Ref, RestoreRef};
use crate::{content, restore, schedule, vmsnapshot};

/// Objects of one kind that are worked on at a time: each waits for the server most of the time.
const CONCURRENCY: u16 = 16;

/// How long reconciles may go on after the stop. One that is cut off is begun anew by the next process.
const LINGER: Duration = Duration::from_secs(10);

/// Runs the controllers until `stop` is cancelled and the reconciles under way have ended, ten seconds later at the
/// latest. Dropping the future ends them at once.
pub async fn run(ctx: Arc<Context>, sources: Sources, stop: CancellationToken) {
    let (of_content, woken) = unbounded();
    let (of_snapshot, cache) = (of_content.clone(), ctx.caches.snapshots.clone());
    let (of_restore, woken_restores) = unbounded();
    let (restore_of_snapshot, restores) = (of_restore.clone(), ctx.caches.restores.clone());
    let contents = sources.contents.watch(ctx.client.clone());
    let contents = contents.inspect_ok(move |content| wake(&of_content, wakes::by_content(content)));
    let snapshots = sources.snapshots.watch(ctx.client.clone());
    let snapshots = snapshots.inspect_ok(move |snapshot| {
        wake(&of_snapshot, wakes::by_snapshot(&cache, snapshot));
        wake(&restore_of_snapshot, wakes::restores_by_snapshot(&restores, snapshot));
    });
    let (due, woken_schedules) = Schedules::new(&ctx);
    let snapshots = due.wake_on(snapshots, schedule::wakes::by_snapshot);
    let targets = due.wake_on(sources.targets.watch(ctx.client.clone()), schedule::wakes::by_target);
    let classes = due.wake_on(sources.classes.watch(ctx.client.clone()), schedule::wakes::by_class);
    let of_contents = Controller::for_stream(contents, ctx.caches.contents.clone())
        .with_config(Config::default().concurrency(CONCURRENCY))
        .graceful_shutdown_on(stop.clone().cancelled_owned())
        .run(
            |object, ctx| measured(content::CONTROLLER, content::reconcile, object, ctx),
            |object, error, ctx| error_policy(content::CONTROLLER, &*object, error, &ctx),
            ctx.clone(),
        );
    let of_schedules = schedule_controller(&ctx, sources.schedules, woken_schedules)
        .graceful_shutdown_on(stop.clone().cancelled_owned())
        .run(
            |object, ctx| measured(schedule::CONTROLLER, schedule::reconcile, object, ctx),
            |object, error, ctx| error_policy(schedule::CONTROLLER, &*object, error, &ctx),
            ctx.clone(),
        );
    let of_snapshots = snapshot_controller(&ctx, snapshots, woken, targets, classes)
        .graceful_shutdown_on(stop.clone().cancelled_owned())
        .run(
            |object, ctx| measured(vmsnapshot::CONTROLLER, vmsnapshot::reconcile, object, ctx),
            |object, error, ctx| error_policy(vmsnapshot::CONTROLLER, &*object, error, &ctx),
            ctx.clone(),
        );
    let of_restores =
        restore_controller(&ctx, sources.restores, sources.restore_contents, (of_restore, woken_restores))
            .graceful_shutdown_on(stop.clone().cancelled_owned())
            .run(
                |object, ctx| measured(restore::CONTROLLER, restore::reconcile, object, ctx),
                |object, error, ctx| error_policy(restore::CONTROLLER, &*object, error, &ctx),
                ctx.clone(),
            );
    let all = async {
        futures::join!(
            of_contents.for_each(report),
            of_snapshots.for_each(report),
            of_schedules.for_each(report),
            of_restores.for_each(report),
        )
    };
    tokio::select! {
        _ = all => {}
        () = async { stop.cancelled().await; tokio::time::sleep(LINGER).await } => warn!("reconciles were cut off"),
    }
}

fn schedule_controller(
    ctx: &Context,
    schedules: Source<VMSnapshotSchedule>,
    woken: UnboundedReceiver<schedule::wakes::Ref>,
) -> Controller<Guarded<VMSnapshotSchedule>> {
    Controller::for_stream(schedules.watch(ctx.client.clone()), ctx.caches.schedules.clone())
        .with_config(Config::default().concurrency(CONCURRENCY))
        .reconcile_on(woken)
}

fn restore_controller(
    ctx: &Context,
    restores: Source<VMRestore>,
    contents: Source<VMRestoreContent>,
    (of_restore, woken): (UnboundedSender<RestoreRef>, UnboundedReceiver<RestoreRef>),
) -> Controller<Guarded<VMRestore>> {
    let cache = ctx.caches.restores.clone();
    let restores = restores.watch(ctx.client.clone());
    let restores = restores.inspect_ok(move |restore| wake(&of_restore, wakes::restores_by_restore(&cache, restore)));
    Controller::for_stream(restores, ctx.caches.restores.clone())
        .with_config(Config::default().concurrency(CONCURRENCY))
        .reconcile_on(woken)
        .watches_stream(contents.watch(ctx.client.clone()), |content| wakes::by_restore_content(&content))
}

fn snapshot_controller(
    ctx: &Context,
    snapshots: impl Stream<Item = watcher::Result<Guarded<VMSnapshot>>> + Send + 'static,
    woken: UnboundedReceiver<Ref>,
    targets: impl Stream<Item = watcher::Result<Guarded<VMTarget>>> + Send + 'static,
    classes: impl Stream<Item = watcher::Result<Guarded<VMSnapshotClass>>> + Send + 'static,
) -> Controller<Guarded<VMSnapshot>> {
    let Caches { snapshots: cache, .. } = ctx.caches.clone();
    let (by_target, by_class) = (cache.clone(), cache.clone());
    Controller::for_stream(snapshots, cache)
        .with_config(Config::default().concurrency(CONCURRENCY))
        .reconcile_on(woken)
        .watches_stream(targets, move |target| wakes::by_target(&by_target, &target))
        .watches_stream(classes, move |class| wakes::by_class(&by_class, &class))
}

/// Wakes schedules by the watches of other kinds.
struct Schedules {
    cache: Store<Guarded<VMSnapshotSchedule>>,
    due: UnboundedSender<schedule::wakes::Ref>,
}

impl Schedules {
    fn new(ctx: &Context) -> (Self, UnboundedReceiver<schedule::wakes::Ref>) {
        let (due, woken) = unbounded();
        (Self { cache: ctx.caches.schedules.clone(), due }, woken)
    }

    fn wake_on<K: 'static>(
        &self,
        watch: impl Stream<Item = watcher::Result<K>> + Send + 'static,
        whom: fn(&Store<Guarded<VMSnapshotSchedule>>, &K) -> Vec<schedule::wakes::Ref>,
    ) -> impl Stream<Item = watcher::Result<K>> + Send + 'static {
        let (cache, due) = (self.cache.clone(), self.due.clone());
        watch.inspect_ok(move |object| wake(&due, whom(&cache, object)))
    }
}

fn wake<R>(wakes: &UnboundedSender<R>, objects: impl IntoIterator<Item = R>) {
    for object in objects {
        // The receiver is gone when the controller is; then there is nobody to wake.
        if wakes.unbounded_send(object).is_err() {
            warn!("the controller that was to be woken has ended");
        }
    }
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
    Action::requeue(wait)
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
