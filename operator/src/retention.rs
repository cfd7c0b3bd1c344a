//! What is told of data that stays after its snapshot's deletion.

use freezeframe_api::conditions::reasons;
use freezeframe_api::v1alpha1::{DeletionPolicy, DiskSnapshotState, VMSnapshotContent};
use freezeframe_api::{OPERATOR_MANAGER, SNAPSHOT_DELETED_LABEL};
use kube::api::{Patch, PatchParams};
use kube::runtime::events::{Event, EventType};
use kube::{Api, ResourceExt as _};
use serde_json::json;
use tracing::info;

use crate::context::Context;
use crate::error::{Error, bounded};

/// Whether the content is said to have outlived its snapshot.
pub fn is_marked(content: &VMSnapshotContent) -> bool {
    content.labels().get(SNAPSHOT_DELETED_LABEL).is_some_and(|value| value == "true")
}

/// Has the content say that it has outlived its snapshot, with policy `Retain`, unless it says so already.
pub async fn mark(ctx: &Context, content: &VMSnapshotContent) -> Result<(), Error> {
    if is_marked(content) && content.spec.deletion_policy == DeletionPolicy::Retain {
        return Ok(());
    }
    let patch = Patch::Merge(json!({
        "metadata": {
            "uid": content.metadata.uid,
            "resourceVersion": content.metadata.resource_version,
            "labels": {SNAPSHOT_DELETED_LABEL: "true"},
        },
        "spec": {"deletionPolicy": DeletionPolicy::Retain},
    }));
    let (api, params) = (Api::<VMSnapshotContent>::all(ctx.client.clone()), PatchParams::apply(OPERATOR_MANAGER));
    bounded("marking a content that stays", api.patch(&content.name_any(), &params, &patch)).await?;
    info!(content = content.name_any(), "the content stays without its snapshot");
    Ok(())
}

/// The event that says where the data is.
pub fn event(content: &VMSnapshotContent) -> Event {
    let disks = content.status.iter().flat_map(|status| &status.disks);
    let kept: Vec<_> = disks
        .filter(|disk| disk.state != DiskSnapshotState::Removed)
        .filter_map(|disk| disk.handle.as_ref().map(|handle| format!("{}: {handle}", disk.name)))
        .collect();
    let note = format!("{} keeps on node {}: {}", content.name_any(), content.spec.node_name, kept.join(", "));
    Event {
        type_: EventType::Normal,
        action: "Delete".to_owned(),
        reason: reasons::RETAINED.to_owned(),
        note: Some(note),
        secondary: None,
    }
}
