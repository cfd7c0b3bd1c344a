//! Layers in files that the user made, on another file system than the image.

mod cut_off;
mod lost;
mod refused;
mod whole;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use freezeframe_api::conditions::{find, types};
use freezeframe_api::v1alpha1::{ContentPhase, VMSnapshotContentStatus};
use freezeframe_node_agent::hypervisor::image::ImageRoots;
use tempfile::TempDir;

use super::{Base, Loop, drive, lab, lab_on_device, lab_with};
use crate::lab::{Lab, images};
use crate::machine::{make_image, path, run};

const FILE: &str = "db.qcow2";

/// A file system in memory: its inodes have the numbers that other file systems' have too.
struct Memory(PathBuf);

impl Memory {
    fn mount(at: PathBuf) -> Self {
        std::fs::create_dir_all(&at).unwrap();
        run("mount", &["-t", "tmpfs", "-o", "size=64m", "tmpfs", path(&at)]);
        Self(at)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // A test that fails must leave none behind; QEMU, which may still use it, ends with the test.
        drop(Command::new("umount").args(["-l", path(&self.0)]).status());
    }
}

/// A VM whose first snapshot's layer goes to the user's own file.
struct Lent {
    // Dropped in this order: what is mounted before the directory that it is mounted in.
    targets: Memory,
    _images: Option<Memory>,
    lab: Lab,
    base: Base,
    _device: Option<Loop>,
}

impl Lent {
    async fn start(base: Base) -> Self {
        match base {
            Base::Device => {
                let (lab, device) = lab_on_device().await;
                Self::of(lab, base, Some(device))
            }
            _ => Self::of(lab(base).await, base, None),
        }
    }

    fn of(mut lab: Lab, base: Base, device: Option<Loop>) -> Self {
        lab.parameters.remove("directory");
        let targets = Memory::mount(lab.images().with_file_name("targets"));
        std::fs::create_dir(targets.0.join("shop")).unwrap();
        lab.sessions.roots = ImageRoots::new(vec![lab.images(), targets.0.clone(), "/dev".into()]);
        lab.parameters.insert("targets".into(), path(&targets.0).into());
        let lent = Self { targets, _images: None, lab, base, _device: device };
        lent.make();
        lent
    }

    /// The image on a file system of its own, too, where it has the inode number that the file has on its.
    async fn with_one_inode_number() -> Self {
        let directory = TempDir::new().unwrap();
        let memory = Memory::mount(images(&directory));
        // So that there is room to catch up with it.
        for filler in 0..64 {
            std::fs::write(memory.0.join(format!("{filler}")), "").unwrap();
            std::fs::remove_file(memory.0.join(format!("{filler}"))).unwrap();
        }
        let mut lent =
            Self { _images: Some(memory), ..Self::of(lab_with(Base::Raw, directory).await, Base::Raw, None) };
        let inode = |path: &Path| std::fs::metadata(path).unwrap().ino();
        let wanted = inode(&lent.base.image(&lent.lab));
        while inode(&lent.target()) != wanted {
            assert!(inode(&lent.target()) < wanted);
            std::fs::remove_file(lent.target()).unwrap();
            lent.make();
        }
        lent.lab.write().await;
        lent
    }

    fn target(&self) -> PathBuf {
        self.targets.0.join("shop").join(FILE)
    }

    /// The user makes the file, unless it is there.
    fn make(&self) {
        if !self.target().exists() {
            make_image(&self.target(), None);
        }
    }

    /// The image below the target, by its header; none if it is as the user made it.
    fn below(&self) -> Option<String> {
        let said = Command::new("qemu-img")
            .args(["info", "-U", "--output=json", "-f", "qcow2", path(&self.target())])
            .output()
            .unwrap();
        let said: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
        said["backing-filename"].as_str().map(str::to_owned)
    }

    /// An order that names the file where the disk is no layer yet.
    fn order(&mut self) -> (u32, freezeframe_node_agent::session::order::Order) {
        self.name_target();
        self.lab.order()
    }

    fn name_target(&mut self) {
        let named = self.lab.snapshots.is_empty().then(|| ("vda".to_owned(), FILE.to_owned()));
        self.lab.targets = named.into_iter().collect();
    }

    async fn take(&mut self) -> u32 {
        self.make();
        self.name_target();
        let taken = self.lab.take().await;
        self.check().await;
        taken
    }

    async fn delete(&mut self, snapshot: u32) {
        self.lab.delete(snapshot).await;
        self.check().await;
    }

    fn disk(&self) -> PathBuf {
        if self.lab.snapshots.is_empty() { self.base.image(&self.lab) } else { self.target() }
    }

    /// Everything reads as it must, and the user's directory has the file and the images of later snapshots.
    async fn check(&mut self) {
        self.lab.disks[0].image = self.disk();
        self.lab.check().await;
        let later = self.lab.snapshots.keys().flat_map(|number| self.lab.handles(*number));
        let mut expected: Vec<_> = later.filter(|handle| handle.starts_with(&self.targets.0)).collect();
        // One that was merged is gone; one that was given back is as it was.
        expected.extend((!self.lab.snapshots.is_empty() || self.target().exists()).then(|| self.target()));
        expected.sort();
        let entries = std::fs::read_dir(self.targets.0.join("shop")).unwrap();
        let mut found: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        found.sort();
        assert_eq!(found, expected);
        if self.lab.snapshots.is_empty() && self.target().exists() {
            assert_eq!(self.below(), None, "the user's file was not given back as it was");
        }
    }

    /// Restarts the VM as its owner is told to.
    async fn follow(&mut self) {
        self.lab.machine.kill();
        self.lab.machine.set_drives(&[drive(&self.disk())]);
        self.lab.machine.start().await;
        self.check().await;
    }

    async fn refusal(&mut self) -> VMSnapshotContentStatus {
        let (_, order) = self.order();
        let status = self.lab.advance(&order).await;
        assert_eq!(status.phase, Some(ContentPhase::Failed));
        self.lab.sessions.delete(&order).await.unwrap();
        status
    }
}

/// The reason and the message of what failed.
pub fn said(status: &VMSnapshotContentStatus) -> (String, String) {
    let told = [types::ACCEPTED, types::READY].map(|type_| find(&status.conditions, type_));
    let told = told.into_iter().flatten().find(|told| told.status == "False").expect("it failed");
    (told.reason.clone(), told.message.clone())
}
