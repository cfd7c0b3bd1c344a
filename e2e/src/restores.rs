//! Restores as a user makes them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use freezeframe_api::v1alpha1::{RestorePhase, VMRestore, VMSnapshot};
use kube::api::{DeleteParams, PostParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

use crate::disk::Disk;
use crate::{Format, World, await_object};

/// Stopping a VM, a snapshot of it, and copies of small disks on a busy machine.
const ENDED: Duration = Duration::from_secs(120);

impl World {
    /// The restores of the guest's namespace.
    #[must_use]
    pub fn restores(&self) -> Api<VMRestore> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Applies a restore of a snapshot and doesn't wait.
    pub async fn apply_restore(&self, name: &str, snapshot: &VMSnapshot, mut spec: Value) -> Result<VMRestore> {
        spec["snapshotName"] = snapshot.name_any().into();
        let object = serde_json::from_value(json!({
            "apiVersion": "freezeframe.dev/v1alpha1", "kind": "VMRestore",
            "metadata": {"name": name}, "spec": spec,
        }))?;
        let created = self.restores().create(&PostParams::default(), &object).await;
        created.with_context(|| format!("creating {name}"))
    }

    /// Waits until a restore has come to an end of any kind.
    pub async fn await_restore(&self, name: &str) -> Result<VMRestore> {
        let ended = |restore: &VMRestore| {
            use RestorePhase::{Failed, Planned, Succeeded};
            restore_phase(restore).is_some_and(|phase| matches!(phase, Planned | Succeeded | Failed))
        };
        let found = await_object(&self.restores(), name, "the restore to end", ENDED, ended).await;
        found.map_err(|error| self.with_logs(error))
    }

    /// Restores a snapshot in place, whether its VM runs or not; it must succeed.
    pub async fn restore_in_place(&self, name: &str, snapshot: &VMSnapshot) -> Result<VMRestore> {
        let spec = json!({"confirm": snapshot.uid(), "stopVM": true, "stopTimeout": "1s"});
        self.apply_restore(name, snapshot, spec).await?;
        self.await_success(name).await
    }

    /// Waits for a restore, which must succeed.
    pub async fn await_success(&self, name: &str) -> Result<VMRestore> {
        let ended = self.await_restore(name).await?;
        let succeeded = restore_phase(&ended) == Some(RestorePhase::Succeeded);
        ensure!(succeeded, "{}", self.with_logs(anyhow::anyhow!("{name} did not succeed: {:#?}", ended.status)));
        Ok(ended)
    }

    /// Deletes a restore and doesn't wait.
    pub async fn delete_restore(&self, name: &str) -> Result<()> {
        let deleted = self.restores().delete(name, &DeleteParams::default()).await;
        deleted.map(drop).with_context(|| format!("deleting {name}"))
    }
}

/// Its phase, once it has one.
#[must_use]
pub fn restore_phase(restore: &VMRestore) -> Option<RestorePhase> {
    restore.status.as_ref().map(|status| status.phase)
}

/// The images that a restore made or replaced, in the order of its disks.
#[must_use]
pub fn restored_images(restore: &VMRestore) -> Vec<Disk> {
    let disks = restore.status.iter().flat_map(|status| &status.disks);
    let format = |name: &str| if name == "raw" { Format::Raw } else { Format::Qcow2 };
    disks.map(|disk| Disk::existing(&disk.path.0, format(&disk.format))).collect()
}
