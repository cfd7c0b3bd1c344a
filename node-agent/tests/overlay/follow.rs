//! Disks that aren't qcow2, under a class whose VMs' owners follow: the layer is a new file, and the next command line
//! has it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::{ContentPhase, RestoreContentPhase, RestoreMode, RestoreStep, RestoreVerify};
use freezeframe_node_agent::hypervisor::VmKey;
use freezeframe_node_agent::hypervisor::image::ImageRoots;
use freezeframe_node_agent::locks::VmLocks;
use freezeframe_node_agent::restore::order::RestoreOrder;
use freezeframe_node_agent::restore::{Restores, Turn};
use freezeframe_node_agent::session::Sessions;
use freezeframe_node_agent::session::journal::Journal;
use freezeframe_node_agent::session::machine::StoppedVms;
use freezeframe_node_agent::session::order::Order;
use freezeframe_node_agent::session::space_watch::SpaceWatch;
use serde_json::json;
use tempfile::TempDir;
use tokio::sync::watch;

use crate::crashes::cut_off;
use crate::lab::{Lab, Snapshot, Wanted, images};
use crate::machine::{Drive, REGION, REGIONS, format_of, path, run, view, view_as};
use crate::orders::orders;

/// The image that a VM has first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    Raw,
    Qed,
    Device,
}

impl Base {
    fn image(self, lab: &Lab) -> PathBuf {
        match self {
            Self::Raw => lab.images().join("vda.img"),
            Self::Qed => lab.images().join("vda.qed"),
            Self::Device => {
                let link = lab.images().with_file_name("device");
                std::fs::read_link(link).unwrap()
            }
        }
    }
}

/// A file as a block device, with a link to it beside the images' directory.
struct Loop(PathBuf);

impl Loop {
    fn attach(directory: &TempDir, size: u64) -> Self {
        let file = directory.path().join("device.data");
        std::fs::File::create(&file).unwrap().set_len(size).unwrap();
        let output = Command::new("losetup").args(["-f", "--show", path(&file)]).output().unwrap();
        assert!(output.status.success(), "this test needs root: {}", String::from_utf8_lossy(&output.stderr));
        let device = Self(String::from_utf8(output.stdout).unwrap().trim().into());
        std::os::unix::fs::symlink(&device.0, directory.path().join("device")).unwrap();
        device
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // A test that fails must leave no device behind; QEMU, which may still have it, ends with the test.
        drop(Command::new("losetup").args(["-d", path(&self.0)]).status());
    }
}

fn drive(image: &Path) -> Drive {
    let (shown, format) = (image.display(), format_of(image));
    let protocol = if image.starts_with("/dev") { "host_device" } else { "file" };
    let file = format!("driver={protocol},node-name=file-vda,filename={shown}");
    let node = format!("driver={format},node-name=fmt-vda,file=file-vda");
    let arguments = ["-blockdev".into(), file, "-blockdev".into(), node].to_vec();
    Drive { id: "vda".into(), image: image.into(), arguments, device: "drive=fmt-vda".into() }
}

/// A VM with one disk that its owner will follow.
async fn lab(base: Base) -> Lab {
    assert_ne!(base, Base::Device);
    let directory = TempDir::new().unwrap();
    let image = images(&directory).join(if base == Base::Raw { "vda.img" } else { "vda.qed" });
    let size = (REGION * REGIONS as u64).to_string();
    run("qemu-img", &["create", "-q", "-f", format_of(&image), path(&image), &size]);
    let mut lab = Lab::start(directory, &[], vec![drive(&image)]).await;
    lab.parameters.insert("follow".into(), "true".into());
    lab
}

/// The same on a block device.
async fn lab_on_device() -> (Lab, Loop) {
    let directory = TempDir::new().unwrap();
    let device = Loop::attach(&directory, REGION * REGIONS as u64);
    let mut lab = Lab::start(directory, &[], vec![drive(&device.0)]).await;
    lab.sessions.roots = ImageRoots::new(vec![lab.images(), "/dev".into()]);
    lab.parameters.insert("follow".into(), "true".into());
    lab.parameters.insert("directory".into(), path(&lab.images()).to_owned());
    (lab, device)
}

/// What the disk is called while it has a layer.
fn layer(lab: &Lab, base: Base) -> PathBuf {
    let name = match base {
        Base::Raw => "vda.img.vmsnap-over-raw.qcow2",
        Base::Qed => "vda.qed.vmsnap-over-qed.qcow2",
        Base::Device => "shop.db-vda.vmsnap-over-raw.qcow2",
    };
    lab.images().join(name)
}

/// Checks all that there is, where the disk's own image must be the one that the status would name.
async fn check(lab: &mut Lab, base: Base) {
    lab.disks[0].image = if lab.snapshots.is_empty() { base.image(lab) } else { layer(lab, base) };
    lab.check().await;
}

/// Restarts the VM as its owner is told to.
async fn follow(lab: &mut Lab, base: Base) {
    let now = if lab.snapshots.is_empty() { base.image(lab) } else { layer(lab, base) };
    lab.machine.kill();
    lab.machine.set_drives(&[drive(&now)]);
    lab.machine.start().await;
    check(lab, base).await;
}

async fn take_three(lab: &mut Lab, base: Base) -> Vec<u32> {
    let mut taken = vec![];
    for _ in 0..3 {
        taken.push(lab.take().await);
        check(lab, base).await;
    }
    taken
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_of_a_disk_that_is_not_qcow2_are_deleted_in_every_order_and_leave_it_as_it_was() {
    for base in [Base::Raw, Base::Qed] {
        let mut lab = lab(base).await;
        for order in orders(&[0, 1, 2]) {
            println!("{base:?} {order:?}");
            let taken = take_three(&mut lab, base).await;
            for at in order {
                lab.delete(taken[at]).await;
                check(&mut lab, base).await;
                lab.write().await;
            }
        }
        // Nothing but the old command line.
        lab.restart().await;
        check(&mut lab, base).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_are_deleted_in_every_order_while_the_vm_is_stopped() {
    for base in [Base::Raw, Base::Qed] {
        let mut lab = lab(base).await;
        for order in orders(&[0, 1, 2]) {
            println!("{base:?} {order:?}");
            let taken = take_three(&mut lab, base).await;
            lab.machine.kill();
            for at in order {
                lab.delete(taken[at]).await;
                check(&mut lab, base).await;
            }
            lab.machine.start().await;
            check(&mut lab, base).await;
            lab.write().await;
        }
    }
}

/// Which of the restarts come before which snapshot and deletion differs from order to order.
#[tokio::test(flavor = "multi_thread")]
async fn a_vm_whose_owner_follows_loses_nothing_in_any_order() {
    for base in [Base::Raw, Base::Qed] {
        let mut lab = lab(base).await;
        for (number, order) in orders(&[0, 1, 2]).into_iter().enumerate() {
            println!("{base:?} {order:?}");
            let mut taken = vec![];
            for at in 0..3 {
                if number & (1 << at) != 0 {
                    follow(&mut lab, base).await;
                }
                taken.push(lab.take().await);
                check(&mut lab, base).await;
            }
            for (step, at) in order.into_iter().enumerate() {
                if (number + step) % 3 != 0 {
                    follow(&mut lab, base).await;
                }
                lab.delete(taken[at]).await;
                check(&mut lab, base).await;
                lab.write().await;
            }
            // What the command line had may be gone by now.
            follow(&mut lab, base).await;
        }
    }
}

/// What the status says to start the VM with.
fn current(lab: &Lab, base: Base) -> PathBuf {
    let layer = layer(lab, base);
    let is_image = std::fs::metadata(&layer).is_ok_and(|found| found.len() > 0);
    if is_image { layer } else { base.image(lab) }
}

/// The VM runs on an image that isn't the disk any more, and the guest goes on from what it finds there.
async fn start_with_old_command_line(lab: &mut Lab, base: Base, snapshot: u32) {
    lab.machine.kill();
    lab.machine.set_drives(&[drive(&base.image(lab))]);
    lab.machine.start().await;
    lab.disks[0].now = lab.snapshots[&snapshot].views[0];
    lab.write().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_started_with_its_old_command_line_is_noticed_and_nothing_is_touched() {
    for base in [Base::Raw, Base::Qed] {
        let mut lab = lab(base).await;
        let taken = lab.take().await;
        let (image, layer) = (base.image(&lab), layer(&lab, base));
        let overwritten = |lab: &Lab| {
            let record = lab.sessions.journal.load(&lab.snapshots[&taken].order.uid).unwrap().unwrap();
            lab.sessions.drivers.find("overlay").unwrap().overwritten(&record.tasks[0], &lab.sessions.roots)
        };
        assert_eq!(overwritten(&lab), None);
        start_with_old_command_line(&mut lab, base, taken).await;
        assert!(overwritten(&lab).is_some_and(|why| why.contains(path(&image))));
        let left = std::fs::read(&layer).unwrap();

        let (_, order) = lab.order();
        let refused = lab.advance(&order).await;
        let accepted = find(&refused.conditions, types::ACCEPTED).unwrap();
        assert_eq!(accepted.reason, reasons::DISK_NOT_SUPPORTED);
        assert!(accepted.message.contains(path(&layer)), "{}", accepted.message);

        let order = lab.snapshots[&taken].order.clone();
        for running in [true, false] {
            if !running {
                lab.machine.kill();
            }
            let deletion = lab.sessions.delete(&order).await.unwrap();
            let said = &find(&deletion.status.conditions, types::REMOVED).unwrap().message;
            assert!(!deletion.over && said.contains(path(&layer)), "running {running}: {said}");
            assert_eq!(std::fs::read(&layer).unwrap(), left, "the layer was touched");
            assert_eq!(view(&image), lab.disks[0].now, "the VM's disk was touched");
        }
        // Its owner goes on without what was left behind.
        std::fs::remove_file(&layer).unwrap();
        lab.delete(taken).await;
        lab.machine.start().await;
        check(&mut lab, base).await;
        let taken = lab.take().await;
        check(&mut lab, base).await;
        lab.delete(taken).await;
        check(&mut lab, base).await;
    }
}

fn restore_order(source: &Order, number: u32) -> RestoreOrder {
    RestoreOrder {
        content: format!("vmrestore-{number}"),
        uid: format!("{number:08x}-2222-4222-8222-222222222222"),
        restore: ("shop".into(), format!("restore-{number}")),
        source: source.uid.clone(),
        vm: source.vm.clone(),
        new_vm: None,
        directory: None,
        step: RestoreStep::Plan,
        pre_restore: None,
        mode: RestoreMode::Linked,
        include: vec![],
        exclude: vec![],
        stop_vm: false,
        stop_timeout: Duration::from_millis(500),
        verify: RestoreVerify::Quick,
        generation: Some(1),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_comes_back_as_a_new_vms_disk_and_not_in_place() {
    for base in [Base::Raw, Base::Qed] {
        let mut lab = lab(base).await;
        let taken = [lab.take().await, lab.take().await];
        let journal = lab.sessions.vm_root.with_file_name("restores");
        let Lab { sessions, snapshots, .. } = &lab;
        let sessions = Sessions {
            vm_root: sessions.vm_root.clone(),
            roots: sessions.roots.clone(),
            guard: sessions.guard.clone(),
            journal: sessions.journal.clone(),
            drivers: sessions.drivers.clone(),
            stopped: StoppedVms::with_files_only(),
            boots: sessions.boots.clone(),
            space: SpaceWatch::default(),
        };
        let boots = sessions.boots.clone();
        let restores = Restores { sessions: Arc::new(sessions), journal: Journal::open(journal).unwrap(), boots };
        let advance = async |order: &RestoreOrder| match restores
            .advance(order, &Wanted, &watch::Sender::new(None))
            .await
            .unwrap()
        {
            Turn::Over(status) => *status,
            Turn::Again(status) => panic!("not over: {status:?}"),
        };
        let mut number = 0;
        for taken in taken {
            let Snapshot { order, views } = &snapshots[&taken];
            for mode in [RestoreMode::Linked, RestoreMode::Full] {
                number += 1;
                let new_vm = Some(VmKey { namespace: "shop".into(), name: format!("new-{number}") });
                let step = RestoreStep::Restore;
                let status = advance(&RestoreOrder { new_vm, mode, step, ..restore_order(order, number) }).await;
                assert_eq!(status.phase, Some(RestoreContentPhase::Succeeded), "{:?}", status.conditions);
                let made = PathBuf::from(&status.disks[0].path.0);
                assert_eq!(view_as(&status.disks[0].format, &made), views[0]);
                std::fs::remove_file(made).unwrap();
            }
            number += 1;
            let status = advance(&restore_order(order, number)).await;
            assert_eq!(status.phase, Some(RestoreContentPhase::Failed), "{:?}", status.conditions);
        }
        check(&mut lab, base).await;
    }
}

fn write_target_file(lab: &Lab, image: &Path) {
    let disk = json!({"name": "vda", "path": image, "format": format_of(image)});
    // JSON is YAML.
    let text = json!({"disks": [disk]}).to_string();
    std::fs::write(lab.sessions.vm_root.join("shop/db/target.yaml"), text).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_of_a_stopped_vm_are_found_by_what_its_file_said_before_them() {
    for base in [Base::Raw, Base::Qed] {
        let mut lab = lab(base).await;
        write_target_file(&lab, &base.image(&lab));
        lab.machine.kill();
        for order in orders(&[0, 1, 2]) {
            println!("{base:?} {order:?}");
            let mut taken = vec![];
            for at in 0..3 {
                let (number, order) = lab.order();
                let status = lab.advance(&order).await;
                assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
                let told = status.disks[0].start_with.as_ref().map(|now| PathBuf::from(&now.path));
                assert_eq!(told, (at == 0).then(|| layer(&lab, base)), "the first cut makes another image of it");
                let views = lab.views();
                lab.snapshots.insert(number, Snapshot { order, views });
                taken.push(number);
                check(&mut lab, base).await;
                if at == 1 {
                    follow(&mut lab, base).await;
                    lab.write().await;
                    lab.machine.kill();
                }
            }
            for at in order {
                lab.delete(taken[at]).await;
                check(&mut lab, base).await;
            }
        }
    }
}

/// At every second point QEMU dies too; the owner starts the VM with what a status would have said by then, which is the
/// old image as long as the layer has no data.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_cut_off_anywhere_ends_ready_or_leaves_nothing() {
    let mut lab = lab(Base::Raw).await;
    let mut whole = false;
    let mut polls: usize = 1;
    while !whole {
        println!("polls {polls}");
        lab.write().await;
        let (number, order) = lab.order();
        whole = cut_off(Box::pin(lab.sessions.advance(&order, &Wanted)), polls).await.is_some();
        let restarted = polls.is_multiple_of(2);
        if restarted {
            lab.restart().await;
        }
        lab.write().await;
        let status = lab.advance(&order).await;
        match status.phase {
            Some(ContentPhase::Ready) => {
                let views = lab.handles_of(&order).iter().map(|image| view(image)).collect();
                lab.snapshots.insert(number, Snapshot { order, views });
            }
            Some(ContentPhase::Failed) => {}
            other => panic!("{other:?}: {:?}", status.conditions),
        }
        // One that was Ready before the VM was restarted wrongly is lost, as its owner was told.
        if restarted && lab.snapshots.contains_key(&number) && current(&lab, Base::Raw) == layer(&lab, Base::Raw) {
            let order = lab.snapshots.remove(&number).unwrap().order;
            let deletion = lab.sessions.delete(&order).await.unwrap();
            if !deletion.over {
                std::fs::remove_file(layer(&lab, Base::Raw)).unwrap();
                lab.delete_order(&order).await;
            }
        }
        check(&mut lab, Base::Raw).await;
        if lab.snapshots.contains_key(&number) {
            lab.delete(number).await;
            check(&mut lab, Base::Raw).await;
        }
        polls += 1;
    }
    println!("{polls} points");
}

/// Deletions that are cut off: the first, a middle and the last snapshot in turn.
#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_cut_off_anywhere_harms_nothing_and_can_be_finished() {
    let base = Base::Raw;
    let mut lab = lab(base).await;
    let mut polls = 1;
    let mut whole = 0;
    let mut taken = vec![];
    while whole < 6 {
        while taken.len() < 1 + polls % 3 {
            taken.push(lab.take().await);
            check(&mut lab, base).await;
        }
        let at = (polls / 2) % taken.len();
        let order = lab.snapshots[&taken[at]].order.clone();
        let deletion = cut_off(Box::pin(lab.sessions.delete(&order)), polls).await;
        whole += usize::from(deletion.is_some());
        println!("polls {polls} at {at} of {} done {}", taken.len(), deletion.is_some());
        if polls % 4 == 1 {
            lab.write().await;
        }
        if polls % 4 != 3 {
            lab.machine.kill();
            let now = current(&lab, base);
            lab.machine.set_drives(&[drive(&now)]);
        }
        if polls % 4 < 2 {
            lab.machine.start().await;
        }
        if lab.machine.is_running() {
            lab.write().await;
        }
        lab.delete(taken.remove(at)).await;
        check(&mut lab, base).await;
        follow(&mut lab, base).await;
        lab.write().await;
        polls += 1;
    }
    println!("{polls} points");
}

/// QEMU named the nodes of a `-drive` itself, so nothing is written to its image while it runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_a_legacy_drive_is_deleted_once_the_vm_is_stopped() {
    let directory = TempDir::new().unwrap();
    let image = images(&directory).join("vda.img");
    run("qemu-img", &["create", "-q", "-f", "raw", path(&image), &(REGION * REGIONS as u64).to_string()]);
    let legacy = format!("if=none,id=drive-vda,file={},format=raw", image.display());
    let arguments = vec!["-drive".into(), legacy];
    let legacy = Drive { id: "vda".into(), image, arguments, device: "drive=drive-vda".into() };
    let mut lab = Lab::start(directory, &[], vec![legacy]).await;
    lab.parameters.insert("follow".into(), "true".into());
    let (first, second) = (lab.take().await, lab.take().await);
    check(&mut lab, Base::Raw).await;
    let order = lab.snapshots[&first].order.clone();
    let deletion = lab.sessions.delete(&order).await.unwrap();
    assert!(!deletion.over);
    assert!(find(&deletion.status.conditions, types::REMOVED).unwrap().message.contains("stopped"));
    check(&mut lab, Base::Raw).await;
    lab.machine.kill();
    for number in [first, second] {
        lab.delete(number).await;
        check(&mut lab, Base::Raw).await;
    }
    lab.machine.start().await;
    check(&mut lab, Base::Raw).await;
}

/// While it runs, while it is stopped, and restarted as its owner is told.
#[tokio::test(flavor = "multi_thread")]
async fn snapshots_of_a_block_device_are_deleted_in_every_order() {
    let base = Base::Device;
    let (mut lab, _device) = lab_on_device().await;
    for (number, order) in orders(&[0, 1, 2]).into_iter().enumerate() {
        println!("{order:?}");
        let mut taken = vec![];
        for at in 0..3 {
            if number & (1 << at) != 0 {
                follow(&mut lab, base).await;
            }
            taken.push(lab.take().await);
            check(&mut lab, base).await;
        }
        for (step, at) in order.into_iter().enumerate() {
            match (number + step) % 3 {
                0 => lab.machine.kill(),
                1 => follow(&mut lab, base).await,
                _ => {}
            }
            lab.delete(taken[at]).await;
            check(&mut lab, base).await;
            if lab.machine.is_running() {
                lab.write().await;
            } else {
                follow(&mut lab, base).await;
            }
        }
        follow(&mut lab, base).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_vm_on_a_block_device_is_found_by_the_records_of_its_snapshots() {
    let base = Base::Device;
    let (mut lab, device) = lab_on_device().await;
    write_target_file(&lab, &device.0);
    lab.machine.kill();
    for _ in 0..2 {
        let (number, order) = lab.order();
        let status = lab.advance(&order).await;
        assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
        let views = lab.views();
        lab.snapshots.insert(number, Snapshot { order, views });
        check(&mut lab, base).await;
        follow(&mut lab, base).await;
        lab.write().await;
        lab.machine.kill();
    }
    for number in [2, 1] {
        lab.delete(number).await;
        check(&mut lab, base).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_device_is_refused_without_a_directory_for_its_layer_or_with_one_elsewhere() {
    let (mut lab, _device) = lab_on_device().await;
    lab.parameters.insert("directory".into(), "/tmp".into());
    let (_, order) = lab.order();
    let status = lab.advance(&order).await;
    assert_eq!(find(&status.conditions, types::READY).unwrap().reason, reasons::INVALID_PARAMETER);
    lab.parameters.remove("directory");
    let (_, order) = lab.order();
    let status = lab.advance(&order).await;
    let accepted = find(&status.conditions, types::ACCEPTED).unwrap();
    assert_eq!(accepted.reason, reasons::DISK_NOT_SUPPORTED);
    assert!(accepted.message.contains("`directory`"), "{}", accepted.message);
    check(&mut lab, Base::Device).await;
}

/// Deletes a snapshot, which must be refused now.
async fn refused(lab: &Lab, snapshot: u32) -> String {
    let deletion = Box::pin(lab.sessions.delete(&lab.snapshots[&snapshot].order)).await.unwrap();
    assert!(!deletion.over, "{:?}", deletion.status.conditions);
    find(&deletion.status.conditions, types::REMOVED).unwrap().message.clone()
}

/// Takes a disk from the running VM, whose guest has no say: a reset unplugs what is waiting for it.
async fn unplug(lab: &Lab) {
    lab.machine.execute("device_del", json!({"id": "vda"})).await;
    lab.machine.execute("system_reset", json!({})).await;
    let end = tokio::time::Instant::now() + Duration::from_secs(10);
    while !lab.machine.graph().await.disks().is_empty() {
        assert!(tokio::time::Instant::now() < end, "never unplugged");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_layer_of_a_disk_that_was_unplugged_keeps_what_was_written_since_the_snapshot() {
    for base in [Base::Raw, Base::Qed] {
        let mut lab = lab(base).await;
        let taken = lab.take().await;
        unplug(&lab).await;
        println!("{}", refused(&lab, taken).await);
        assert_eq!(view(&layer(&lab, base)), lab.disks[0].now, "the disk's newest data");
        lab.machine.kill();
        check(&mut lab, base).await;
        lab.delete(taken).await;
        check(&mut lab, base).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_layer_is_not_unlinked_over_one_that_has_data() {
    let base = Base::Raw;
    let mut lab = lab(base).await;
    write_target_file(&lab, &base.image(&lab));
    let first = lab.take().await;
    lab.machine.kill();
    let (second, order) = lab.order();
    assert_eq!(lab.advance(&order).await.phase, Some(ContentPhase::Ready));
    let views = lab.views();
    lab.snapshots.insert(second, Snapshot { order, views: views.clone() });
    // With its old command line.
    lab.machine.start().await;
    for snapshot in [first, second, first] {
        println!("{}", refused(&lab, snapshot).await);
        assert_eq!(view(&layer(&lab, base)), views[0], "the disk's newest data");
    }
}

/// Deletes a snapshot until its merge has written, and then makes way.
async fn give_up_half_way(lab: &Lab, snapshot: u32, written: &Path) {
    let (locks, order) = (VmLocks::default(), &lab.snapshots[&snapshot].order);
    let before = std::fs::metadata(written).unwrap().modified().unwrap();
    let waiting = locks.waiting(&order.vm);
    let turn = locks.turn(&order.vm).await;
    let delete = async {
        let deletion = Box::pin(lab.sessions.delete_unless_waiting(order, &waiting)).await.unwrap();
        assert!(!deletion.over, "the merge didn't make way");
        drop(turn);
    };
    let ask = async {
        while std::fs::metadata(written).unwrap().modified().unwrap() == before {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        drop(locks.turn_of_snapshot(&order.vm).await);
    };
    tokio::time::timeout(Duration::from_secs(20), async { tokio::join!(delete, ask) }).await.expect("no merge writes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_that_is_given_up_half_way_leaves_a_disk_that_is_snapshotted_running_or_not() {
    let base = Base::Raw;
    for running in [true, false] {
        let mut lab = lab(base).await;
        write_target_file(&lab, &base.image(&lab));
        lab.limits.merge_speed = Some((4 * REGION).to_string());
        let taken = lab.take().await;
        give_up_half_way(&lab, taken, &base.image(&lab)).await;
        if running {
            // As a merge leaves it that is under way.
            let image = std::fs::File::options().write(true).open(base.image(&lab)).unwrap();
            image.set_modified(std::time::SystemTime::now()).unwrap();
        } else {
            lab.machine.kill();
        }
        let (_, order) = lab.order();
        let status = lab.advance(&order).await;
        assert_eq!(status.phase, Some(ContentPhase::Ready), "running {running}: {:?}", status.conditions);
        for order in [&lab.snapshots[&taken].order, &order] {
            lab.delete_order(order).await;
        }
        lab.snapshots.remove(&taken);
        check(&mut lab, base).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_that_was_begun_merges_nothing_over_what_a_vm_started_wrongly_wrote() {
    let base = Base::Raw;
    let mut lab = lab(base).await;
    let taken = lab.take().await;
    let order = lab.snapshots[&taken].order.clone();
    let is_begun = || lab.sessions.journal.load(&order.uid).unwrap().unwrap().tasks[0].state["begun"] == true;
    let mut polls = 1;
    while !is_begun() {
        assert!(cut_off(Box::pin(lab.sessions.delete(&order)), polls).await.is_none(), "never begun");
        polls += 1;
    }
    let left = std::fs::read(layer(&lab, base)).unwrap();
    start_with_old_command_line(&mut lab, base, taken).await;
    refused(&lab, taken).await;
    lab.machine.kill();
    refused(&lab, taken).await;
    assert_eq!(view(&base.image(&lab)), lab.disks[0].now, "the VM's disk was touched");
    assert_eq!(std::fs::read(layer(&lab, base)).unwrap(), left, "the layer was touched");
    // Its owner thinks better of it: what the layer has goes with what is below it.
    lab.machine.set_drives(&[drive(&layer(&lab, base))]);
    lab.machine.start().await;
    lab.disks[0].now = view(&layer(&lab, base));
    lab.delete(taken).await;
    check(&mut lab, base).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_snapshot_over_an_image_that_was_written_to_is_overwritten() {
    for base in [Base::Raw, Base::Qed] {
        let mut lab = lab(base).await;
        let taken = [lab.take().await, lab.take().await, lab.take().await];
        let told = |lab: &Lab| {
            taken.map(|number| {
                let record = lab.sessions.journal.load(&lab.snapshots[&number].order.uid).unwrap().unwrap();
                lab.sessions.overwritten(&record.tasks[0]).unwrap()
            })
        };
        assert_eq!(told(&lab), [None, None, None]);
        start_with_old_command_line(&mut lab, base, taken[0]).await;
        let image = base.image(&lab);
        assert!(told(&lab).iter().flatten().filter(|why| why.contains(path(&image))).count() == taken.len());
    }
}
