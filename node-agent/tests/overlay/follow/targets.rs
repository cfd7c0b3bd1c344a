//! Layers in files that the user made, on another file system than the image.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::{ContentPhase, VMSnapshotContentStatus};
use freezeframe_node_agent::hypervisor::image::{ImageRoots, trusted_directory};
use freezeframe_node_agent::hypervisor::lock::ImageLock;
use tempfile::TempDir;

use super::restores::come_back_as_a_new_vms_alone;
use super::{Base, Loop, drive, lab, lab_on_device, lab_with, write_target_file};
use crate::crashes::cut_off;
use crate::lab::{Lab, Snapshot, Wanted, images};
use crate::machine::{REGION, REGIONS, make_image, path, run, view};
use crate::orders::orders;

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
fn said(status: &VMSnapshotContentStatus) -> (String, String) {
    let told = [types::ACCEPTED, types::READY].map(|type_| find(&status.conditions, type_));
    let told = told.into_iter().flatten().find(|told| told.status == "False").expect("it failed");
    (told.reason.clone(), told.message.clone())
}

/// While it runs, while it is stopped, and restarted as its owner is told.
#[tokio::test(flavor = "multi_thread")]
async fn snapshots_with_a_layer_in_the_users_file_are_deleted_in_every_order() {
    for base in [Base::Raw, Base::Qed, Base::Device] {
        let mut lent = Lent::start(base).await;
        for (number, order) in orders(&[0, 1, 2]).into_iter().enumerate() {
            println!("{base:?} {order:?}");
            let mut taken = vec![];
            for at in 0..3 {
                if number & (1 << at) != 0 {
                    lent.follow().await;
                }
                taken.push(lent.take().await);
            }
            for (step, at) in order.into_iter().enumerate() {
                match (number + step) % 3 {
                    0 => lent.lab.machine.kill(),
                    1 => lent.follow().await,
                    _ => {}
                }
                lent.delete(taken[at]).await;
                if lent.lab.machine.is_running() {
                    lent.lab.write().await;
                } else {
                    lent.follow().await;
                }
            }
            lent.follow().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_two_file_systems_with_one_inode_number_are_told_apart() {
    let mut lent = Lent::with_one_inode_number().await;
    let taken = [lent.take().await, lent.take().await];
    for number in taken {
        lent.delete(number).await;
    }
    lent.follow().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_comes_back_as_a_new_vms_disk_and_not_in_place() {
    let mut lent = Lent::start(Base::Raw).await;
    let taken = [lent.take().await, lent.take().await];
    come_back_as_a_new_vms_alone(&lent.lab, taken).await;
    lent.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_says_to_start_the_vm_with_the_users_file() {
    let mut lent = Lent::start(Base::Raw).await;
    let (number, order) = lent.order();
    let status = lent.lab.advance(&order).await;
    assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
    let told = status.disks[0].start_with.as_ref().unwrap();
    assert_eq!((told.path.as_str(), told.format.as_str()), (path(&lent.target()), "qcow2"));
    assert_eq!(lent.below().as_deref(), Some(path(&lent.base.image(&lent.lab))));
    let views = lent.lab.views();
    lent.lab.snapshots.insert(number, Snapshot { order, views });
    lent.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_the_owner_was_told_of_goes_though_nothing_was_written_to_it_running_or_not() {
    for running in [true, false] {
        let mut lent = Lent::start(Base::Raw).await;
        write_target_file(&lent.lab, &lent.base.image(&lent.lab));
        let (number, order) = lent.order();
        assert_eq!(lent.lab.advance(&order).await.phase, Some(ContentPhase::Ready));
        let views = lent.lab.views();
        lent.lab.snapshots.insert(number, Snapshot { order, views });
        // With its old command line.
        lent.lab.machine.kill();
        if running {
            lent.lab.machine.start().await;
        }
        lent.delete(number).await;
        assert!(!lent.target().exists(), "a VM started with it would find an empty disk");
        if !running {
            lent.lab.machine.start().await;
        }
        let again = lent.take().await;
        lent.delete(again).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_whose_file_system_is_not_there_is_not_taken_for_merged() {
    let mut lent = Lent::start(Base::Raw).await;
    let taken = lent.take().await;
    lent.lab.write().await;
    lent.lab.machine.kill();
    let order = lent.lab.snapshots[&taken].order.clone();
    let away = lent.targets.0.join("away");
    std::fs::rename(lent.target(), &away).unwrap();
    for (others, why) in [(false, "nothing at all is in"), (true, FILE)] {
        let other = lent.target().with_file_name("other");
        if others {
            std::fs::write(&other, "").unwrap();
        }
        let deletion = lent.lab.sessions.delete(&order).await.unwrap();
        assert!(!deletion.over, "others {others}");
        let told = format!("{:?}", deletion.status.conditions);
        assert!(told.contains(why), "{told}");
        drop(std::fs::remove_file(other));
    }
    std::fs::rename(&away, lent.target()).unwrap();
    lent.delete(taken).await;
    lent.follow().await;
}

type Spoil = fn(&Path);

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_cannot_be_the_layer_is_refused_in_words_and_left_as_it_was() {
    let cases: [(&str, Spoil); 7] = [
        ("isn't there", |target| std::fs::remove_file(target).unwrap()),
        ("qcow2", |target| std::fs::write(target, vec![0; 1 << 20]).unwrap()),
        ("has 65536 bytes", |target| run("qemu-img", &["create", "-q", "-f", "qcow2", path(target), "64k"])),
        ("needs another file", |target| {
            run("qemu-img", &["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "/dev/null", path(target)]);
        }),
        ("is not empty", |target| run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 64k", path(target)])),
        ("is not empty", |target| {
            let size = (REGION * REGIONS as u64).to_string();
            run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "preallocation=falloc", path(target), &size]);
        }),
        ("has other names", |target| std::fs::hard_link(target, target.with_extension("other")).unwrap()),
    ];
    let mut lent = Lent::start(Base::Raw).await;
    for (why, spoil) in cases {
        println!("{why}");
        lent.make();
        spoil(&lent.target());
        let before = std::fs::read(lent.target()).ok();
        let (reason, message) = said(&lent.refusal().await);
        assert_eq!(reason, reasons::INVALID_TARGET, "{message}");
        assert!(message.contains(why) && message.contains(FILE), "{message}");
        let after = std::fs::read(lent.target()).ok();
        assert!(view_of(before.as_deref()) == view_of(after.as_deref()), "{why}: the file isn't as it was");
        drop(std::fs::remove_file(lent.target()));
        drop(std::fs::remove_file(lent.target().with_extension("other")));
        lent.check().await;
    }
    lent.make();
    let directory = trusted_directory(lent.target().parent().unwrap()).unwrap();
    let held = ImageLock::take(&directory, FILE).unwrap();
    assert!(said(&lent.refusal().await).1.contains("in use"));
    drop(held);
    for target in ["../shop/db.qcow2", "vg0/db"] {
        lent.lab.targets = BTreeMap::from([("vda".into(), target.into())]);
        let (_, order) = lent.lab.order();
        assert!(said(&lent.lab.advance(&order).await).1.contains("not a file's name"), "{target}");
    }
    lent.check().await;
    let taken = lent.take().await;
    lent.delete(taken).await;
}

/// What must not change of a file: all of it but the header's first clusters, where `qemu-img` may write the same anew.
fn view_of(bytes: Option<&[u8]>) -> Option<(usize, &[u8])> {
    bytes.map(|bytes| (bytes.len(), &bytes[bytes.len().min(1 << 16)..]))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_without_a_class_or_a_disk_for_it_is_refused_in_words() {
    let mut lent = Lent::start(Base::Raw).await;
    let targets = lent.lab.parameters.remove("targets").unwrap();
    assert_eq!(said(&lent.refusal().await).0, reasons::INVALID_PARAMETER);
    lent.lab.parameters.insert("targets".into(), "/tmp".into());
    assert_eq!(said(&lent.refusal().await).0, reasons::INVALID_PARAMETER, "not beneath a root");
    lent.lab.parameters.insert("targets".into(), targets);
    lent.lab.parameters.insert("follow".into(), "false".into());
    let (reason, message) = said(&lent.refusal().await);
    assert_eq!(reason, reasons::DISK_NOT_SUPPORTED);
    assert!(message.contains("`follow`"), "{message}");
    lent.lab.parameters.insert("follow".into(), "true".into());
    lent.check().await;
    let taken = lent.take().await;
    // The disk is a qcow2 file now.
    lent.lab.targets = BTreeMap::from([("vda".into(), FILE.into())]);
    let (_, order) = lent.lab.order();
    let (reason, message) = said(&lent.lab.advance(&order).await);
    assert_eq!(reason, reasons::DISK_NOT_SUPPORTED);
    assert!(message.contains("beside it"), "{message}");
    lent.check().await;
    lent.delete(taken).await;
}

/// At every second point QEMU dies too, and the owner starts the VM with what it had.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_into_the_users_file_cut_off_anywhere_ends_ready_or_gives_the_file_back() {
    let mut lent = Lent::start(Base::Raw).await;
    let mut whole = false;
    let mut polls: usize = 1;
    while !whole {
        println!("polls {polls}");
        lent.make();
        lent.lab.write().await;
        let (number, order) = lent.order();
        whole = cut_off(Box::pin(lent.lab.sessions.advance(&order, &Wanted)), polls).await.is_some();
        let restarted = polls.is_multiple_of(2);
        if restarted {
            lent.lab.restart().await;
        }
        lent.lab.write().await;
        let status = lent.lab.advance(&order).await;
        match status.phase {
            Some(ContentPhase::Ready) => {
                let views = lent.lab.handles_of(&order).iter().map(|image| view(image)).collect();
                lent.lab.snapshots.insert(number, Snapshot { order, views });
            }
            Some(ContentPhase::Failed) => {}
            other => panic!("{other:?}: {:?}", status.conditions),
        }
        // One that was Ready before the VM was restarted wrongly is lost, as its owner was told.
        if restarted && lent.lab.snapshots.contains_key(&number) {
            let order = lent.lab.snapshots.remove(&number).unwrap().order;
            if !lent.lab.sessions.delete(&order).await.unwrap().over {
                std::fs::remove_file(lent.target()).unwrap();
                lent.lab.delete_order(&order).await;
            }
        }
        lent.check().await;
        if lent.lab.snapshots.contains_key(&number) {
            lent.delete(number).await;
        }
        polls += 1;
    }
    println!("{polls} points");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_over_the_users_file_cut_off_anywhere_can_be_finished() {
    let mut lent = Lent::start(Base::Raw).await;
    let mut polls = 1;
    let mut whole = 0;
    let mut taken = vec![];
    while whole < 6 {
        while taken.len() < 1 + polls % 3 {
            taken.push(lent.take().await);
        }
        let at = (polls / 2) % taken.len();
        let order = lent.lab.snapshots[&taken[at]].order.clone();
        let deletion = cut_off(Box::pin(lent.lab.sessions.delete(&order)), polls).await;
        whole += usize::from(deletion.is_some());
        println!("polls {polls} at {at} of {} done {}", taken.len(), deletion.is_some());
        if polls % 4 == 1 {
            lent.lab.write().await;
        }
        if polls % 4 != 3 {
            lent.lab.machine.kill();
            let now = if is_layer(&lent) { lent.target() } else { lent.base.image(&lent.lab) };
            lent.lab.machine.set_drives(&[drive(&now)]);
        }
        if polls % 4 < 2 {
            lent.lab.machine.start().await;
        }
        if lent.lab.machine.is_running() {
            lent.lab.write().await;
        }
        lent.delete(taken.remove(at)).await;
        lent.follow().await;
        lent.lab.write().await;
        polls += 1;
    }
    println!("{polls} points");
}

/// Whether the user's file is the disk.
fn is_layer(lent: &Lent) -> bool {
    std::fs::metadata(lent.target()).is_ok_and(|found| found.len() > 0) && lent.below().is_some()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_started_without_the_users_file_is_noticed_and_nothing_is_touched() {
    for base in [Base::Raw, Base::Device] {
        let mut lent = Lent::start(base).await;
        let taken = [lent.take().await, lent.take().await];
        let image = base.image(&lent.lab);
        lent.lab.machine.kill();
        lent.lab.machine.set_drives(&[drive(&image)]);
        lent.lab.machine.start().await;
        lent.lab.disks[0].now = lent.lab.snapshots[&taken[0]].views[0];
        lent.lab.write().await;
        let before = std::fs::read(lent.target()).unwrap();

        // Another file, so that it isn't the name that is in the way.
        make_image(&lent.target().with_file_name("other.qcow2"), None);
        lent.lab.targets = BTreeMap::from([("vda".into(), "other.qcow2".into())]);
        let (_, order) = lent.lab.order();
        let (reason, message) = said(&lent.lab.advance(&order).await);
        assert_eq!(reason, reasons::DISK_NOT_SUPPORTED);
        assert!(message.contains(path(&lent.target())), "{message}");

        for (running, at) in [(true, 0), (true, 1), (false, 0)] {
            if !running {
                lent.lab.machine.kill();
            }
            let order = lent.lab.snapshots[&taken[at]].order.clone();
            let record = lent.lab.sessions.journal.load(&order.uid).unwrap().unwrap();
            let told = lent.lab.sessions.overwritten(&record.tasks[0]).unwrap();
            // The kernel doesn't tell when a device was written to.
            assert_eq!(told.is_some_and(|why| why.contains(path(&image))), base == Base::Raw, "running {running} {at}");
            if base == Base::Raw || running {
                let deletion = lent.lab.sessions.delete(&order).await.unwrap();
                assert!(!deletion.over, "running {running} {at}");
                assert_eq!(std::fs::read(lent.target()).unwrap(), before, "the layer was touched");
                assert_eq!(view(&image), lent.lab.disks[0].now, "the VM's disk was touched");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_vm_is_found_by_the_records_of_its_snapshots() {
    let mut lent = Lent::start(Base::Raw).await;
    write_target_file(&lent.lab, &lent.base.image(&lent.lab));
    lent.lab.machine.kill();
    let mut taken = vec![];
    for _ in 0..2 {
        let (number, order) = lent.order();
        let status = lent.lab.advance(&order).await;
        assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
        let views = lent.lab.views();
        lent.lab.snapshots.insert(number, Snapshot { order, views });
        taken.push(number);
        lent.check().await;
        lent.follow().await;
        lent.lab.write().await;
        lent.lab.machine.kill();
    }
    for number in taken {
        lent.delete(number).await;
    }
    lent.follow().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_somebody_made_on_the_former_disk_keeps_it_as_it_is() {
    let mut lent = Lent::start(Base::Raw).await;
    let taken = lent.take().await;
    let clone = lent.lab.images().join("clone.qcow2");
    run("qemu-img", &["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "vda.img", path(&clone), "786432"]);
    lent.lab.others.push("clone.qcow2".into());
    for running in [true, false] {
        if !running {
            lent.lab.machine.kill();
        }
        let deletion = lent.lab.sessions.delete(&lent.lab.snapshots[&taken].order).await.unwrap();
        let said = &find(&deletion.status.conditions, types::REMOVED).unwrap().message;
        assert!(!deletion.over && said.contains(path(&clone)), "{said}");
        lent.check().await;
    }
    std::fs::remove_file(&clone).unwrap();
    lent.lab.others.pop();
    lent.delete(taken).await;
}
