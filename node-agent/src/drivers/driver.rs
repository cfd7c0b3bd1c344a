//! What a driver is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use freezeframe_qemu::BlockGraph;

use super::{Cut, DiskFacts, DiskTask, DriverError, Env, Fill, Need, Pool, Removal, Result, Verdict};
use crate::hypervisor::Vm;
use crate::hypervisor::image::ImageRoots;

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

    /// The directories that have what a task made: none of them is empty when its removal begins, unless its file system
    /// isn't mounted. None where the driver looks itself.
    fn directories(&self, task: &DiskTask) -> Vec<PathBuf> {
        self.place(task).and_then(|place| Some(place.parent()?.to_owned())).into_iter().collect()
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
    fn follow(&self, task: &mut DiskTask, to: &Path, format: &str, _roots: &ImageRoots) -> Result<()> {
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

/// Refuses every parameter, for a driver that has none.
pub(crate) fn no_parameters(driver: &str, parameters: &BTreeMap<String, String>) -> Result<()> {
    match parameters.keys().next() {
        None => Ok(()),
        Some(key) => Err(DriverError::Parameter { key: key.clone(), why: format!("{driver} has no parameters") }),
    }
}
