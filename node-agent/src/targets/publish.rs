//! Writing `VMTarget`s: one object a VM, ours by field manager and by the node in its status.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use freezeframe_api::AGENT_MANAGER;
use freezeframe_api::names::NodeName;
use freezeframe_api::v1alpha1::{VMTarget, VMTargetStatus};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, Preconditions};
use kube::{Api, Client, Resource, ResourceExt};
use serde_json::json;

use crate::causes::chain;
use crate::hypervisor::VmKey;
use crate::report::{ReportError, call};

/// Writes this node's targets.
pub struct Publisher {
    client: Client,
    node: NodeName,
    /// Labels as each target has them from us; none for one whose labels aren't known to be ours.
    labels: Mutex<HashMap<VmKey, BTreeMap<String, String>>>,
}

impl Publisher {
    /// A publisher for one node.
    pub fn new(client: Client, node: String) -> Self {
        Self { client, node: NodeName(node), labels: Mutex::default() }
    }

    /// Writes a VM's target; false if it must be tried again.
    pub async fn publish(&self, vm: &VmKey, status: &VMTargetStatus) -> bool {
        logged(vm, &self.try_publish(vm, status).await)
    }

    async fn try_publish(&self, vm: &VmKey, status: &VMTargetStatus) -> Result<(), ReportError> {
        let targets: Api<VMTarget> = Api::namespaced(self.client.clone(), &vm.namespace);
        let parameters = PatchParams::apply(AGENT_MANAGER).force();
        let mut object = json!({
            "apiVersion": VMTarget::api_version(&()),
            "kind": VMTarget::kind(&()),
            "metadata": {"name": vm.name, "namespace": vm.namespace},
        });
        let what = format!("VMTarget {vm}");
        object["status"] = json!(status);
        let written = call(&what, targets.patch_status(&vm.name, &parameters, &Patch::Apply(&object))).await;
        match written {
            Err(ReportError::Api { source: kube::Error::Api(answer), .. }) if answer.is_not_found() => {}
            other => return other.map(drop),
        }
        object["spec"] = json!({});
        self.labels().insert(vm.clone(), BTreeMap::new());
        call(&what, targets.patch(&vm.name, &parameters, &Patch::Apply(&object))).await?;
        call(&what, targets.patch_status(&vm.name, &parameters, &Patch::Apply(&object))).await.map(drop)
    }

    /// Gives a VM's target the labels that its owner wants, and takes back those of ours that are not wanted any more.
    pub async fn label(&self, vm: &VmKey, labels: BTreeMap<String, String>) {
        if self.labels().get(vm) != Some(&labels) && logged(vm, &self.try_label(vm, &labels).await) {
            self.labels().insert(vm.clone(), labels);
        }
    }

    async fn try_label(&self, vm: &VmKey, labels: &BTreeMap<String, String>) -> Result<(), ReportError> {
        let targets: Api<VMTarget> = Api::namespaced(self.client.clone(), &vm.namespace);
        let object = json!({
            "apiVersion": VMTarget::api_version(&()),
            "kind": VMTarget::kind(&()),
            "metadata": {"name": vm.name, "namespace": vm.namespace, "labels": labels},
            "spec": {},
        });
        let parameters = PatchParams::apply(AGENT_MANAGER).force();
        call(&format!("labels of VMTarget {vm}"), targets.patch(&vm.name, &parameters, &Patch::Apply(&object)))
            .await
            .map(drop)
    }

    fn labels(&self) -> MutexGuard<'_, HashMap<VmKey, BTreeMap<String, String>>> {
        self.labels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What an event of a VM's target is about; none if the target can't be read.
    pub async fn reference(&self, vm: &VmKey) -> Option<ObjectReference> {
        let targets: Api<VMTarget> = Api::namespaced(self.client.clone(), &vm.namespace);
        let found = call(&format!("VMTarget {vm}"), targets.get_opt(&vm.name)).await;
        found.ok().flatten().map(|target| target.object_ref(&()))
    }

    /// Deletes a VM's target; false if it must be tried again.
    pub async fn withdraw(&self, vm: &VmKey) -> bool {
        logged(vm, &self.try_withdraw(vm).await)
    }

    async fn try_withdraw(&self, vm: &VmKey) -> Result<(), ReportError> {
        let targets: Api<VMTarget> = Api::namespaced(self.client.clone(), &vm.namespace);
        let what = format!("VMTarget {vm}");
        let Some(target) = call(&what, targets.get_opt(&vm.name)).await? else { return Ok(()) };
        // The VM may have moved: then the target is another node's by now.
        if target.status.as_ref().is_none_or(|status| status.node_name != self.node) {
            return Ok(());
        }
        let this = Preconditions { uid: target.uid(), resource_version: target.resource_version() };
        let parameters = DeleteParams { preconditions: Some(this), ..DeleteParams::default() };
        call(&what, targets.delete(&vm.name, &parameters)).await.map(drop)
    }

    /// This node's targets as the API has them; none if it can't be asked.
    pub async fn published(&self) -> Option<HashMap<VmKey, VMTargetStatus>> {
        let targets: Api<VMTarget> = Api::all(self.client.clone());
        let listed = match call("the list of VMTargets", targets.list(&ListParams::default())).await {
            Ok(listed) => listed,
            Err(error) => {
                tracing::warn!(error = chain(&error), "the VMTargets can't be listed");
                return None;
            }
        };
        let ours = listed.items.into_iter().filter_map(|target| {
            let vm = VmKey { namespace: target.namespace().unwrap_or_default(), name: target.name_any() };
            let bare = target.labels().is_empty();
            let status = target.status.filter(|status| status.node_name == self.node)?;
            if bare {
                self.labels().insert(vm.clone(), BTreeMap::new());
            }
            Some((vm, status))
        });
        Some(ours.collect())
    }
}

fn logged(vm: &VmKey, written: &Result<(), ReportError>) -> bool {
    if let Err(error) = written {
        tracing::warn!(%vm, error = chain(error), "the VM's target can't be published");
    }
    written.is_ok()
}
