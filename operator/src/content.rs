//! The controller of [`VMSnapshotContent`]'s end: lets a content go when its node is done with it, and deletes one whose
//! snapshot is gone and left nothing to be kept. Everything else about a content is decided by its snapshot's controller.

use std::sync::Arc;
use std::time::Duration;

use freezeframe_api::conditions::{find, is_true, reasons, types};
use freezeframe_api::v1alpha1::{ContentPhase, DeletionPolicy, VMSnapshot, VMSnapshotContent};
use freezeframe_api::{CONTENT_FINALIZER, OPERATOR_MANAGER};
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::runtime::controller::Action;
use kube::runtime::reflector::ObjectRef;
use kube::{Api, Resource as _, ResourceExt as _};
use serde_json::json;
use tracing::info;

use crate::caches::Guarded;
use crate::context::Context;
use crate::error::{Error, bounded, unless_gone};
use crate::{events, retention};

/// The controller's name in logs and metrics.
pub const CONTROLLER: &str = "content";

/// How soon to look again when nothing is due.
const RESYNC: Duration = Duration::from_secs(10 * 60);

/// What to do about a content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Keep,
    Mark,
    Delete,
    LetGo,
}

/// Brings one content a step further.
pub async fn reconcile(content: Arc<Guarded<VMSnapshotContent>>, ctx: Arc<Context>) -> Result<Action, Error> {
    let content = content.0.as_ref().map_err(|error| Error::unreadable("VMSnapshotContent", error))?;
    ctx.caches.filled().await;
    let step = if content.metadata.deletion_timestamp.is_some() {
        deleted(content)
    } else {
        match orphaned(content) {
            Step::Keep => Step::Keep,
            step if is_orphaned(content, &ctx).await? => step,
            _ => Step::Keep,
        }
    };
    match step {
        Step::Keep => {}
        Step::Mark => retention::mark(&ctx, content).await?,
        Step::Delete => delete(content, &ctx).await?,
        Step::LetGo => let_go(content, &ctx).await?,
    }
    Ok(Action::requeue(RESYNC))
}

fn deleted(content: &VMSnapshotContent) -> Step {
    let ours = content.finalizers().iter().any(|finalizer| finalizer == CONTENT_FINALIZER);
    let removed = content.status.as_ref().is_some_and(|status| is_true(&status.conditions, types::REMOVED));
    if ours && removed { Step::LetGo } else { Step::Keep }
}

/// What to do if the snapshot is gone. A content that was left on purpose is an administrator's to delete, whatever
/// policy he gives it; so is one with policy `Retain` whose snapshot was removed by force. Of one that never was complete
/// nothing is kept.
fn orphaned(content: &VMSnapshotContent) -> Step {
    match content.spec.deletion_policy {
        _ if never_was_complete(content) => Step::Delete,
        _ if retention::is_marked(content) => Step::Keep,
        DeletionPolicy::Retain => Step::Mark,
        DeletionPolicy::Delete => Step::Delete,
    }
}

/// Whether it failed on the way. One that lost a disk later may have others that are good.
fn never_was_complete(content: &VMSnapshotContent) -> bool {
    let Some(status) = &content.status else { return false };
    let ready = find(&status.conditions, types::READY).map(|ready| ready.reason.as_str());
    let was_complete = matches!(ready, Some(reasons::SNAPSHOT_OVERFLOWED | reasons::SNAPSHOT_OVERWRITTEN));
    status.phase == Some(ContentPhase::Failed) && !was_complete
}

/// Whether the snapshot is gone. Unless it was left on purpose, a snapshot's finalizer holds it until its content is gone,
/// so it takes force to get here; and data is at stake, so the cache alone isn't believed.
async fn is_orphaned(content: &VMSnapshotContent, ctx: &Context) -> Result<bool, Error> {
    let wanted = &content.spec.vm_snapshot_ref;
    let cached = ctx.caches.snapshots.get(&ObjectRef::new(&wanted.name).within(&wanted.namespace));
    if cached.is_some_and(|snapshot| snapshot.uid().as_ref() == Some(&wanted.uid)) {
        return Ok(false);
    }
    let api = Api::<VMSnapshot>::namespaced(ctx.client.clone(), &wanted.namespace);
    let found = unless_gone(bounded("looking for the content's snapshot", api.get_metadata(&wanted.name)).await)?;
    Ok(found.is_none_or(|snapshot| snapshot.uid().as_ref() != Some(&wanted.uid)))
}

/// The version that was judged, and no other: its policy may have become `Retain` a moment ago.
async fn delete(content: &VMSnapshotContent, ctx: &Context) -> Result<(), Error> {
    let preconditions = Preconditions { uid: content.uid(), resource_version: content.resource_version() };
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
    if left_alone(content) {
        // The record of what was kept ends here, so it is told once more.
        events::publish(ctx, retention::event(content), &content.object_ref(&())).await;
    }
    let (api, name) = (contents(ctx), content.name_any());
    let (params, patch) = (PatchParams::apply(OPERATOR_MANAGER), Patch::Merge(json!({"metadata": metadata})));
    unless_gone(bounded("removing the content's finalizer", api.patch_metadata(&name, &params, &patch)).await)?;
    info!(content = name, "the content may go");
    Ok(())
}

fn left_alone(content: &VMSnapshotContent) -> bool {
    let removed = content.status.as_ref().and_then(|status| find(&status.conditions, types::REMOVED));
    removed.is_some_and(|condition| condition.reason == reasons::RETAINED)
}

fn contents(ctx: &Context) -> Api<VMSnapshotContent> {
    Api::all(ctx.client.clone())
}
