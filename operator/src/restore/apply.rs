//! Carries a plan out. The only step that writes.

use freezeframe_api::conditions::{find, types};
use freezeframe_api::v1alpha1::{
    RestorePhase, RestoreStep, SnapshotContentRef, VMRestore, VMRestoreContent, VMRestoreStatus, VMSnapshot,
};
use freezeframe_api::{CONTENT_FINALIZER, OPERATOR_MANAGER, RESTORE_FINALIZER, RESTORED_BY_ANNOTATION};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::events::{Event, EventType};
use kube::{Api, Resource as _, ResourceExt as _};
use serde_json::json;
use tracing::info;

use super::plan::Action;
use crate::context::Context;
use crate::error::{Error, bounded, unless_gone};
use crate::events;

/// Does what was planned, in order. Each write may be repeated: a reconcile that broke off begins from the top.
pub async fn apply(restore: &VMRestore, actions: Vec<Action>, ctx: &Context) -> Result<(), Error> {
    let mut writer = Writer { version: restore.resource_version(), restore, ctx };
    for action in actions {
        match action {
            Action::AddFinalizer => writer.add_finalizer().await?,
            Action::MarkSnapshot(snapshot) => writer.mark(&snapshot).await?,
            Action::CreateContent(content) => writer.create_content(&content).await?,
            Action::CreateSnapshot(snapshot) => writer.create_snapshot(&snapshot).await?,
            Action::SetStep { content, step, before } => writer.set_step(&content, step, before).await?,
            Action::WriteStatus(status) => writer.write_status(&status).await?,
            Action::DeleteContent(content) => writer.delete_content(&content).await?,
            Action::LetContentGo(content) => writer.let_content_go(&content).await?,
            Action::RemoveFinalizer => writer.remove_finalizer().await?,
        }
    }
    Ok(())
}

struct Writer<'a> {
    restore: &'a VMRestore,
    ctx: &'a Context,
    /// The version of the restore that the plan is about, or that our own last write made of it.
    version: Option<String>,
}

impl Writer<'_> {
    async fn add_finalizer(&mut self) -> Result<(), Error> {
        let mut finalizers = self.restore.finalizers().to_vec();
        finalizers.push(RESTORE_FINALIZER.to_owned());
        self.replace_finalizers("adding the restore's finalizer", finalizers).await.map(drop)
    }

    async fn remove_finalizer(&mut self) -> Result<(), Error> {
        let mut finalizers = self.restore.finalizers().to_vec();
        finalizers.retain(|finalizer| finalizer != RESTORE_FINALIZER);
        unless_gone(self.replace_finalizers("removing the restore's finalizer", finalizers).await).map(drop)
    }

    async fn replace_finalizers(&mut self, doing: &'static str, finalizers: Vec<String>) -> Result<VMRestore, Error> {
        let metadata = json!({
            "uid": self.restore.metadata.uid,
            "resourceVersion": self.version,
            "finalizers": finalizers,
        });
        let patch = Patch::Merge(json!({"metadata": metadata}));
        let written = bounded(doing, self.restores().patch(&self.restore.name_any(), &by_operator(), &patch)).await?;
        if !written.finalizers().is_empty() || written.metadata.deletion_timestamp.is_none() {
            self.remember(&written);
        }
        Ok(written)
    }

    async fn mark(&self, snapshot: &VMSnapshot) -> Result<(), Error> {
        let patch = Patch::Merge(json!({"metadata": {
            "uid": snapshot.metadata.uid,
            "resourceVersion": snapshot.metadata.resource_version,
            "annotations": {RESTORED_BY_ANNOTATION: self.restore.metadata.uid},
        }}));
        let api = Api::<VMSnapshot>::namespaced(self.ctx.client.clone(), &self.namespace());
        let (name, params) = (snapshot.name_any(), by_operator());
        bounded("marking the snapshot that is restored", api.patch_metadata(&name, &params, &patch)).await.map(drop)
    }

    async fn create_content(&self, content: &VMRestoreContent) -> Result<(), Error> {
        let (api, name, params) = (self.contents(), content.name_any(), by_operator().force());
        bounded("creating the restore's content", api.patch(&name, &params, &Patch::Apply(content))).await?;
        info!(content = name, node = %content.spec.node_name, step = ?content.spec.step, "gave the work order");
        Ok(())
    }

    /// One that is there already was made by an earlier try: its name has the restore's UID.
    async fn create_snapshot(&self, snapshot: &VMSnapshot) -> Result<(), Error> {
        let api = Api::<VMSnapshot>::namespaced(self.ctx.client.clone(), &self.namespace());
        let created = bounded("keeping the VM's state", api.create(&PostParams::default(), snapshot)).await;
        match created {
            Err(Error::Api { source: kube::Error::Api(status), .. }) if status.reason == "AlreadyExists" => Ok(()),
            other => other.map(|snapshot| info!(snapshot = snapshot.name_any(), "keeps what is to be replaced")),
        }
    }

    async fn set_step(
        &self,
        content: &VMRestoreContent,
        step: RestoreStep,
        before: Option<SnapshotContentRef>,
    ) -> Result<(), Error> {
        let mut spec = json!({"step": step});
        if let Some(before) = before {
            spec["preRestoreContent"] = json!(before);
        }
        let patch = Patch::Merge(json!({
            "metadata": {"uid": content.metadata.uid, "resourceVersion": content.metadata.resource_version},
            "spec": spec,
        }));
        let (api, params) = (self.contents(), by_operator());
        bounded("letting the restore's node go on", api.patch(&content.name_any(), &params, &patch)).await?;
        info!(content = content.name_any(), ?step, "the node may go on");
        Ok(())
    }

    async fn write_status(&mut self, status: &VMRestoreStatus) -> Result<(), Error> {
        let patch = Patch::Apply(json!({
            "apiVersion": VMRestore::api_version(&()),
            "kind": VMRestore::kind(&()),
            "metadata": {"name": self.restore.name_any(), "resourceVersion": self.version},
            "status": status,
        }));
        let (api, name, params) = (self.restores(), self.restore.name_any(), by_operator().force());
        let result = bounded("writing the restore's status", api.patch_status(&name, &params, &patch)).await;
        let Some(written) = unless_gone(result)? else { return Ok(()) };
        self.remember(&written);
        info!(phase = ?status.phase, says = status.message, "wrote the status");
        if let Some(event) = event(self.restore, status) {
            events::publish(self.ctx, event, &self.restore.object_ref(&())).await;
        }
        Ok(())
    }

    async fn delete_content(&self, content: &VMRestoreContent) -> Result<(), Error> {
        let preconditions = Preconditions { uid: content.uid(), resource_version: None };
        let params = DeleteParams::default().preconditions(preconditions);
        let (api, name) = (self.contents(), content.name_any());
        unless_gone(bounded("deleting the restore's content", api.delete(&name, &params)).await).map(drop)
    }

    async fn let_content_go(&self, content: &VMRestoreContent) -> Result<(), Error> {
        let mut finalizers = content.finalizers().to_vec();
        finalizers.retain(|finalizer| finalizer != CONTENT_FINALIZER);
        let metadata = json!({
            "uid": content.metadata.uid,
            "resourceVersion": content.metadata.resource_version,
            "finalizers": finalizers,
        });
        let (api, name, patch) = (self.contents(), content.name_any(), Patch::Merge(json!({"metadata": metadata})));
        let result =
            bounded("letting the restore's content go", api.patch_metadata(&name, &by_operator(), &patch)).await;
        unless_gone(result).map(drop)
    }

    fn remember(&mut self, written: &VMRestore) {
        self.version = written.resource_version();
        self.ctx.written.remember(written);
    }

    fn namespace(&self) -> String {
        self.restore.namespace().unwrap_or_default()
    }

    fn restores(&self) -> Api<VMRestore> {
        Api::namespaced(self.ctx.client.clone(), &self.namespace())
    }

    fn contents(&self) -> Api<VMRestoreContent> {
        Api::all(self.ctx.client.clone())
    }
}

/// The event that the change of a restore's status deserves, if any.
fn event(restore: &VMRestore, new: &VMRestoreStatus) -> Option<Event> {
    let (type_, reason) = match new.phase {
        phase if restore.status.as_ref().is_some_and(|old| old.phase == phase) => return None,
        RestorePhase::Succeeded => (EventType::Normal, "Restored".to_owned()),
        RestorePhase::Failed => (EventType::Warning, find(&new.conditions, types::READY)?.reason.clone()),
        _ => return None,
    };
    Some(Event { type_, action: "Restore".to_owned(), reason, note: new.message.clone(), secondary: None })
}

fn by_operator() -> PatchParams {
    PatchParams::apply(OPERATOR_MANAGER)
}
