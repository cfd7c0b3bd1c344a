//! Gathers what a decision about one restore rests on. The only step that reads.

use freezeframe_api::RESTORE_FINALIZER;
use freezeframe_api::v1alpha1::{VMRestore, VMRestoreContent, VMSnapshot, VMSnapshotContent};
use kube::runtime::reflector::ObjectRef;
use kube::{Api, ResourceExt};

use super::{is_settled, order};
use crate::context::Context;
use crate::error::{Error, bounded, unless_gone};
use crate::vmsnapshot::{ClassState, class};

/// What a decision rests on.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The restore.
    pub restore: VMRestore,
    /// The snapshot of the name it gives, from the server.
    pub snapshot: Option<VMSnapshot>,
    /// The directory for restored images that the snapshot's class names.
    pub class_directory: Option<String>,
    /// That snapshot's content.
    pub source: Option<VMSnapshotContent>,
    /// The restore's own content, from the server.
    pub content: Option<VMRestoreContent>,
    /// The snapshot that keeps what is replaced, and its content.
    pub before: Option<(VMSnapshot, Option<VMSnapshotContent>)>,
    /// Whether there is a VM of the new one's name.
    pub new_vm_exists: bool,
    /// Name of another restore in place of the same VM that goes first.
    pub ahead: Option<String>,
}

/// Reads everything. Disks are at stake and restores are rare: what may be overwritten is decided by what the server
/// says, not by a cache.
pub async fn observe(restore: VMRestore, ctx: &Context) -> Result<Observed, Error> {
    let content = content(&restore, ctx).await?;
    let needs_more = restore.metadata.deletion_timestamp.is_none() && !is_settled(&restore);
    let snapshot = if needs_more { snapshot(&restore, &restore.spec.snapshot_name, ctx).await? } else { None };
    let before = if needs_more && content.is_some() { snapshot_before(&restore, ctx).await? } else { None };
    let source = snapshot_content(snapshot.as_ref(), ctx).await?;
    Ok(Observed {
        new_vm_exists: new_vm_exists(&restore, ctx),
        ahead: snapshot.as_ref().and_then(|snapshot| ahead(&restore, &snapshot.spec.vm_name, ctx)),
        class_directory: snapshot.as_ref().and_then(|snapshot| class_directory(snapshot, ctx)),
        restore,
        snapshot,
        source,
        content,
        before,
    })
}

async fn content(restore: &VMRestore, ctx: &Context) -> Result<Option<VMRestoreContent>, Error> {
    // No content is older than the finalizer.
    if !restore.finalizers().iter().any(|finalizer| finalizer == RESTORE_FINALIZER) {
        return Ok(None);
    }
    let name = order::content_name(&restore.uid().unwrap_or_default());
    let api = Api::<VMRestoreContent>::all(ctx.client.clone());
    unless_gone(bounded("looking for the restore's content", api.get(&name)).await)
}

async fn snapshot(restore: &VMRestore, name: &str, ctx: &Context) -> Result<Option<VMSnapshot>, Error> {
    let api = Api::<VMSnapshot>::namespaced(ctx.client.clone(), &restore.namespace().unwrap_or_default());
    unless_gone(bounded("looking for a restore's snapshot", api.get(name)).await)
}

async fn snapshot_before(
    restore: &VMRestore,
    ctx: &Context,
) -> Result<Option<(VMSnapshot, Option<VMSnapshotContent>)>, Error> {
    let Some(before) = snapshot(restore, &order::before_name(restore), ctx).await? else { return Ok(None) };
    let content = snapshot_content(Some(&before), ctx).await?;
    Ok(Some((before, content)))
}

async fn snapshot_content(snapshot: Option<&VMSnapshot>, ctx: &Context) -> Result<Option<VMSnapshotContent>, Error> {
    let status = snapshot.and_then(|snapshot| snapshot.status.as_ref());
    let Some(name) = status.and_then(|status| status.content_name.as_ref()) else { return Ok(None) };
    let api = Api::<VMSnapshotContent>::all(ctx.client.clone());
    let found = unless_gone(bounded("looking for a snapshot's content", api.get(name)).await)?;
    Ok(found.filter(|content| Some(&content.spec.vm_snapshot_ref.uid) == snapshot.and_then(ResourceExt::uid).as_ref()))
}

/// Nothing is overwritten there, so the cache will do.
fn class_directory(snapshot: &VMSnapshot, ctx: &Context) -> Option<String> {
    match class(snapshot.spec.class_name.as_deref(), &ctx.caches) {
        ClassState::Found(class) => class.spec.restore_directory.clone(),
        ClassState::NotFound(_) | ClassState::NoDefault(_) => None,
    }
}

fn new_vm_exists(restore: &VMRestore, ctx: &Context) -> bool {
    let namespace = restore.namespace().unwrap_or_default();
    let name = restore.spec.target.new_vm.as_ref();
    name.is_some_and(|name| ctx.caches.targets.get(&ObjectRef::new(name).within(&namespace)).is_some())
}

/// The oldest of the unfinished restores in place of the VM, unless that is this one.
fn ahead(restore: &VMRestore, vm: &str, ctx: &Context) -> Option<String> {
    let age = |restore: &VMRestore| {
        (restore.metadata.creation_timestamp.as_ref().map(|time| time.0), restore.uid().unwrap_or_default())
    };
    let snapshots = &ctx.caches.snapshots;
    let of_vm = |other: &VMRestore| {
        let snapshot = ObjectRef::new(&other.spec.snapshot_name).within(&other.namespace().unwrap_or_default());
        let snapshot = snapshots.get(&snapshot);
        snapshot.is_some_and(|snapshot| snapshot.0.as_ref().is_ok_and(|snapshot| snapshot.spec.vm_name == vm))
    };
    let in_place = |other: &VMRestore| other.spec.target.new_vm.is_none() && !other.spec.dry_run;
    if !in_place(restore) {
        return None;
    }
    let restores = ctx.caches.restores.state();
    let others = restores.iter().filter_map(|other| other.0.as_ref().ok()); // One that can't be read was logged.
    others
        .filter(|other| other.namespace() == restore.namespace() && other.uid() != restore.uid())
        .filter(|other| in_place(other) && !is_settled(other) && of_vm(other) && age(other) < age(restore))
        .max_by_key(|other| age(other))
        .map(kube::ResourceExt::name_any)
}
