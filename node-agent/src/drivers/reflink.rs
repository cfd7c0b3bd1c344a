//! `reflink`: image files on XFS or btrfs, cloned by sharing their data.
//!
//! The top image is cloned in the window, while the virtual CPUs are stopped: QEMU has flushed its caches then, and
//! the clone takes what is in the host's page cache too. Images below the top are not written while the VM runs, so
//! their clones are made before the window. A clone that backs onto another image is pointed at that image's clone
//! afterwards: later merges into the original chain can't touch it.
//!
//! Until it is complete a clone is called `….partial`: under that name everything is ours to overwrite and unlink.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use freezeframe_qemu::BlockGraph;
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::{Artifact, Cut, DiskFacts, DiskTask, DriverError, Env, HostCut, Layer, Removal, Result};
use super::{SnapshotDriver, Verdict, qemu_img};
use crate::hypervisor::Vm;
use crate::hypervisor::backing::backing_of;
use crate::hypervisor::filesystem::Filesystem;
use crate::hypervisor::image::{FileId, ImageDirectory, ImageError, ImageRoots, ONE_FILE};
use crate::hypervisor::share::match_copy_on_write;

/// Formats whose backing string `qemu-img` can change.
const REBASED: [&str; 2] = ["qcow2", "qed"];

/// The driver.
pub struct Reflink;

/// The images of one disk, top first.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    images: Vec<Image>,
}

impl State {
    fn top(&self) -> Result<&Image> {
        self.images.first().ok_or_else(|| DriverError::Verify("the disk has no file".into()))
    }
}

/// An image and its clone, which lies beside it.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Image {
    source: PathBuf,
    format: String,
    clone: PathBuf,
    /// The clone's file, once made.
    id: Option<FileId>,
}

impl Image {
    /// Two disks may share an image below the top, so each disk's clone of it has a name of its own.
    fn new(depth: usize, layer: &Layer, task: &DiskTask) -> Self {
        let suffix = if depth == 0 { String::new() } else { format!("-{}", task.index) };
        let clone = appended(&layer.path, &format!(".vmsnap-{}{suffix}", task.id));
        Self { source: layer.path.clone(), format: layer.format.clone(), clone, id: None }
    }

    fn partial(&self) -> PathBuf {
        appended(&self.clone, ".partial")
    }
}

fn appended(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
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
        let images = match &disk.chain {
            Ok(images) => images,
            Err(why) => return Verdict::Unusable(why.clone()),
        };
        let below = images.len().saturating_sub(1);
        for (depth, image) in images.iter().enumerate() {
            let (path, format) = (image.layer.path.display(), image.layer.format.as_str());
            let shares = matches!(image.filesystem, Some(Filesystem::Xfs | Filesystem::Btrfs { .. }));
            let named_or_chained = depth < below || image.backing.is_some();
            let why = match () {
                () if !shares => "is on a file system that can't share data between files",
                () if !image.writable => "is where nothing can be made beside it",
                () if !ONE_FILE.contains(&format) => "has a format whose images may be several files",
                () if depth < below && !REBASED.contains(&format) => "has a format whose backing file can't be changed",
                () if image.encrypted && named_or_chained => {
                    "is encrypted, and the backing file that it names can't be changed without its key"
                }
                () => continue,
            };
            return Verdict::Unusable(format!("{path} {why}"));
        }
        Verdict::Usable("file on XFS or btrfs: a clone that shares its data".into())
    }

    fn plan(&self, task: &mut DiskTask, _: &BlockGraph, _: &ImageRoots) -> Result<()> {
        let images = task.chain.iter().enumerate().map(|(depth, layer)| Image::new(depth, layer, task)).collect();
        let state = State { images };
        state.top()?;
        task.set_state(&state)
    }

    async fn prepare(&self, _: &Vm, roots: &ImageRoots, task: &mut DiskTask) -> Result<()> {
        let (mut state, roots): (State, _) = (task.state()?, roots.clone());
        // Cloning writes out what is dirty: that may take a while, and other VMs' windows must not wait for it.
        let made = tokio::task::spawn_blocking(move || {
            let made = state.images.iter_mut().try_for_each(|image| make_clone(&roots, image));
            (state, made)
        });
        let (state, made) = made.await.map_err(|error| DriverError::NotNow(error.to_string()))?;
        task.set_state(&state)?;
        made
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
        for (depth, image) in state.images.iter().enumerate().rev() {
            finish(roots, image, state.images.get(depth + 1)).await?;
        }
        let top = state.top()?;
        task.artifact = Some(Artifact { handle: top.clone.clone(), format: top.format.clone() });
        Ok(())
    }

    async fn remove(&self, env: &Env<'_>, task: &mut DiskTask) -> Result<Removal> {
        if task.state.is_null() {
            return Ok(Removal::Done);
        }
        let state: State = task.state()?;
        for image in &state.images {
            let parent = image.clone.parent().ok_or_else(|| ImageError::NotAFilePath(image.clone.clone()))?;
            let Some(directory) = env.roots.existing_directory(parent)? else { continue };
            directory.unlink(file_name(&image.partial())?)?;
            let name = file_name(&image.clone)?;
            if image.id.is_some() && image.id == directory.id(name)? {
                directory.unlink(name)?;
            }
        }
        Ok(Removal::Done)
    }
}

fn file_name(path: &Path) -> Result<&str> {
    let name = path.file_name().and_then(|name| name.to_str());
    name.ok_or_else(|| ImageError::NotAFilePath(path.to_owned()).into())
}

/// Makes the clone and fills it: of the top image only to see that it can be done.
fn make_clone(roots: &ImageRoots, image: &mut Image) -> Result<()> {
    let (directory, name) = roots.directory_of(&image.clone)?;
    let (source, partial) = (file_name(&image.source)?, image.partial());
    let partial = file_name(&partial)?;
    if image.id.is_none() || image.id != directory.id(partial)? {
        if directory.names()?.contains(&name) {
            return Err(DriverError::NotNow(format!("{} is there already", image.clone.display())));
        }
        directory.unlink(partial)?;
        let made = directory.create(partial, Mode::from_raw_mode(0o600))?;
        image.id = directory.id(partial)?;
        let like = directory.open(source, OFlags::RDONLY)?;
        match_copy_on_write(&like, &made).map_err(|errno| ImageError::Io {
            doing: "give attributes to",
            path: image.partial(),
            source: errno.into(),
        })?;
        directory.copy_ownership(partial, &directory, source)?;
    }
    let (source, target) = ends(roots, image)?;
    share(&source, &target, image)
}

/// Both ends of a clone, opened.
fn ends(roots: &ImageRoots, image: &Image) -> Result<(OwnedFd, OwnedFd)> {
    let (directory, source) = roots.directory_of(&image.source)?;
    let partial = image.partial();
    Ok((directory.open(&source, OFlags::RDONLY)?, directory.open(file_name(&partial)?, OFlags::RDWR)?))
}

fn share(source: &OwnedFd, target: &OwnedFd, image: &Image) -> Result<()> {
    rustix::fs::ioctl_ficlone(target, source)
        .map_err(|errno| ImageError::Io { doing: "clone into", path: image.partial(), source: errno.into() }.into())
}

fn host_cut(task: &DiskTask, roots: &ImageRoots) -> Result<HostCut> {
    let state: State = task.state()?;
    let top = state.top()?.clone();
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

/// Points a clone at the clone below it and gives it its name, unless that was done before.
async fn finish(roots: &ImageRoots, image: &Image, below: Option<&Image>) -> Result<()> {
    let (directory, name) = roots.directory_of(&image.clone)?;
    if image.id.is_some() && directory.id(&name)? == image.id {
        return Ok(());
    }
    let partial = image.partial();
    if let Some(below) = below {
        // Relative where it can be: the images may be moved together.
        let beside = below.clone.parent() == image.clone.parent();
        let backing = if beside { Path::new(file_name(&below.clone)?) } else { &below.clone };
        let backing = backing.to_str().ok_or_else(|| ImageError::NotAFilePath(below.clone.clone()))?;
        qemu_img(&["rebase", "-u", "-f", &image.format, "-F", &below.format, "-b", backing], &partial, None).await?;
    } else if REBASED.contains(&image.format.as_str()) && names_backing(&directory, &partial)? {
        // Whatever its header says: the VM runs with nothing below it.
        qemu_img(&["rebase", "-u", "-f", &image.format, "-b", ""], &partial, None).await?;
    }
    let partial = file_name(&partial)?;
    directory.sync_file(partial)?;
    Ok(directory.rename_new(partial, &name)?)
}

fn names_backing(directory: &ImageDirectory, image: &Path) -> Result<bool> {
    let mut file = File::from(directory.open(file_name(image)?, OFlags::RDONLY)?);
    let backing = backing_of(&mut file).map_err(|source| DriverError::Header { path: image.to_owned(), source })?;
    Ok(backing.is_some())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::drivers::{ChainImage, Writers};

    fn image(change: impl FnOnce(&mut ChainImage)) -> ChainImage {
        let layer = Layer { path: "/images/disk.qcow2".into(), format: "qcow2".into() };
        let filesystem = Some(Filesystem::Xfs);
        let mut image = ChainImage { layer, filesystem, backing: None, encrypted: false, writable: true };
        change(&mut image);
        image
    }

    fn refusal(chain: Vec<ChainImage>) -> String {
        let facts = DiskFacts {
            format: "qcow2".into(),
            source: String::new(),
            path: Ok("/images/disk.qcow2".into()),
            device: Err("not a device".into()),
            filesystem: Some(Filesystem::Xfs),
            chain: Ok(chain),
            encrypted: false,
            has_bitmaps: false,
            writers: Writers::Guest,
            on_device: None,
            not_followed: None,
        };
        match Reflink.can_take(&facts, &BTreeMap::new()) {
            Verdict::Usable(_) => String::new(),
            Verdict::Unusable(why) => why,
        }
    }

    #[test]
    fn a_chain_that_could_not_be_cloned_or_pointed_at_clones_is_refused_before_the_window() {
        let plain = || image(|_| {});
        assert_eq!(refusal(vec![plain(), plain()]), "");
        assert!(refusal(vec![plain(), image(|base| base.writable = false)]).contains("nothing can be made"));
        let encrypted = |backing: Option<&str>| {
            image(|image| (image.encrypted, image.backing) = (true, backing.map(ToOwned::to_owned)))
        };
        assert_eq!(refusal(vec![encrypted(None)]), "");
        assert_eq!(refusal(vec![plain(), encrypted(None)]), "");
        for chain in [vec![encrypted(Some("disk.qcow2")), plain()], vec![encrypted(Some("/etc/shadow"))]] {
            assert!(refusal(chain).contains("without its key"));
        }
    }

    fn create(image: &Path, arguments: &[&str]) {
        let mut command = Command::new("qemu-img");
        let made = command.args(["create", "-q"]).args(arguments).arg(image).arg("1M").status().unwrap();
        assert!(made.success(), "{arguments:?}");
    }

    /// Completes a clone of a disk that the VM runs with nothing below it; what its header names then.
    async fn finished(arguments: &[&str]) -> Option<String> {
        let directory = tempfile::tempdir().unwrap();
        let roots = ImageRoots::new(vec![directory.path().to_owned()]);
        let (clone, format) = (directory.path().join("disk.vmsnap-1"), arguments[1].to_owned());
        let partial = appended(&clone, ".partial");
        create(&partial, arguments);
        let id = roots.directory(directory.path()).unwrap().id("disk.vmsnap-1.partial").unwrap();
        let image = Image { source: directory.path().join("disk"), format, clone: clone.clone(), id };
        finish(&roots, &image, None).await.unwrap();
        backing_of(&mut File::open(&clone).unwrap()).unwrap()
    }

    #[tokio::test]
    async fn a_clone_names_no_backing_file_that_the_vm_does_not_run_with() {
        for format in ["qcow2", "qed"] {
            let names_a_file_of_the_host = ["-f", format, "-u", "-F", "raw", "-b", "/etc/hostname"];
            assert_eq!(finished(&names_a_file_of_the_host).await, None, "{format}");
        }
    }

    #[tokio::test]
    async fn an_encrypted_image_is_completed_without_its_key() {
        let (secret, options) =
            ("secret,id=key,data=open", "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10");
        assert_eq!(finished(&["-f", "qcow2", "--object", secret, "-o", options]).await, None);
    }
}
