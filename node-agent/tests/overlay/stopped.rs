//! Snapshots of a VM that doesn't run, and the VM started with its old command line after them.

use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::{ConsistencyLevel, ContentPhase};
use serde_json::json;
use tokio::time::{Duration, Instant, sleep};

use crate::crashes::cut_off;
use crate::lab::{Disk, Lab, Snapshot, Wanted};
use crate::machine::{path, view};
use crate::shapes::{Shape, lab};

/// A VM that is stopped, with a file that names its disks.
pub async fn stopped(shape: Shape, disks: usize) -> Lab {
    let mut lab = lab(shape, disks).await;
    let disk = |disk: &Disk| json!({"name": disk.id, "path": disk.image, "format": "qcow2"});
    let disks: Vec<_> = lab.disks.iter().map(disk).collect();
    // JSON is YAML.
    std::fs::write(lab.sessions.vm_root.join("shop/db/target.yaml"), json!({"disks": disks}).to_string()).unwrap();
    lab.machine.kill();
    lab
}

/// Takes a snapshot while the VM is stopped.
async fn take(lab: &mut Lab) -> u32 {
    let (number, order) = lab.order();
    let status = lab.advance(&order).await;
    assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
    assert_eq!(status.consistency.unwrap().level, ConsistencyLevel::Crash);
    let views = lab.views();
    lab.snapshots.insert(number, Snapshot { order, views });
    lab.check().await;
    number
}

async fn start(lab: &mut Lab) {
    lab.machine.start().await;
    lab.check().await;
    lab.write().await;
    lab.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_vm_is_snapshotted_and_starts_with_its_old_command_line() {
    for shape in [Shape::Blockdev, Shape::Backed, Shape::Legacy] {
        println!("{shape:?}");
        let mut lab = stopped(shape, 2).await;
        let (a, b) = (take(&mut lab).await, take(&mut lab).await);
        start(&mut lab).await;
        let c = lab.take().await;
        lab.machine.kill();
        let d = take(&mut lab).await;
        for number in [b, d] {
            lab.delete(number).await;
            lab.check().await;
        }
        start(&mut lab).await;
        for number in [a, c] {
            lab.delete(number).await;
            lab.check().await;
        }
        lab.restart().await;
        lab.check().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_of_a_stopped_vm_are_deleted_in_any_order_before_and_after_its_start() {
    let mut lab = stopped(Shape::Blockdev, 1).await;
    for (number, order) in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]].into_iter().enumerate() {
        println!("order {order:?}");
        let taken = [take(&mut lab).await, take(&mut lab).await, take(&mut lab).await];
        for (gone, at) in order.into_iter().enumerate() {
            if gone == number % 3 {
                start(&mut lab).await;
            }
            lab.delete(taken[at]).await;
            lab.check().await;
        }
        lab.machine.kill();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_somebody_has_open_refuses_the_snapshot_and_stays_as_it_is() {
    let mut lab = stopped(Shape::Blockdev, 2).await;
    lab.machine.start().await;
    // Its monitor can't be found any more, but its locks are there.
    std::fs::remove_file(lab.sessions.vm_root.join("shop/db/qmp.sock")).unwrap();
    let (_, order) = lab.order();
    let status = lab.advance(&order).await;
    let accepted = find(&status.conditions, types::ACCEPTED).unwrap();
    assert_eq!((accepted.status.as_str(), accepted.reason.as_str()), ("False", reasons::VM_BUSY), "{accepted:?}");
    assert!(accepted.message.contains("lock"), "{}", accepted.message);
    lab.write().await;
    lab.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_freeze_to_give_up_a_stopped_vm_is_refused_in_words() {
    let mut lab = stopped(Shape::Blockdev, 1).await;
    let (_, mut order) = lab.order();
    order.required = ConsistencyLevel::Filesystem;
    let status = lab.advance(&order).await;
    let accepted = find(&status.conditions, types::ACCEPTED).unwrap();
    assert_eq!(accepted.reason, reasons::VM_NOT_RUNNING);
    assert!(accepted.message.contains("Degrade"), "{}", accepted.message);
    let (_, order) = lab.order();
    let image = lab.disks[0].image.clone();
    let elsewhere = image.with_extension("away");
    std::fs::rename(&image, &elsewhere).unwrap();
    let status = lab.advance(&order).await;
    std::fs::rename(&elsewhere, &image).unwrap();
    let accepted = find(&status.conditions, types::ACCEPTED).unwrap();
    assert_eq!(accepted.reason, reasons::DISK_NOT_FOUND);
    assert!(accepted.message.contains(path(&image)), "{}", accepted.message);
    lab.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_of_a_disk_that_its_owner_deleted_can_be_deleted_newest_first() {
    let mut lab = lab(Shape::Blockdev, 1).await;
    let (lower, upper) = (lab.take().await, lab.take().await);
    lab.machine.kill();
    std::fs::remove_file(&lab.disks[0].image).unwrap();
    let order = lab.snapshots[&lower].order.clone();
    assert!(!lab.sessions.delete(&order).await.unwrap().over, "the upper one needs it");
    lab.delete(upper).await;
    lab.delete(lower).await;
    assert_eq!(std::fs::read_dir(lab.images()).unwrap().count(), 0);
}

/// The QEMU that had the disks of a session that died ends a moment after it.
pub async fn await_unlocked(lab: &Lab) {
    let end = Instant::now() + Duration::from_secs(10);
    let locked = |image| {
        let info = std::process::Command::new("qemu-img").args(["info", "-f", "qcow2", path(image)]).output();
        !info.unwrap().status.success()
    };
    while lab.disks.iter().any(|disk| locked(&disk.image)) {
        assert!(Instant::now() < end, "an image stays locked");
        sleep(Duration::from_millis(20)).await;
    }
}

/// The agent dies at every point in turn. At every second one the VM is started before the agent is.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_a_stopped_vm_cut_off_anywhere_ends_ready_or_leaves_nothing() {
    let mut lab = stopped(Shape::Blockdev, 2).await;
    let old = take(&mut lab).await;
    let mut whole = false;
    let mut polls: usize = 1;
    while !whole {
        println!("polls {polls}");
        let (number, order) = lab.order();
        let views = lab.views();
        whole = cut_off(Box::pin(lab.sessions.advance(&order, &Wanted)), polls).await.is_some();
        await_unlocked(&lab).await;
        if polls.is_multiple_of(2) {
            lab.machine.start().await;
            lab.write().await;
        }
        // One that wasn't begun begins now.
        let begun = lab.sessions.journal.load(&order.uid).unwrap().is_some();
        let views = if begun { views } else { lab.views() };
        let status = lab.advance(&order).await;
        assert!(matches!(status.phase, Some(ContentPhase::Ready | ContentPhase::Failed)), "{status:?}");
        if status.phase == Some(ContentPhase::Ready) {
            for (image, wanted) in lab.handles_of(&order).iter().zip(&views) {
                assert_eq!(view(image), *wanted);
            }
            lab.snapshots.insert(number, Snapshot { order, views });
        }
        lab.check().await;
        if lab.snapshots.contains_key(&number) {
            lab.delete(number).await;
            lab.check().await;
        }
        if lab.machine.is_running() {
            lab.machine.kill();
        }
        // Where a run needs many polls, not each of them: a prime, so that both kinds are met everywhere.
        polls += 3;
    }
    lab.delete(old).await;
    start(&mut lab).await;
    println!("{polls} points");
}
