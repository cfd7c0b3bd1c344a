//! Carries a plan out. The only step that writes.

use freezeframe_api::v1alpha1::{DeletionPolicy, VMSnapshot, VMSnapshotContent, VMSnapshotStatus};
use freezeframe_api::{OPERATOR_MANAGER, SNAPSHOT_FINALIZER};
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Resource as _, ResourceExt as _};
use serde_json::{Value, json};
use tracing::info;

use super::plan::{Action, Seen};
use crate::context::Context;
use crate::error::{Error, bounded, unless_gone};
use crate::{events, retention};

/// Does what was planned, in order. Each write may be repeated: a reconcile that broke off begins from the top.
pub async fn apply(snapshot: &VMSnapshot, actions: Vec<Action>, ctx: &Context) -> Result<(), Error> {
    let mut writer = Writer { version: snapshot.resource_version(), snapshot, ctx };
    for action in actions {
        match action {
            Action::AddFinalizer => writer.add_finalizer().await?,
            Action::CreateContent(content) => writer.create_content(&content).await?,
            Action::WriteStatus(status) => writer.write_status(&status).await?,
            Action::SetDeletionPolicy { content, policy } => writer.set_deletion_policy(content, policy).await?,
            Action::DeleteContent(content) => writer.delete_content(content).await?,
            Action::LeaveContent(content) => writer.leave_content(&content).await?,
            Action::RemoveFinalizer => writer.remove_finalizer().await?,
        }
    }
    Ok(())
}

struct Writer<'a> {
    snapshot: &'a VMSnapshot,
    ctx: &'a Context,
    /// The version of the snapshot that the plan is about, or that our own last write made of it.
    version: Option<String>,
}

impl Writer<'_> {
    async fn add_finalizer(&mut self) -> Result<(), Error> {
        let mut finalizers = self.snapshot.finalizers().to_vec();
        finalizers.push(SNAPSHOT_FINALIZER.to_owned());
        self.replace_finalizers("adding the snapshot's finalizer", finalizers).await.map(drop)
    }

    async fn remove_finalizer(&mut self) -> Result<(), Error> {
        let mut finalizers = self.snapshot.finalizers().to_vec();
        finalizers.retain(|finalizer| finalizer != SNAPSHOT_FINALIZER);
        let result = self.replace_finalizers("removing the snapshot's finalizer", finalizers).await;
        if unless_gone(result)?.is_some() {
            info!("the snapshot may go");
        }
        Ok(())
    }

    /// The list is replaced as a whole, so the object must be the very version that it was read from.
    async fn replace_finalizers(&mut self, doing: &'static str, finalizers: Vec<String>) -> Result<VMSnapshot, Error> {
        let metadata = json!({
            "uid": self.snapshot.metadata.uid,
            "resourceVersion": self.version,
            "finalizers": finalizers,
        });
        let patch = Patch::Merge(json!({"metadata": metadata}));
        let written = bounded(doing, self.snapshots().patch(&self.snapshot.name_any(), &by_operator(), &patch)).await?;
        if !written.finalizers().is_empty() || written.metadata.deletion_timestamp.is_none() {
            // Else it is gone, and nobody would ask for it again.
            self.remember(&written);
        }
        Ok(written)
    }

    /// By server-side apply: where the content exists already, as this plan wants it, nothing happens.
    async fn create_content(&self, content: &VMSnapshotContent) -> Result<(), Error> {
        let (api, name, params) = (self.contents(), content.name_any(), by_operator().force());
        bounded("creating the content", api.patch(&name, &params, &Patch::Apply(content))).await?;
        info!(content = name, node = %content.spec.node_name, "gave the work order");
        Ok(())
    }

    async fn write_status(&mut self, status: &VMSnapshotStatus) -> Result<(), Error> {
        let name = self.snapshot.name_any();
        let patch = Patch::Apply(self.status_patch(status));
        let (api, params) = (self.snapshots(), by_operator().force());
        // Forced: nobody else has a say in the status of a snapshot.
        let result = bounded("writing the snapshot's status", api.patch_status(&name, &params, &patch)).await;
        let Some(written) = unless_gone(result)? else { return Ok(()) };
        self.remember(&written);
        self.announce(status).await;
        Ok(())
    }

    /// The version keeps the status of a snapshot off a later one of the same name: of a UID, the server takes no notice
    /// in a write of the status.
    fn status_patch(&self, status: &VMSnapshotStatus) -> Value {
        json!({
            "apiVersion": VMSnapshot::api_version(&()),
            "kind": VMSnapshot::kind(&()),
            "metadata": {"name": self.snapshot.name_any(), "resourceVersion": self.version},
            "status": status,
        })
    }

    fn remember(&mut self, written: &VMSnapshot) {
        self.version = written.resource_version();
        self.ctx.written.remember(written);
    }

    async fn announce(&self, status: &VMSnapshotStatus) {
        info!(phase = ?status.phase, says = status.message, "wrote the status");
        self.ctx.metrics.count_outcome(self.snapshot, status, self.ctx.clock.now());
        if let Some(event) = events::of_change(self.snapshot, status) {
            events::publish(self.ctx, event, &self.snapshot.object_ref(&())).await;
        }
    }

    async fn set_deletion_policy(&self, content: Seen, policy: DeletionPolicy) -> Result<(), Error> {
        let patch = Patch::Merge(json!({
            "metadata": {"uid": content.uid, "resourceVersion": content.version},
            "spec": {"deletionPolicy": policy},
        }));
        let (api, params) = (self.contents(), by_operator());
        bounded("carrying the deletion policy to the content", api.patch(&content.name, &params, &patch))
            .await
            .map(drop)
    }

    async fn delete_content(&self, content: Seen) -> Result<(), Error> {
        let preconditions = Preconditions { uid: content.uid, resource_version: None };
        let params = DeleteParams::default().preconditions(preconditions);
        unless_gone(bounded("deleting the content", self.contents().delete(&content.name, &params)).await)?;
        info!(content = content.name, "asked the node to undo its work");
        Ok(())
    }

    /// Before the snapshot is let go: from then on it is the content's own word that it isn't an orphan to be deleted.
    async fn leave_content(&self, content: &VMSnapshotContent) -> Result<(), Error> {
        retention::mark(self.ctx, content).await?;
        events::publish(self.ctx, retention::event(content), &self.snapshot.object_ref(&())).await;
        Ok(())
    }

    fn snapshots(&self) -> Api<VMSnapshot> {
        Api::namespaced(self.ctx.client.clone(), &self.snapshot.namespace().unwrap_or_default())
    }

    fn contents(&self) -> Api<VMSnapshotContent> {
        Api::all(self.ctx.client.clone())
    }
}

fn by_operator() -> PatchParams {
    PatchParams::apply(OPERATOR_MANAGER)
}
