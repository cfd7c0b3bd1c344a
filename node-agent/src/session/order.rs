//! A work order, as the session wants it: a content's spec, checked and in plain types.

use std::collections::BTreeMap;
use std::time::Duration;

use freezeframe_api::v1alpha1::{
    ClassDriver, ConsistencyLevel, DeletionPolicy, DiskTarget, Fallback, Limits, Pause, VMSnapshotContent, Verify,
};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use serde::{Deserialize, Serialize};

use crate::hypervisor::VmKey;

/// One snapshot to be taken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Order {
    /// Name of the content.
    pub content: String,
    /// UID of the content.
    pub uid: String,
    /// Namespace and name of the VMSnapshot.
    pub snapshot: (String, String),
    /// The VM.
    pub vm: VmKey,
    /// The class's drivers.
    pub drivers: Vec<ClassDriver>,
    /// The level that must be proved.
    pub required: ConsistencyLevel,
    /// What to do if it can't.
    pub fallback: Fallback,
    /// How long the guest agent may take to answer before the freeze.
    #[serde(default)]
    pub agent_timeout: Duration,
    /// How long the guest may take to freeze.
    pub freeze_timeout: Duration,
    /// How long the guest may be held.
    pub max_hold: Duration,
    /// Mount points to freeze; all when empty.
    pub mountpoints: Vec<String>,
    /// When the virtual CPUs are paused.
    pub pause: Pause,
    /// Only these disks, unless empty.
    pub include: Vec<String>,
    /// Not these disks.
    pub exclude: Vec<String>,
    /// The files that these disks go to.
    #[serde(default)]
    pub targets: BTreeMap<String, String>,
    /// How thoroughly the data is checked.
    #[serde(default)]
    pub verify: Verify,
    /// What the snapshot may cost after the cut.
    #[serde(default)]
    pub limits: Limits,
    /// No cut after this.
    pub deadline: Timestamp,
    /// What becomes of the data in the end.
    pub deletion_policy: DeletionPolicy,
    /// Generation of the content that was read.
    pub generation: Option<i64>,
}

/// A disk and where its data goes: the name of a file, or, with a slash in it, of a volume.
fn target(to: &DiskTarget) -> Option<(String, String)> {
    Some((to.disk.0.clone(), to.file.clone().or_else(|| to.volume.clone())?))
}

impl Order {
    /// Reads a content.
    #[must_use]
    pub fn new(content: &VMSnapshotContent) -> Self {
        let spec = &content.spec;
        let names = |disks: &[freezeframe_api::names::DiskName]| disks.iter().map(|name| name.0.clone()).collect();
        Self {
            content: content.name_any(),
            uid: content.uid().unwrap_or_default(),
            snapshot: (spec.vm_snapshot_ref.namespace.clone(), spec.vm_snapshot_ref.name.clone()),
            vm: VmKey { namespace: spec.vm_snapshot_ref.namespace.clone(), name: spec.vm_name.clone() },
            drivers: spec.drivers.clone(),
            required: spec.consistency.required,
            fallback: spec.consistency.fallback,
            agent_timeout: spec.quiesce.agent_timeout.into(),
            freeze_timeout: spec.quiesce.freeze_timeout.into(),
            max_hold: spec.quiesce.max_hold.into(),
            mountpoints: spec.quiesce.mountpoints.clone(),
            pause: spec.quiesce.pause,
            include: names(&spec.disks.include),
            exclude: names(&spec.disks.exclude),
            targets: spec.disks.targets.iter().filter_map(target).collect(),
            verify: spec.verify,
            limits: spec.limits.clone(),
            deadline: spec.deadline.0,
            deletion_policy: spec.deletion_policy,
            generation: content.metadata.generation,
        }
    }

    /// The snapshot's id in file and node names: the UID's first twelve hexadecimal digits. Node names in QEMU have
    /// 31 bytes.
    #[must_use]
    pub fn id(&self) -> String {
        self.uid.chars().filter(char::is_ascii_hexdigit).take(12).collect()
    }

    /// Whether a snapshot without a freeze is one that the order takes.
    #[must_use]
    pub fn may_be_crash(&self) -> bool {
        self.required == ConsistencyLevel::Crash || self.fallback == Fallback::Degrade
    }

    /// Whether the order means a disk: all but those that it excludes and, unless it names them, read-only ones.
    #[must_use]
    pub fn wants(&self, disk: &str, read_only: bool) -> bool {
        let listed = |list: &[String]| list.iter().any(|listed| listed == disk);
        if self.include.is_empty() { !listed(&self.exclude) && !read_only } else { listed(&self.include) }
    }
}
