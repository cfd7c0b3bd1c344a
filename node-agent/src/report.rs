//! Reporting to the API: only `status`, only of this node's objects, only when something changed.

use std::fmt::Debug;
use std::time::Duration;

use freezeframe_api::AGENT_MANAGER;
use freezeframe_api::v1alpha1::{VMSnapshotContent, VMSnapshotContentStatus};
use kube::api::{Patch, PatchParams};
use kube::core::ClusterResourceScope;
use kube::{Api, Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::time::timeout;

/// Bound of one call to the API.
pub const API_TIMEOUT: Duration = Duration::from_secs(15);

/// Why a report didn't get through.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The API refused, or wasn't there.
    #[error("failed to write {what}")]
    Api {
        /// Which object.
        what: String,
        /// The API's answer.
        #[source]
        source: kube::Error,
    },
    /// The API didn't answer.
    #[error("the API didn't answer when writing {0}")]
    Timeout(String),
}

/// Bounds a call to the API and names what it was for.
pub async fn call<T>(what: &str, call: impl Future<Output = kube::Result<T>>) -> Result<T, ReportError> {
    match timeout(API_TIMEOUT, call).await {
        Ok(answer) => answer.map_err(|source| ReportError::Api { what: what.to_owned(), source }),
        Err(_) => Err(ReportError::Timeout(what.to_owned())),
    }
}

/// Writes a content's status, unless it says the same already. A content that is gone needs no report.
pub async fn report(
    client: &Client,
    content: &VMSnapshotContent,
    status: &VMSnapshotContentStatus,
) -> Result<(), ReportError> {
    if content.status.as_ref() == Some(status) {
        return Ok(());
    }
    write_status(client, content, status).await
}

/// Writes an object's status. An object that is gone needs no report.
pub async fn write_status<K>(client: &Client, object: &K, status: &impl Serialize) -> Result<(), ReportError>
where
    K: Resource<DynamicType = (), Scope = ClusterResourceScope> + Clone + Debug + DeserializeOwned,
{
    let name = object.name_any();
    // The UID fences: an object of the same name that isn't the one we worked for refuses the write.
    let patch = json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "metadata": {"name": name, "uid": object.uid()},
        "status": status,
    });
    let api: Api<K> = Api::all(client.clone());
    let parameters = PatchParams::apply(AGENT_MANAGER).force();
    let written = call(&format!("status of {name}"), api.patch_status(&name, &parameters, &Patch::Apply(patch))).await;
    match written {
        Err(ReportError::Api { source: kube::Error::Api(answer), .. }) if answer.is_not_found() => Ok(()),
        other => other.map(drop),
    }
}
