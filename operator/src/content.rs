//! The controller of [`VMSnapshotContent`]'s end: lets a content go when its node is done with it, and deletes one whose
//! snapshot is gone. Everything else about a content is decided by its snapshot's controller.

use std::sync::Arc;
use std::time::Duration;

use freezeframe_api::conditions::{is_true, types};
use freezeframe_api::v1alpha1::{DeletionPolicy, VMSnapshot, VMSnapshotContent};
use freezeframe_api::{CONTENT_FINALIZER, OPERATOR_MANAGER};
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::runtime::controller::Action;
use kube::runtime::events::{Event, EventType};
use kube::runtime::reflector::ObjectRef;
use kube::{Api, Resource as _, ResourceExt as _};
use serde_json::json;
use tracing::info;

use crate::caches::Guarded;
use crate::context::Context;
use crate::error::{Error, bounded, unless_gone};
use crate::events;

/// The controller's name in logs and metrics.
pub const CONTROLLER: &str = "content";

/// How soon to look again when nothing is due.
const RESYNC: Duration = Duration::from_secs(10 * 60);

/// What to do about a content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Keep,
    Delete,
    LetGo,
}

/// Brings one content a step further.
pub async fn reconcile(content: Arc<Guarded<VMSnapshotContent>>, ctx: Arc<Context>) -> Result<Action, Error> {
    let content = content.0.as_ref().map_err(|error| Error::unreadable("VMSnapshotContent", error))?;
    ctx.caches.filled().await;
    let orphaned = content.metadata.deletion_timestamp.is_none() && is_orphaned(content, &ctx).await?;
    match plan(content, orphaned) {
        Step::Keep => {}
        Step::Delete => delete(content, &ctx).await?,
        Step::LetGo => let_go(content, &ctx).await?,
    }
    Ok(Action::requeue(RESYNC))
}

fn plan(content: &VMSnapshotContent, orphaned: bool) -> Step {
    let deleted = content.metadata.deletion_timestamp.is_some();
    let ours = content.finalizers().iter().any(|finalizer| finalizer == CONTENT_FINALIZER);
    let removed = content.status.as_ref().is_some_and(|status| is_true(&status.conditions, types::REMOVED));
    match (deleted, ours && removed) {
        (false, _) if orphaned => Step::Delete,
        (true, true) => Step::LetGo,
        _ => Step::Keep,
    }
}

/// Whether the snapshot is gone. A snapshot's finalizer holds it until its content is gone, so it takes force to get
/// here; and data is at stake, so the cache alone isn't believed.
async fn is_orphaned(content: &VMSnapshotContent, ctx: &Context) -> Result<bool, Error> {
    let wanted = &content.spec.vm_snapshot_ref;
    let cached = ctx.caches.snapshots.get(&ObjectRef::new(&wanted.name).within(&wanted.namespace));
    if cached.is_some_and(|snapshot| snapshot.uid().as_ref() == Some(&wanted.uid)) {
        return Ok(false);
    }
    let api = Api::<VMSnapshot>::namespaced(ctx.client.clone(), &wanted.namespace);
    let found = bounded("looking for the content's snapshot", api.get_metadata_opt(&wanted.name)).await?;
    Ok(found.is_none_or(|snapshot| snapshot.uid().as_ref() != Some(&wanted.uid)))
}

async fn delete(content: &VMSnapshotContent, ctx: &Context) -> Result<(), Error> {
    let preconditions = Preconditions { uid: content.uid(), resource_version: None };
    let params = DeleteParams::default().preconditions(preconditions);
    let call = contents(ctx);
    unless_gone(bounded("deleting an orphaned content", call.delete(&content.name_any(), &params)).await)?;
    info!(content = content.name_any(), "deleted a content whose snapshot is gone");
    Ok(())
}

async fn let_go(content: &VMSnapshotContent, ctx: &Context) -> Result<(), Error> {
    let mut finalizers = content.finalizers().to_vec();
    finalizers.retain(|finalizer| finalizer != CONTENT_FINALIZER);
    let metadata = json!({
        "uid": content.metadata.uid,
        "resourceVersion": content.metadata.resource_version,
        "finalizers": finalizers,
    });
    if content.spec.deletion_policy == DeletionPolicy::Retain {
        // The record of what was kept ends here, so it is told once more.
        events::publish(ctx, &retained(content), &content.object_ref(&())).await;
    }
    let (api, name) = (contents(ctx), content.name_any());
    let (params, patch) = (PatchParams::apply(OPERATOR_MANAGER), Patch::Merge(json!({"metadata": metadata})));
    unless_gone(bounded("removing the content's finalizer", api.patch_metadata(&name, &params, &patch)).await)?;
    info!(content = name, "the content may go");
    Ok(())
}

fn retained(content: &VMSnapshotContent) -> Event {
    let disks = content.status.iter().flat_map(|status| &status.disks);
    let kept: Vec<_> =
        disks.filter_map(|disk| disk.handle.as_ref().map(|handle| format!("{}: {handle}", disk.name))).collect();
    let note = format!("Kept on node {}: {}", content.spec.node_name, kept.join(", "));
    Event {
        type_: EventType::Normal,
        action: "Delete".to_owned(),
        reason: "Retained".to_owned(),
        note: Some(note.chars().take(NOTE_LENGTH).collect()),
        secondary: None,
    }
}

/// Longest note that the API takes, in bytes; paths may hold characters of up to four.
const NOTE_LENGTH: usize = 1024 / 4;

fn contents(ctx: &Context) -> Api<VMSnapshotContent> {
    Api::all(ctx.client.clone())
}
