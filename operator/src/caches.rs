//! What the watches have seen, one cache a kind.

use std::fmt::Debug;

use freezeframe_api::v1alpha1::{
    VMRestore, VMRestoreContent, VMSnapshot, VMSnapshotClass, VMSnapshotContent, VMSnapshotSchedule, VMTarget,
};
use futures::{Stream, TryStreamExt as _};
use kube::core::DeserializeGuard;
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{self, Store};
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt as _, watcher as watch};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// An object as it is watched: one that can't be read doesn't end the watch of the others.
pub type Guarded<K> = DeserializeGuard<K>;

/// What the watches have seen.
#[derive(Clone, Debug)]
pub struct Caches {
    /// The snapshots of all namespaces.
    pub snapshots: Store<Guarded<VMSnapshot>>,
    /// All contents.
    pub contents: Store<Guarded<VMSnapshotContent>>,
    /// The VMs of all namespaces.
    pub targets: Store<Guarded<VMTarget>>,
    /// All classes.
    pub classes: Store<Guarded<VMSnapshotClass>>,
    /// The schedules of all namespaces.
    pub schedules: Store<Guarded<VMSnapshotSchedule>>,
    /// The restores of all namespaces.
    pub restores: Store<Guarded<VMRestore>>,
    filled: Vec<CancellationToken>,
}

/// Where the watches put what they see.
pub struct Sources {
    /// Fills [`Caches::snapshots`].
    pub snapshots: Source<VMSnapshot>,
    /// Fills [`Caches::contents`].
    pub contents: Source<VMSnapshotContent>,
    /// Fills [`Caches::targets`].
    pub targets: Source<VMTarget>,
    /// Fills [`Caches::classes`].
    pub classes: Source<VMSnapshotClass>,
    /// Fills [`Caches::schedules`].
    pub schedules: Source<VMSnapshotSchedule>,
    /// Fills [`Caches::restores`].
    pub restores: Source<VMRestore>,
    /// Wakes restores; what they rest on is asked of the server.
    pub restore_contents: Source<VMRestoreContent>,
}

/// Fills the cache of one kind.
pub struct Source<K>
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    writer: Writer<Guarded<K>>,
    filled: CancellationToken,
}

impl Caches {
    /// Empty caches, and what fills them.
    #[must_use]
    pub fn new() -> (Self, Sources) {
        let (snapshots, snapshot_source) = cache();
        let (contents, content_source) = cache();
        let (targets, target_source) = cache();
        let (classes, class_source) = cache();
        let (schedules, schedule_source) = cache();
        let (restores, restore_source) = cache();
        let (_, restore_content_source) = cache();
        let filled = vec![
            snapshot_source.filled.clone(),
            content_source.filled.clone(),
            target_source.filled.clone(),
            class_source.filled.clone(),
            schedule_source.filled.clone(),
            restore_source.filled.clone(),
        ];
        let sources = Sources {
            snapshots: snapshot_source,
            contents: content_source,
            targets: target_source,
            classes: class_source,
            schedules: schedule_source,
            restores: restore_source,
            restore_contents: restore_content_source,
        };
        (Self { snapshots, contents, targets, classes, schedules, restores, filled }, sources)
    }

    /// Returns when each cache has been filled once: before that, absence from one means nothing.
    ///
    /// `Store::wait_until_ready` would do, but it wakes the last of those that wait, and kube's controller is one.
    pub async fn filled(&self) {
        for cache in &self.filled {
            cache.cancelled().await;
        }
    }
}

fn cache<K>() -> (Store<Guarded<K>>, Source<K>)
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    let (store, writer) = reflector::store();
    (store, Source { writer, filled: CancellationToken::new() })
}

impl<K> Source<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    /// Watches the kind: its objects as they come, change and go, each in the cache before it is in the stream.
    pub fn watch(self, client: Client) -> impl Stream<Item = watcher::Result<Guarded<K>>> + Send + 'static {
        let filled = self.filled;
        watch(Api::<Guarded<K>>::all(client), watcher::Config::default())
            .default_backoff()
            .reflect(self.writer)
            .inspect_ok(move |event| {
                if matches!(event, Event::InitDone) {
                    filled.cancel();
                }
            })
            .touched_objects()
            .inspect_ok(|object| {
                if let Err(error) = &object.0 {
                    warn!(kind = %K::kind(&()), object = object.name_any(), error = error.error, "skipping an object");
                }
            })
    }

    /// Fills the cache with these objects and no others, as a list from the server would.
    pub fn fill(&mut self, objects: impl IntoIterator<Item = K>) {
        self.writer.apply_watcher_event(&Event::Init);
        for object in objects {
            self.writer.apply_watcher_event(&Event::InitApply(DeserializeGuard(Ok(object))));
        }
        self.writer.apply_watcher_event(&Event::InitDone);
        self.filled.cancel();
    }
}
