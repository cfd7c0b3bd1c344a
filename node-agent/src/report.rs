//! Reporting to the API: only `status`, only of this node's objects, only when something changed.

use std::time::Duration;

use freezeframe_api::AGENT_MANAGER;
use freezeframe_api::v1alpha1::{VMRestoreContentStatus, VMSnapshotContentStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::core::object::HasStatus;
use kube::{Api, Client, ResourceExt};
use serde::Serialize;
use serde_json::json;
use tokio::time::timeout;

use crate::orders::WorkOrder;

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

/// A status that has conditions.
pub trait Conditions: Clone + PartialEq + Serialize {
    /// The conditions.
    fn conditions(&mut self) -> &mut Vec<Condition>;

    /// Forgets all times but the conditions'.
    fn forget_times(&mut self) {}
}

impl Conditions for VMSnapshotContentStatus {
    fn conditions(&mut self) -> &mut Vec<Condition> {
        &mut self.conditions
    }
}

impl Conditions for VMRestoreContentStatus {
    fn conditions(&mut self) -> &mut Vec<Condition> {
        &mut self.conditions
    }

    fn forget_times(&mut self) {
        self.last_report_time = None;
    }
}

/// Writes an object's status, unless it says the same already. An object that is gone needs no report.
pub async fn report<K>(client: &Client, object: &K, status: &K::Status) -> Result<(), ReportError>
where
    K: WorkOrder + HasStatus<Status: Conditions>,
{
    let mut status = status.clone();
    if let Some(before) = object.status() {
        if timeless(before) == timeless(&status) {
            return Ok(());
        }
        keep_times(before, &mut status);
    }
    write_status(client, object, &status).await
}

fn timeless<S: Conditions>(status: &S) -> S {
    let mut status = status.clone();
    status.forget_times();
    for condition in status.conditions() {
        condition.last_transition_time.0 = Timestamp::UNIX_EPOCH;
    }
    status
}

/// A condition that didn't change its status is as old as it was.
fn keep_times<S: Conditions>(before: &S, status: &mut S) {
    let before = std::mem::take(before.clone().conditions());
    for condition in status.conditions() {
        let same = before.iter().find(|old| old.type_ == condition.type_ && old.status == condition.status);
        if let Some(old) = same {
            condition.last_transition_time = old.last_transition_time.clone();
        }
    }
}

/// Says that the node is at it, now, and leaves all else that was reported as it is.
pub async fn report_time<K: WorkOrder>(client: &Client, object: &K) -> Result<(), ReportError> {
    let (api, name) = (Api::<K>::all(client.clone()), object.name_any());
    let now = json!(Time(Timestamp::now()));
    let patch = Patch::Merge(json!({"metadata": {"uid": object.uid()}, "status": {"lastReportTime": now}}));
    let params = PatchParams::apply(AGENT_MANAGER);
    call(&format!("status of {name}"), api.patch_status(&name, &params, &patch)).await.map(drop)
}

/// Writes an object's status. An object that is gone needs no report.
pub async fn write_status<K: WorkOrder>(
    client: &Client,
    object: &K,
    status: &impl Serialize,
) -> Result<(), ReportError> {
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
