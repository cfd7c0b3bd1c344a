//! `reflink`: image files on XFS or btrfs, cloned by sharing their data.
//!
//! The top image is cloned in the window, while the virtual CPUs are stopped: QEMU has flushed its caches then, and
//! the clone takes what is in the host's page cache too. Images below the top are not written while the VM runs, so
//! their clones are made before the window. A clone that backs onto another image is pointed at that image's clone
//! afterwards: later merges into the original chain can't touch it.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use freezeframe_qemu::BlockGraph;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{Artifact, Cut, DiskFacts, DiskTask, DriverError, Env, HostCut, Removal, Result, SnapshotDriver, Verdict};
use super::{qemu, qemu_img};
use crate::hypervisor::Vm;
use crate::hypervisor::disks::path_of;
use crate::hypervisor::filesystem::Filesystem;
use crate::hypervisor::graph::{node_files, working_directory};
use crate::hypervisor::image::{ImageDirectory, ImageError, ImageRoots};
use crate::hypervisor::qcow2::read_header;

/// The driver.
pub struct Reflink;

/// The images of one disk, top first.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    images: Vec<Image>,
}

/// An image and its clone, which lies beside it.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Image {
    source: PathBuf,
    format: String,
    clone: PathBuf,
}

impl Image {
    fn new(source: PathBuf, format: &str, id: &str) -> Self {
        let mut clone = source.clone().into_os_string();
        clone.push(format!(".vmsnap-{id}"));
        Self { source, format: format.to_owned(), clone: clone.into() }
    }
}

#[async_trait]
impl SnapshotDriver for Reflink {
    fn name(&self) -> &'static str {
        "reflink"
    }

    fn check_parameters(&self, parameters: &BTreeMap<String, String>) -> Result<()> {
        super::no_parameters(self.name(), parameters)
    }

    fn can_take(&self, disk: &DiskFacts, _: &BTreeMap<String, String>) -> Verdict {
        match (&disk.filesystem, &disk.chain) {
            (_, Err(why)) => Verdict::Unusable(why.clone()),
            (Some(Filesystem::Xfs), Ok(())) => Verdict::Usable("file on XFS: a clone that shares its data".into()),
            (Some(Filesystem::Btrfs { .. }), Ok(())) => {
                Verdict::Usable("file on btrfs: a clone that shares its data".into())
            }
            _ => Verdict::Unusable("the image's file system can't share data between files".into()),
        }
    }

    fn plan(&self, task: &mut DiskTask, _: &BlockGraph, _: &ImageRoots) -> Result<()> {
        let top = task.path.clone().ok_or_else(|| DriverError::Verify("the disk has no file".into()))?;
        task.set_state(&State { images: vec![Image::new(top, &task.format, &task.id)] })
    }

    async fn prepare(&self, vm: &Vm, roots: &ImageRoots, task: &mut DiskTask) -> Result<()> {
        let state = State { images: chain(vm, roots, task).await? };
        task.set_state(&state)?;
        for (below, image) in state.images.iter().enumerate() {
            let (directory, name) = roots.directory_of(&image.clone)?;
            directory.unlink(&name)?;
            create(&directory, &name)?;
            directory.copy_ownership(&name, &directory, file_name(&image.source)?)?;
            if below > 0 {
                clone_image(roots, image)?;
            } else {
                probe(roots, image)?;
            }
        }
        Ok(())
    }

    fn cut(&self, group: &[&DiskTask], roots: &ImageRoots) -> Result<Cut> {
        let host = group.iter().map(|task| host_cut(task, roots)).collect::<Result<_>>()?;
        Ok(Cut { host, ..Cut::default() })
    }

    fn needs_pause(&self) -> bool {
        true
    }

    async fn complete(&self, _: &Vm, roots: &ImageRoots, task: &mut DiskTask) -> Result<()> {
        let state: State = task.state()?;
        for pair in state.images.windows(2) {
            let [image, below] = pair else { continue };
            let arguments = ["rebase", "-u", "-f", &image.format, "-F", &below.format, "-b", file_name(&below.clone)?];
            qemu_img(&arguments, &image.clone, None).await?;
        }
        for image in &state.images {
            let (directory, name) = roots.directory_of(&image.clone)?;
            directory.sync_file(&name)?;
            directory.sync()?;
        }
        let top = state.images.first().ok_or_else(|| DriverError::Verify("the disk has no image".into()))?;
        verify(roots, top, task)?;
        task.artifact = Some(Artifact { handle: top.clone.clone(), format: top.format.clone() });
        Ok(())
    }

    async fn remove(&self, env: &Env<'_>, task: &mut DiskTask) -> Result<Removal> {
        if task.state.is_null() {
            return Ok(Removal::Done);
        }
        let state: State = task.state()?;
        for image in &state.images {
            let (directory, name) = env.roots.directory_of(&image.clone)?;
            directory.unlink(&name)?;
        }
        Ok(Removal::Done)
    }
}

/// All images of a disk by the names that lead to them now.
async fn chain(vm: &Vm, roots: &ImageRoots, task: &DiskTask) -> Result<Vec<Image>> {
    let graph = vm.graph().await.map_err(qemu("read the block graph"))?;
    let cwd = working_directory(vm.qmp_identity().peer_pid);
    let files = node_files(vm.qmp(), &graph, roots, cwd.as_deref()).await.map_err(qemu("read QEMU's descriptors"))?;
    let image = |node: &freezeframe_qemu::Node| {
        let path = path_of(files.of(node), roots).map_err(DriverError::NotNow)?;
        Ok(Image::new(path, &node.driver, &task.id))
    };
    graph.chain(&task.node).into_iter().map(image).collect()
}

fn file_name(path: &Path) -> Result<&str> {
    let name = path.file_name().and_then(|name| name.to_str());
    name.ok_or_else(|| ImageError::NotAFilePath(path.to_owned()).into())
}

fn create(directory: &ImageDirectory, name: &str) -> Result<OwnedFd> {
    Ok(directory.create(name, Mode::from_raw_mode(0o600))?)
}

/// Both ends of a clone, opened.
fn ends(roots: &ImageRoots, image: &Image) -> Result<(OwnedFd, OwnedFd)> {
    let (source, source_name) = roots.directory_of(&image.source)?;
    let (target, target_name) = roots.directory_of(&image.clone)?;
    Ok((source.open(&source_name, OFlags::RDONLY)?, target.open(&target_name, OFlags::RDWR)?))
}

fn clone_image(roots: &ImageRoots, image: &Image) -> Result<()> {
    let (source, target) = ends(roots, image)?;
    share(&source, &target, image)
}

/// Fails now, outside the window, where the file system turns out not to share data after all.
fn probe(roots: &ImageRoots, image: &Image) -> Result<()> {
    clone_image(roots, image)
}

fn share(source: &OwnedFd, target: &OwnedFd, image: &Image) -> Result<()> {
    rustix::fs::ioctl_ficlone(target, source).map_err(|errno: Errno| {
        ImageError::Io { doing: "clone into", path: image.clone.clone(), source: errno.into() }.into()
    })
}

fn host_cut(task: &DiskTask, roots: &ImageRoots) -> Result<HostCut> {
    let state: State = task.state()?;
    let top = state.images.first().cloned().ok_or_else(|| DriverError::Verify("the disk has no image".into()))?;
    let (source, target) = ends(roots, &top)?;
    // QEMU's `stop` flushes but says nothing of a flush that failed; this one does.
    let run = move || {
        rustix::fs::fdatasync(&source).map_err(|errno| ImageError::Io {
            doing: "flush",
            path: top.source.clone(),
            source: errno.into(),
        })?;
        share(&source, &target, &top)
    };
    Ok(HostCut { disks: vec![task.disk.clone()], run: Arc::new(run) })
}

/// The clone is what its format and the disk's size say; a raw image has no header to look at.
fn verify(roots: &ImageRoots, top: &Image, task: &DiskTask) -> Result<()> {
    let (directory, name) = roots.directory_of(&top.clone)?;
    let mut file = File::from(directory.open(&name, OFlags::RDONLY)?);
    let size = match top.format.as_str() {
        "qcow2" => {
            let header = read_header(&mut file);
            header.map_err(|source| DriverError::Header { path: top.clone.clone(), source })?.virtual_size
        }
        "raw" => file.metadata().map(|found| found.len()).unwrap_or_default().next_multiple_of(512),
        _ => task.size,
    };
    if size == task.size {
        return Ok(());
    }
    Err(DriverError::Verify(format!("disk {}: the clone has {size} bytes, not {}", task.disk, task.size)))
}
