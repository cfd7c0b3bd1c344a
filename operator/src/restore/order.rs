//! What a restore becomes: the work order of a node, and the snapshot that keeps what is replaced. Pure.

use std::collections::BTreeMap;

use freezeframe_api::names::NodeName;
use freezeframe_api::v1alpha1::{
    Consistency, ConsistencyLevel, DiskSelection, Fallback, Quiesce, RestoreDirectory, RestoreRef, RestoreStep,
    SnapshotContentRef, VMRestore, VMRestoreContent, VMRestoreContentSpec, VMRestoreSpec, VMSnapshot,
    VMSnapshotContent, VMSnapshotSpec,
};
use freezeframe_api::{CONTENT_FINALIZER, RESTORE_NAME_LABEL, RESTORE_NAMESPACE_LABEL};
use kube::ResourceExt as _;
use kube::core::ObjectMeta;

use crate::vmsnapshot::label_value;

/// How long the cut of a stopped VM's disks may take to come about.
const SAVING_DEADLINE: std::time::Duration = std::time::Duration::from_secs(15 * 60);

/// Longest part of a restore's name in the name of the snapshot that keeps what it replaces, in characters.
const NAME_PART: usize = 200;

/// The name of the content of the restore with that UID.
pub fn content_name(restore_uid: &str) -> String {
    format!("vmrestore-{restore_uid}")
}

/// The name of the snapshot that keeps what the restore replaces. A later restore of the same name has another.
pub fn before_name(restore: &VMRestore) -> String {
    let name: String = restore.name_any().chars().take(NAME_PART).collect();
    let uid: String = restore.uid().unwrap_or_default().chars().filter(char::is_ascii_alphanumeric).take(8).collect();
    format!("{}-before-{uid}", name.trim_end_matches(['-', '.']))
}

/// The first step of the work order.
pub fn first_step(spec: &VMRestoreSpec) -> RestoreStep {
    match spec {
        VMRestoreSpec { dry_run: true, .. } => RestoreStep::Plan,
        VMRestoreSpec { target, .. } if target.new_vm.is_some() => RestoreStep::Restore,
        _ => RestoreStep::Stop,
    }
}

/// The content that has the node of `source` do what the restore asks; `class` is the directory of its class.
pub fn content(restore: &VMRestore, source: &VMSnapshotContent, class: Option<&str>) -> VMRestoreContent {
    let step = first_step(&restore.spec);
    // No `..`: a new field of a restore doesn't compile until it is carried over, or left out on purpose.
    let VMRestoreSpec { snapshot_name: _, target, confirm: _, stop_vm, stop_timeout, mode, disks, dry_run: _, verify } =
        restore.spec.clone();
    let vm_restore_ref = RestoreRef {
        namespace: restore.namespace().unwrap_or_default(),
        name: restore.name_any(),
        uid: restore.uid().unwrap_or_default(),
    };
    VMRestoreContent {
        metadata: ObjectMeta {
            name: Some(content_name(&vm_restore_ref.uid)),
            labels: Some(labels(restore)),
            finalizers: Some(vec![CONTENT_FINALIZER.to_owned()]),
            ..ObjectMeta::default()
        },
        spec: VMRestoreContentSpec {
            node_name: NodeName(source.spec.node_name.to_string()),
            vm_restore_ref,
            source: reference(source),
            vm_name: source.spec.vm_name.clone(),
            new_vm: target.new_vm,
            directory: class.filter(|_| target.directory == Some(RestoreDirectory::Class)).map(str::to_owned),
            step,
            pre_restore_content: None,
            mode,
            disks,
            stop_vm,
            stop_timeout,
            verify,
        },
        status: None,
    }
}

/// A content as another names it.
pub fn reference(content: &VMSnapshotContent) -> SnapshotContentRef {
    SnapshotContentRef { name: content.name_any(), uid: content.uid().unwrap_or_default() }
}

/// The snapshot of the stopped VM that keeps the disks which the restore replaces. It goes by the class of the snapshot
/// that is restored, and is the user's to delete.
pub fn before(restore: &VMRestore, source: &VMSnapshot, content: &VMRestoreContent) -> VMSnapshot {
    let planned = content.status.iter().flat_map(|status| &status.disks);
    VMSnapshot {
        metadata: ObjectMeta {
            name: Some(before_name(restore)),
            namespace: restore.namespace(),
            labels: Some(labels(restore)),
            ..ObjectMeta::default()
        },
        spec: VMSnapshotSpec {
            vm_name: source.spec.vm_name.clone(),
            class_name: source.spec.class_name.clone(),
            consistency: Consistency { required: ConsistencyLevel::Crash, fallback: Fallback::Fail },
            quiesce: Quiesce::default(),
            disks: DiskSelection {
                include: planned.map(|disk| disk.name.clone()).collect(),
                exclude: vec![],
                targets: vec![],
            },
            failure_deadline: SAVING_DEADLINE.into(),
            deletion_policy: None,
            hold: false,
        },
        status: None,
    }
}

fn labels(restore: &VMRestore) -> BTreeMap<String, String> {
    BTreeMap::from([
        (RESTORE_NAMESPACE_LABEL.to_owned(), restore.namespace().unwrap_or_default()),
        (RESTORE_NAME_LABEL.to_owned(), label_value(&restore.name_any())),
    ])
}
