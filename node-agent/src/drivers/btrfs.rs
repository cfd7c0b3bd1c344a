//! `btrfs`: a read-only snapshot of the subvolume that a VM's images are in; one for all disks inside it.
//!
//! The kernel commits what was written before the call, the host's page cache included, and all files of the
//! subvolume are of one instant. The snapshot lies in the subvolume itself, as `.vmsnap-ID`: that is always the same
//! file system, and a snapshot doesn't reach into subvolumes inside it.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use freezeframe_qemu::BlockGraph;
use serde::{Deserialize, Serialize};

use super::{Artifact, ChainImage, Cut, DiskFacts, DiskTask, DriverError, Env, HostCut, Removal, Result};
use super::{SnapshotDriver, Verdict, btrfs};
use crate::hypervisor::Vm;
use crate::hypervisor::btrfs::{Subvolume, snapshot_read_only, sync};
use crate::hypervisor::filesystem::Filesystem;
use crate::hypervisor::image::{ImageDirectory, ImageError, ImageRoots, ONE_FILE};

/// The driver.
pub struct Btrfs;

#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    subvolume: PathBuf,
    snapshot: String,
    /// The image's path within the subvolume.
    image: PathBuf,
    /// Whether the snapshot's name was seen free, so that what has it now is ours.
    claimed: bool,
    /// The snapshot's number on its file system, once it was seen to be one of the subvolume.
    #[serde(default)]
    id: Option<u64>,
}

impl State {
    /// What we made, if it has its name still. Who may write to the subvolume may give that name to anything.
    fn ours(&self, directory: &ImageDirectory) -> Result<Option<Subvolume>> {
        let found = Subvolume::named(directory.as_fd(), &self.snapshot).and_then(|found| {
            let origin = Subvolume::of(directory.as_fd())?;
            Ok(found.filter(|found| match self.id {
                Some(id) => found.id == id,
                None => origin.is_some_and(|origin| found.is_snapshot_of(&origin)),
            }))
        });
        Ok(found.map_err(|errno| self.io("examine", errno))?.filter(|_| self.claimed))
    }

    fn io(&self, doing: &'static str, errno: rustix::io::Errno) -> ImageError {
        ImageError::Io { doing, path: self.path(), source: errno.into() }
    }

    fn path(&self) -> PathBuf {
        self.subvolume.join(&self.snapshot)
    }
}

#[async_trait]
impl SnapshotDriver for Btrfs {
    fn name(&self) -> &'static str {
        "btrfs"
    }

    fn check_parameters(&self, parameters: &BTreeMap<String, String>) -> Result<()> {
        super::no_parameters(self.name(), parameters)
    }

    fn can_take(&self, disk: &DiskFacts, _: &BTreeMap<String, String>) -> Verdict {
        let (images, subvolume) = match (&disk.chain, &disk.filesystem) {
            (Err(why), _) => return Verdict::Unusable(why.clone()),
            (Ok(images), Some(Filesystem::Btrfs { subvolume: Some(subvolume) })) => (images, subvolume),
            (_, Some(Filesystem::Btrfs { subvolume: None })) => {
                return Verdict::Unusable(
                    "its btrfs subvolume is not beneath an image root of this node's agent".into(),
                );
            }
            _ => return Verdict::Unusable("the image isn't in a btrfs subvolume".into()),
        };
        match why_incomplete(images, subvolume) {
            Some(why) => Verdict::Unusable(why),
            None => Verdict::Usable(format!("in btrfs subvolume {}: a snapshot of it", subvolume.display())),
        }
    }

    fn plan(&self, task: &mut DiskTask, _: &BlockGraph, roots: &ImageRoots) -> Result<()> {
        let path = task.path.clone().ok_or_else(|| DriverError::Verify("the disk has no file".into()))?;
        let Some(Filesystem::Btrfs { subvolume: Some(subvolume) }) = Filesystem::of(&path, roots) else {
            return Err(DriverError::NotNow(format!("{} isn't in a btrfs subvolume", path.display())));
        };
        let image = path.strip_prefix(&subvolume).map_err(|_| ImageError::NotAFilePath(path.clone()))?.to_owned();
        let snapshot = format!(".vmsnap-{}", task.id);
        task.set_state(&State { subvolume, snapshot, image, claimed: false, id: None })
    }

    async fn prepare(&self, _: &Vm, roots: &ImageRoots, task: &mut DiskTask) -> Result<()> {
        let mut state: State = task.state()?;
        let taken = || Ok::<_, DriverError>(roots.directory(&state.subvolume)?.names()?.contains(&state.snapshot));
        if !state.claimed && taken()? {
            return Err(DriverError::NotNow(format!("{} is there already", state.path().display())));
        }
        state.claimed = true;
        task.set_state(&state)
    }

    fn cut(&self, group: &[&DiskTask], roots: &ImageRoots) -> Result<Cut> {
        let mut by_subvolume: BTreeMap<PathBuf, (State, Vec<String>)> = BTreeMap::new();
        for task in group {
            let state: State = task.state()?;
            let entry = by_subvolume.entry(state.subvolume.clone()).or_insert_with(|| (state, vec![]));
            entry.1.push(task.disk.clone());
        }
        let host = by_subvolume.into_values().map(|(state, disks)| host_cut(state, disks, roots));
        Ok(Cut { host: host.collect::<Result<_>>()?, ..Cut::default() })
    }

    fn needs_pause(&self) -> bool {
        true
    }

    async fn complete(&self, _: &Vm, roots: &ImageRoots, task: &mut DiskTask) -> Result<()> {
        let mut state: State = task.state()?;
        let lost = || DriverError::Verify(format!("{} isn't the snapshot that was made", state.path().display()));
        state.id = Some(state.ours(&roots.directory(&state.subvolume)?)?.ok_or_else(lost)?.id);
        let handle = state.path().join(&state.image);
        task.set_state(&state)?;
        task.artifact = Some(Artifact { handle, format: task.format.clone() });
        Ok(())
    }

    fn directories(&self, task: &DiskTask) -> Vec<PathBuf> {
        task.state::<State>().map(|state| state.subvolume).into_iter().collect()
    }

    async fn remove(&self, env: &Env<'_>, task: &mut DiskTask) -> Result<Removal> {
        if task.state.is_null() {
            return Ok(Removal::Done);
        }
        let state: State = task.state()?;
        let Some(directory) = env.roots.existing_directory(&state.subvolume)? else { return Ok(Removal::Done) };
        if let Some(snapshot) = state.ours(&directory)? {
            delete(&state, snapshot, directory).await?;
        }
        Ok(Removal::Done)
    }
}

/// Why a snapshot of the subvolume would not hold all of a disk, or would read something outside itself.
fn why_incomplete(images: &[ChainImage], subvolume: &Path) -> Option<String> {
    for (depth, image) in images.iter().enumerate() {
        let path = &image.layer.path;
        let inside = matches!(&image.filesystem, Some(Filesystem::Btrfs { subvolume: Some(own) }) if own == subvolume);
        let below = images.get(depth + 1).map(|below| below.layer.path.as_path());
        let why = match () {
            () if !inside => format!("is outside subvolume {}", subvolume.display()),
            () if !ONE_FILE.contains(&image.layer.format.as_str()) => {
                "has a format whose images may be several files".into()
            }
            () if below.is_some() && image.layer.format != "qcow2" => {
                "has a format whose backing string isn't known".into()
            }
            () if image.backing.as_deref().is_some_and(|backing| Path::new(backing).is_absolute()) => {
                "names its backing file by an absolute path, which leads out of a snapshot".into()
            }
            () if image.backing.as_ref().map(|backing| path.with_file_name(backing)).as_deref() != below => {
                "names another backing file than the VM runs with".into()
            }
            () => continue,
        };
        return Some(format!("{} {why}", path.display()));
    }
    None
}

/// Deletes a snapshot, and waits until its space is free.
async fn delete(state: &State, snapshot: Subvolume, directory: ImageDirectory) -> Result<()> {
    // Committing waits for the disk.
    let gone = tokio::task::spawn_blocking(move || {
        snapshot.delete(directory.as_fd())?;
        sync(directory.as_fd())?;
        Ok(directory)
    });
    let gone = gone.await.map_err(|error| DriverError::NotNow(error.to_string()))?;
    let directory = gone.map_err(|errno| state.io("delete", errno))?;
    // By the descriptor: the path may lead elsewhere by now.
    let path = format!("/proc/{}/fd/{}", std::process::id(), directory.as_fd().as_raw_fd());
    btrfs(&["subvolume", "sync"], Path::new(&path)).await
}

fn host_cut(state: State, disks: Vec<String>, roots: &ImageRoots) -> Result<HostCut> {
    let directory: ImageDirectory = roots.directory(&state.subvolume)?;
    let run = move || {
        let fd = directory.as_fd();
        Ok(snapshot_read_only(fd, fd, &state.snapshot).map_err(|errno| state.io("make snapshot", errno))?)
    };
    Ok(HostCut { disks, run: Arc::new(run) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drivers::Layer;

    #[test]
    fn an_image_that_may_be_several_files_is_refused() {
        let subvolume = Path::new("/images/vm");
        let image = |format: &str| ChainImage {
            layer: Layer { path: subvolume.join("disk"), format: format.into() },
            filesystem: Some(Filesystem::Btrfs { subvolume: Some(subvolume.into()) }),
            backing: None,
            encrypted: false,
            writable: true,
        };
        for format in ["raw", "qcow2", "qed"] {
            assert_eq!(why_incomplete(&[image(format)], subvolume), None, "{format}");
        }
        assert!(why_incomplete(&[image("vmdk")], subvolume).is_some_and(|why| why.contains("several files")));
    }
}
