//! Gathers what a decision about one snapshot rests on. The only step that reads.

use std::sync::Arc;

use freezeframe_api::v1alpha1::{Phase, VMSnapshot, VMSnapshotClass, VMSnapshotContent, VMTarget};
use freezeframe_api::{DEFAULT_CLASS_ANNOTATION, SNAPSHOT_FINALIZER};
use k8s_openapi::jiff::Timestamp;
use kube::runtime::reflector::ObjectRef;
use kube::{Api, ResourceExt as _};

use super::{order, plan, queue};
use crate::caches::Caches;
use crate::context::Context;
use crate::error::{Error, bounded, unless_gone};

/// What a decision rests on.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The snapshot.
    pub snapshot: Arc<VMSnapshot>,
    /// The object of its content's name.
    pub content: ContentState,
    /// The VM, if it is known.
    pub target: Option<VMTarget>,
    /// The policy.
    pub class: ClassState,
    /// Name of the snapshot of the same VM just before this one, while that one must go first.
    pub ahead: Option<String>,
}

/// The object of the content's name.
#[derive(Clone, Debug)]
pub enum ContentState {
    /// None. Asked of the server, not of the cache, wherever there may be one.
    Absent,
    /// One that belongs to another snapshot.
    Foreign,
    /// The snapshot's own.
    Own(Box<VMSnapshotContent>),
}

/// The class that applies to a snapshot.
#[derive(Clone, Debug)]
pub enum ClassState {
    /// It exists.
    Found(Box<VMSnapshotClass>),
    /// The one that was named doesn't.
    NotFound(String),
    /// None was named, and that many are the default one.
    NoDefault(usize),
}

/// Reads everything, from the caches where that is safe.
pub async fn observe(snapshot: Arc<VMSnapshot>, ctx: &Context, now: Timestamp) -> Result<Observed, Error> {
    let caches = &ctx.caches;
    let target = target(&snapshot, caches);
    Ok(Observed {
        content: content(&snapshot, ctx, now).await?,
        class: class(snapshot.spec.class_name.as_deref(), caches),
        ahead: ahead(&snapshot, target.as_ref(), caches),
        target,
        snapshot,
    })
}

/// The snapshot's content. What the cache doesn't show may have been created a moment ago, or before a restart, so its
/// absence is asked of the server. No content is older than the snapshot's finalizer; and one that failed gets none.
/// Nor is a node given up on for what the cache alone doesn't show: a watch may be silent for minutes.
pub async fn content(snapshot: &VMSnapshot, ctx: &Context, now: Timestamp) -> Result<ContentState, Error> {
    let uid = snapshot.uid().unwrap_or_default();
    let name = order::content_name(&uid);
    if let Some(cached) = ctx.caches.contents.get(&ObjectRef::new(&name)) {
        let content = cached.0.as_ref().map_err(|error| Error::unreadable("VMSnapshotContent", error))?;
        if !plan::is_overdue(snapshot, content, now) {
            return Ok(own_or_foreign(content.clone(), &uid));
        }
    } else if !may_have_content(snapshot) {
        return Ok(ContentState::Absent);
    }
    let api = Api::<VMSnapshotContent>::all(ctx.client.clone());
    let found = unless_gone(bounded("looking for the content", api.get(&name)).await)?;
    Ok(found.map_or(ContentState::Absent, |content| own_or_foreign(content, &uid)))
}

fn may_have_content(snapshot: &VMSnapshot) -> bool {
    let deleted = snapshot.metadata.deletion_timestamp.is_some();
    let failed = snapshot.status.as_ref().is_some_and(|status| status.phase == Phase::Failed);
    snapshot.finalizers().iter().any(|finalizer| finalizer == SNAPSHOT_FINALIZER) && (deleted || !failed)
}

fn own_or_foreign(content: VMSnapshotContent, snapshot_uid: &str) -> ContentState {
    if content.spec.vm_snapshot_ref.uid == snapshot_uid {
        ContentState::Own(Box::new(content))
    } else {
        ContentState::Foreign
    }
}

fn target(snapshot: &VMSnapshot, caches: &Caches) -> Option<VMTarget> {
    let name = ObjectRef::new(&snapshot.spec.vm_name).within(&snapshot.namespace().unwrap_or_default());
    caches.targets.get(&name)?.0.as_ref().ok().cloned() // One that can't be read was logged as it arrived.
}

/// The class of a name, or the default.
#[must_use]
pub fn class(name: Option<&str>, caches: &Caches) -> ClassState {
    let classes: Vec<_> = caches.classes.state();
    let mut readable = classes.iter().filter_map(|class| class.0.as_ref().ok()); // As above: logged as it arrived.
    if let Some(name) = name {
        let found = readable.find(|class| class.name_any() == name);
        return found.map_or(ClassState::NotFound(name.to_owned()), |class| ClassState::Found(Box::new(class.clone())));
    }
    let is_default = |class: &&VMSnapshotClass| {
        class.annotations().get(DEFAULT_CLASS_ANNOTATION).is_some_and(|value| value == "true")
    };
    match readable.filter(is_default).collect::<Vec<_>>()[..] {
        [class] => ClassState::Found(Box::new(class.clone())),
        ref several => ClassState::NoDefault(several.len()),
    }
}

fn ahead(snapshot: &VMSnapshot, target: Option<&VMTarget>, caches: &Caches) -> Option<String> {
    let snapshots = caches.snapshots.state();
    let of_vm: Vec<_> = snapshots
        .iter()
        .filter_map(|other| other.0.as_ref().ok()) // As above: logged as it arrived.
        .filter(|other| queue::same_vm(snapshot, other))
        .map(|other| {
            (other, other.uid().and_then(|uid| caches.contents.get(&ObjectRef::new(&order::content_name(&uid)))))
        })
        .collect();
    let entries: Vec<_> = of_vm
        .iter()
        .map(|(snapshot, content)| queue::Entry {
            snapshot,
            content: content.as_deref().and_then(|content| content.0.as_ref().ok()),
        })
        .collect();
    queue::ahead(snapshot, &entries, target).map(kube::ResourceExt::name_any)
}
