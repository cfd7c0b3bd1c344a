//! A work order of a restore, as the agent wants it: a content's spec, checked and in plain types.

use std::path::PathBuf;
use std::time::Duration;

use freezeframe_api::v1alpha1::{RestoreMode, RestoreStep, RestoreVerify, VMRestoreContent};
use kube::ResourceExt;
use serde::{Deserialize, Serialize};

use crate::hypervisor::VmKey;

/// One restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreOrder {
    /// Name of the content.
    pub content: String,
    /// UID of the content.
    pub uid: String,
    /// Namespace and name of the VMRestore.
    pub restore: (String, String),
    /// UID of the VMSnapshotContent whose data is brought back.
    pub source: String,
    /// The snapshot's VM.
    pub vm: VmKey,
    /// The VM that is made; none for a restore in place.
    pub new_vm: Option<VmKey>,
    /// Where the new VM's images go; beside the snapshot's if none.
    #[serde(default)]
    pub directory: Option<PathBuf>,
    /// What is to be done now.
    pub step: RestoreStep,
    /// UID of the VMSnapshotContent that keeps the state of before.
    pub pre_restore: Option<String>,
    /// Whether disks may depend on the snapshot's data.
    pub mode: RestoreMode,
    /// Only these disks, unless empty.
    pub include: Vec<String>,
    /// Not these disks.
    pub exclude: Vec<String>,
    /// Whether a VM that runs is shut down.
    pub stop_vm: bool,
    /// How long the guest may take for that.
    pub stop_timeout: Duration,
    /// How the disks are checked.
    pub verify: RestoreVerify,
    /// Generation of the content that was read.
    pub generation: Option<i64>,
}

impl RestoreOrder {
    /// Reads a content.
    #[must_use]
    pub fn new(content: &VMRestoreContent) -> Self {
        let spec = &content.spec;
        let names = |disks: &[freezeframe_api::names::DiskName]| disks.iter().map(|name| name.0.clone()).collect();
        let vm = |name: &String| VmKey { namespace: spec.vm_restore_ref.namespace.clone(), name: name.clone() };
        Self {
            content: content.name_any(),
            uid: content.uid().unwrap_or_default(),
            restore: (spec.vm_restore_ref.namespace.clone(), spec.vm_restore_ref.name.clone()),
            source: spec.source.uid.clone(),
            vm: vm(&spec.vm_name),
            new_vm: spec.new_vm.as_ref().map(vm),
            directory: spec.directory.as_ref().map(PathBuf::from),
            step: spec.step,
            pre_restore: spec.pre_restore_content.as_ref().map(|content| content.uid.clone()),
            mode: spec.mode,
            include: names(&spec.disks.include),
            exclude: names(&spec.disks.exclude),
            stop_vm: spec.stop_vm,
            stop_timeout: spec.stop_timeout.into(),
            verify: spec.verify,
            generation: content.metadata.generation,
        }
    }

    /// The restore's id in file names: the UID's first twelve hexadecimal digits.
    #[must_use]
    pub fn id(&self) -> String {
        self.uid.chars().filter(char::is_ascii_hexdigit).take(12).collect()
    }

    /// Every VM that the restore works on, in an order that all restores agree on.
    #[must_use]
    pub fn vms(&self) -> Vec<VmKey> {
        let mut vms: Vec<_> = self.new_vm.iter().chain([&self.vm]).cloned().collect();
        vms.sort();
        vms.dedup();
        vms
    }
}
