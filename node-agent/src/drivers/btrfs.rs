//! `btrfs`: a read-only snapshot of the subvolume that a VM's images are in; one for all disks inside it.
//!
//! The kernel commits what was written before the call, the host's page cache included, and all files of the
//! subvolume are of one instant. The snapshot lies in the subvolume itself, as `.vmsnap-ID`: that is always the same
//! file system, and a snapshot doesn't reach into subvolumes inside it.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use freezeframe_qemu::BlockGraph;
use serde::{Deserialize, Serialize};

use super::{Artifact, ChainImage, Cut, DiskFacts, DiskTask, DriverError, Env, HostCut, Removal, Result};
use super::{SnapshotDriver, Verdict, btrfs};
use crate::hypervisor::Vm;
use crate::hypervisor::btrfs::snapshot_read_only;
use crate::hypervisor::filesystem::Filesystem;
use crate::hypervisor::image::{ImageDirectory, ImageError, ImageRoots};

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
}

impl State {
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
        task.set_state(&State { subvolume, snapshot, image, claimed: false })
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

    async fn complete(&self, _: &Vm, _: &ImageRoots, task: &mut DiskTask) -> Result<()> {
        let state: State = task.state()?;
        let handle = state.path().join(&state.image);
        task.artifact = Some(Artifact { handle, format: task.format.clone() });
        Ok(())
    }

    async fn remove(&self, env: &Env<'_>, task: &mut DiskTask) -> Result<Removal> {
        if task.state.is_null() {
            return Ok(Removal::Done);
        }
        let state: State = task.state()?;
        let directory = env.roots.directory(&state.subvolume)?;
        if state.claimed && directory.names()?.contains(&state.snapshot) {
            btrfs(&["subvolume", "delete", "--commit-after"], &state.path()).await?;
            btrfs(&["subvolume", "sync"], &state.subvolume).await?;
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

fn host_cut(state: State, disks: Vec<String>, roots: &ImageRoots) -> Result<HostCut> {
    let directory: ImageDirectory = roots.directory(&state.subvolume)?;
    let run = move || {
        let fd = directory.as_fd();
        snapshot_read_only(fd, fd, &state.snapshot)
            .map_err(|errno| ImageError::Io { doing: "make snapshot", path: state.path(), source: errno.into() }.into())
    };
    Ok(HostCut { disks, run: Arc::new(run) })
}
