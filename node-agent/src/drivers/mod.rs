//! Storage drivers: how one disk's data is taken, kept and given up.
//!
//! A driver gets a group of disks and offers `plan`, `prepare`, `cut`, `complete` and `remove`. It knows nothing of
//! freezing, of Kubernetes or of other drivers. Every function may be called again after a crash at any point of it:
//! what is there already is found, not made twice. A new driver is one file and one line in [`registry`].

pub mod btrfs;
pub mod choice;
pub mod copy;
mod error;
pub mod jobs;
pub mod lvm;
mod naming;
pub mod overlay;
mod pace;
pub(crate) mod quantity;
pub mod reflink;
mod removal;
mod space;
mod tool;
pub(crate) mod verify;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use freezeframe_guard::Exchange;
use freezeframe_qemu::BlockGraph;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::hypervisor::Vm;
use crate::hypervisor::device::BlockDevice;
use crate::hypervisor::filesystem::Filesystem;
use crate::hypervisor::image::ImageRoots;
pub(crate) use error::qemu;
pub use error::{DriverError, Result};
pub use pace::Pace;
pub use removal::{Env, Removal, Sibling, Switch};
pub use space::{Fill, Need, Pool};
pub(crate) use tool::{btrfs, qemu_img};

/// All drivers, in the default order of preference.
///
/// `lvm` is first for thin volumes; a thick one it takes only where a class sets its `size`, so never by default.
#[must_use]
pub fn registry() -> Vec<Box<dyn SnapshotDriver>> {
    vec![
        Box::new(lvm::Lvm),
        Box::new(reflink::Reflink),
        Box::new(btrfs::Btrfs),
        Box::new(overlay::Overlay),
        Box::new(copy::Copy),
    ]
}

/// The drivers that an agent works with, best first.
#[derive(Clone)]
pub struct Drivers(Vec<Arc<dyn SnapshotDriver>>);

impl Default for Drivers {
    /// All of [`registry`].
    fn default() -> Self {
        Self::new(registry())
    }
}

impl Drivers {
    /// These drivers and no others.
    #[must_use]
    pub fn new(drivers: Vec<Box<dyn SnapshotDriver>>) -> Self {
        Self(drivers.into_iter().map(Arc::from).collect())
    }

    /// The driver of that name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&Arc<dyn SnapshotDriver>> {
        self.iter().find(|driver| driver.name() == name)
    }

    /// All of them, best first.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<dyn SnapshotDriver>> {
        self.0.iter()
    }
}

/// What a driver may look at to say whether it can take a disk.
#[derive(Clone, Debug)]
pub struct DiskFacts {
    /// Format of the image, such as `qcow2`.
    pub format: String,
    /// What QEMU calls the image: a path, or a URL.
    pub source: String,
    /// Path of the image on this node, where it is a file beneath an image root; else why it isn't.
    pub path: std::result::Result<PathBuf, String>,
    /// The block device that is the disk's only image; else why there is none.
    pub device: std::result::Result<BlockDevice, String>,
    /// The block device that its image is on, whatever is below that.
    pub on_device: Option<PathBuf>,
    /// The file system that the image is on, where it is a file.
    pub filesystem: Option<Filesystem>,
    /// The images of its chain, top first, where each is a file beneath an image root; else why not.
    pub chain: std::result::Result<Vec<ChainImage>, String>,
    /// Whether the image is encrypted.
    pub encrypted: bool,
    /// Whether it has dirty bitmaps that a layer on top would leave behind.
    pub has_bitmaps: bool,
    /// Who may write to it.
    pub writers: Writers,
    /// Why it isn't what it should be: the VM was started with an image that a layer had been made on.
    pub not_followed: Option<String>,
}

/// Who may write to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writers {
    /// Its one device in this VM.
    Guest,
    /// Nobody: the guest can only read it.
    Nobody,
    /// Its device, and others in this VM or elsewhere.
    Others,
}

/// One image of a disk's chain, and what a copy of its file would depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainImage {
    /// Which image.
    pub layer: Layer,
    /// The file system that it is on.
    pub filesystem: Option<Filesystem>,
    /// The backing string of its header, where it is qcow2 or QED and has one.
    pub backing: Option<String>,
    /// Whether its header says that it is encrypted.
    pub encrypted: bool,
    /// Whether files can be made beside it.
    pub writable: bool,
}

/// A file with a disk's data, or a part of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Its path on this node.
    pub path: PathBuf,
    /// Its format.
    pub format: String,
}

/// Whether a driver can take a disk, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It can.
    Usable(String),
    /// It can't.
    Unusable(String),
}

/// One disk on its way through a snapshot. Everything a driver must remember is in `state`, in its own form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskTask {
    /// The disk's name, as the VMTarget lists it.
    pub disk: String,
    /// The driver that takes it.
    pub driver: String,
    /// Why this one.
    pub reason: String,
    /// The class's parameters for it.
    pub parameters: BTreeMap<String, String>,
    /// The snapshot's id: short, unique, fit for file and node names.
    pub id: String,
    /// The disk's number in the snapshot: `id` and `index` name what is made.
    pub index: usize,
    /// The node that a cut acts on.
    pub node: String,
    /// Format of the image.
    pub format: String,
    /// Virtual size, in bytes.
    pub size: u64,
    /// Path of the image on this node, if it has one.
    pub path: Option<PathBuf>,
    /// The images of its chain, top first; none where they aren't all files on this node.
    #[serde(default)]
    pub chain: Vec<Layer>,
    /// The VM, as part of the names of files outside its own directory.
    pub vm: crate::hypervisor::VmKey,
    /// Name of the VMSnapshot.
    #[serde(default)]
    pub snapshot: String,
    /// The file that the user made for the data.
    #[serde(default)]
    pub target: Option<String>,
    /// What the disk is after the cut, where the VM's command line leads elsewhere.
    #[serde(default)]
    pub start_with: Option<Layer>,
    /// The driver's own record.
    pub state: Value,
    /// What came of it, once complete.
    pub artifact: Option<Artifact>,
}

/// A complete disk of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    /// Where it is on this node.
    pub handle: PathBuf,
    /// Its format.
    pub format: String,
}

/// What a driver contributes to the window for a group of disks.
#[derive(Default)]
pub struct Cut {
    /// Actions for the one QMP transaction.
    pub actions: Vec<Value>,
    /// Names that change hands once the transaction is done, before the guest goes on.
    pub exchanges: Vec<Exchange>,
    /// Cuts outside QEMU, made in parallel while its virtual CPUs are stopped.
    pub host: Vec<HostCut>,
}

/// One cut outside QEMU. Everything it needs is open already.
#[derive(Clone)]
pub struct HostCut {
    /// The disks that it cuts, all at the same instant.
    pub disks: Vec<String>,
    /// Makes it; blocks, but not for long. May be called again after a failure.
    pub run: Arc<dyn Fn() -> Result<()> + Send + Sync>,
}

impl std::fmt::Debug for HostCut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostCut({})", self.disks.join(", "))
    }
}

/// Refuses every parameter, for a driver that has none.
pub(crate) fn no_parameters(driver: &str, parameters: &BTreeMap<String, String>) -> Result<()> {
    match parameters.keys().next() {
        None => Ok(()),
        Some(key) => Err(DriverError::Parameter { key: key.clone(), why: format!("{driver} has no parameters") }),
    }
}

/// How one storage layer takes disks.
#[async_trait]
pub trait SnapshotDriver: Send + Sync {
    /// Its name in classes and reports.
    fn name(&self) -> &'static str;

    /// Checks a class's parameters, without looking at any disk.
    fn check_parameters(&self, parameters: &BTreeMap<String, String>) -> Result<()>;

    /// Whether it can take a disk, under parameters that were checked.
    fn can_take(&self, disk: &DiskFacts, parameters: &BTreeMap<String, String>) -> Verdict;

    /// Why it can't put a disk into a file that the user made, where it can't.
    fn why_no_target(&self, _disk: &DiskFacts, _parameters: &BTreeMap<String, String>) -> Option<String> {
        Some("has no use for a target".into())
    }

    /// Names what `prepare` will make, in the task's state, before anything is made.
    fn plan(&self, task: &mut DiskTask, graph: &BlockGraph, roots: &ImageRoots) -> Result<()>;

    /// Makes everything that can be made before the window.
    async fn prepare(&self, vm: &Vm, roots: &ImageRoots, task: &mut DiskTask) -> Result<()>;

    /// What happens in the window to a group of disks. Nothing is changed yet: the window does it.
    fn cut(&self, group: &[&DiskTask], roots: &ImageRoots) -> Result<Cut>;

    /// Whether the cut is made outside QEMU, so that its virtual CPUs must be stopped and its caches flushed.
    fn needs_pause(&self) -> bool {
        false
    }

    /// Does in earnest what the cut began and what the guest mustn't wait for; may be called again.
    async fn go_on(&self, _vm: &Vm, _task: &DiskTask) -> Result<()> {
        Ok(())
    }

    /// After the cut, all that can be slow: waits, verifies, and sets the artifact.
    async fn complete(&self, vm: &Vm, roots: &ImageRoots, task: &mut DiskTask) -> Result<()>;

    /// Takes one step of removing whatever was made, finished or not, and says what is left.
    async fn remove(&self, env: &Env<'_>, task: &mut DiskTask) -> Result<Removal>;

    /// The image that the disk is on once the cut is made, under the name that it has then.
    fn disk_after_cut(&self, task: &DiskTask) -> Option<PathBuf> {
        task.path.clone()
    }

    /// Why a complete snapshot's data isn't what was cut any more, where somebody may write to it.
    fn overwritten(&self, _task: &DiskTask, _roots: &ImageRoots) -> Option<String> {
        None
    }

    /// The image below a task's data that somebody may write to, whose own task tells whether that was done.
    fn lies_on(&self, _task: &DiskTask, _roots: &ImageRoots) -> Option<PathBuf> {
        None
    }

    /// The file that has a task's data, complete or not.
    fn place(&self, task: &DiskTask) -> Option<PathBuf> {
        task.artifact.as_ref().map(|artifact| artifact.handle.clone())
    }

    /// Whether a removal went so far that another task's data may be where its record doesn't say: it must be finished
    /// before anything else of the VM is removed.
    fn is_half_removed(&self, _task: &DiskTask) -> bool {
        false
    }

    /// Whether removing a task merges an image on top of its data into it, and otherwise finds such images and refuses.
    fn merges(&self) -> bool {
        false
    }

    /// Lets a task's record follow its artifact, which another snapshot's removal moved.
    fn follow(&self, task: &mut DiskTask, to: &std::path::Path, format: &str, _roots: &ImageRoots) -> Result<()> {
        if let Some(artifact) = &mut task.artifact {
            to.clone_into(&mut artifact.handle);
            format.clone_into(&mut artifact.format);
        }
        Ok(())
    }

    /// How far the data is that is copied in the background, in percent; none where nothing is.
    async fn progress(&self, _vm: &Vm, _task: &DiskTask) -> Result<Option<u8>> {
        Ok(None)
    }

    /// What is taken at once of a file system, and which one it is that then fills as the guest writes; none if no file
    /// system does.
    fn needs(&self, task: &DiskTask) -> Option<Need> {
        Some(Need { directory: task.path.as_ref()?.parent()?.to_owned(), bytes: 0 })
    }

    /// Whether what the guest writes after the cut takes space on the file system that [`Self::needs`] names.
    fn grows_with_writes(&self) -> bool {
        true
    }

    /// How many bytes a prepared disk's guest may overwrite before its snapshot overflows; none where it can't.
    fn area(&self, _task: &DiskTask) -> Option<u64> {
        None
    }

    /// The pool that the changes of a prepared disk take their space from; none where there is none.
    fn pool(&self, _task: &DiskTask) -> Option<Pool> {
        None
    }

    /// How full the space for a complete snapshot's changes is, where that isn't a file system.
    async fn fill(&self, _task: &DiskTask) -> Result<Option<Fill>> {
        Ok(None)
    }

    /// Whether the data is complete as soon as `complete` has been called, with nothing copied in the background.
    fn is_instant(&self) -> bool {
        true
    }
}

impl DiskTask {
    /// The driver's own record.
    pub fn state<T: serde::de::DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_value(self.state.clone())
            .map_err(|source| DriverError::State { disk: self.disk.clone(), source })
    }

    /// Replaces the driver's own record.
    pub fn set_state(&mut self, state: &impl Serialize) -> Result<()> {
        self.state =
            serde_json::to_value(state).map_err(|source| DriverError::State { disk: self.disk.clone(), source })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::registry;

    #[test]
    fn the_guide_to_drivers_has_a_row_for_each() {
        let guide = include_str!("../../../docs/drivers.md");
        for driver in registry() {
            assert!(
                guide.contains(&format!("\n| `{}` |", driver.name())),
                "docs/drivers.md has no row `{}`",
                driver.name()
            );
        }
    }
}
