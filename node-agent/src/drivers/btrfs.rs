//! `btrfs`: a read-only snapshot of the subvolume that a VM's images are in; one for all disks inside it.
//!
//! The kernel commits what was written before the call, the host's page cache included, and all files of the
//! subvolume are of one instant. The snapshot lies in the subvolume itself, as `.vmsnap-ID`: that is always the same
//! file system, and a snapshot doesn't reach into subvolumes inside it.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use freezeframe_qemu::BlockGraph;
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::{Artifact, Cut, DiskFacts, DiskTask, DriverError, Env, HostCut, Removal, Result, SnapshotDriver, Verdict};
use crate::hypervisor::Vm;
use crate::hypervisor::btrfs::snapshot_read_only;
use crate::hypervisor::filesystem::Filesystem;
use crate::hypervisor::image::{ImageDirectory, ImageError, ImageRoots};

/// Deleting a subvolume is done when the kernel has cleaned it up; with many extents that takes long.
const DELETE_TIMEOUT: Duration = Duration::from_secs(300);

/// The driver.
pub struct Btrfs;

#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    subvolume: PathBuf,
    snapshot: String,
    /// The image's path within the subvolume.
    image: PathBuf,
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
        match (&disk.filesystem, &disk.chain) {
            (_, Err(why)) => Verdict::Unusable(why.clone()),
            (Some(Filesystem::Btrfs { subvolume }), Ok(())) => {
                Verdict::Usable(format!("in btrfs subvolume {}: a snapshot of it", subvolume.display()))
            }
            _ => Verdict::Unusable("the image isn't in a btrfs subvolume".into()),
        }
    }

    fn plan(&self, task: &mut DiskTask, _: &BlockGraph, roots: &ImageRoots) -> Result<()> {
        let path = task.path.clone().ok_or_else(|| DriverError::Verify("the disk has no file".into()))?;
        let Some(Filesystem::Btrfs { subvolume }) = Filesystem::of(&path) else {
            return Err(DriverError::NotNow(format!("{} isn't in a btrfs subvolume", path.display())));
        };
        roots.directory(&subvolume)?;
        let image = path.strip_prefix(&subvolume).map_err(|_| ImageError::NotAFilePath(path.clone()))?.to_owned();
        let snapshot = format!(".vmsnap-{}", task.id);
        task.set_state(&State { subvolume, snapshot, image })
    }

    async fn prepare(&self, _: &Vm, roots: &ImageRoots, task: &mut DiskTask) -> Result<()> {
        let state: State = task.state()?;
        // A chain that leaves the subvolume would leave the snapshot incomplete.
        let directory = roots.directory(&state.subvolume)?;
        let rest = directory.names()?.contains(&state.snapshot);
        if rest { Err(DriverError::NotNow(format!("{} is there already", state.path().display()))) } else { Ok(()) }
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
        let state: State = task.state()?;
        let handle = state.path().join(&state.image);
        let (directory, name) = roots.directory_of(&handle)?;
        if directory.id(&name)?.is_none() {
            return Err(DriverError::Verify(format!("disk {}: {} is missing", task.disk, handle.display())));
        }
        task.artifact = Some(Artifact { handle, format: task.format.clone() });
        Ok(())
    }

    async fn remove(&self, env: &Env<'_>, task: &mut DiskTask) -> Result<Removal> {
        if task.state.is_null() {
            return Ok(Removal::Done);
        }
        let state: State = task.state()?;
        let directory = env.roots.directory(&state.subvolume)?;
        if directory.names()?.contains(&state.snapshot) {
            btrfs(&["subvolume", "delete", "--commit-after"], &state.path()).await?;
            btrfs(&["subvolume", "sync"], &state.subvolume).await?;
        }
        Ok(Removal::Done)
    }
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

async fn btrfs(arguments: &[&str], path: &Path) -> Result<()> {
    let mut command = Command::new("btrfs");
    command.args(arguments).arg("--").arg(path).stdin(Stdio::null()).kill_on_drop(true);
    let failed = |output: String| DriverError::Tool { tool: "btrfs", output };
    match tokio::time::timeout(DELETE_TIMEOUT, command.output()).await {
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
        Ok(Err(error)) => Err(failed(error.to_string())),
        Err(_) => Err(failed(format!("no end after {DELETE_TIMEOUT:?}"))),
    }
}
