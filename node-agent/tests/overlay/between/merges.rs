//! Merges that were cut off.

use freezeframe_api::conditions::{find, types};
use freezeframe_node_agent::locks::VmLocks;
use serde_json::json;

use super::{backing, begun, cut_at, name};
use crate::machine::{path, run, view};
use crate::shapes::{Shape, lab};
use crate::stopped;

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_is_started_before_a_merge_of_its_images_is_gone_on_with_reads_all_of_them() {
    for point in ["merge-written-out", "merge-concluded"] {
        println!("{point}");
        let mut lab = stopped::stopped(Shape::Blockdev, 1).await;
        lab.machine.start().await;
        let (lower, upper) = (lab.take().await, lab.take().await);
        lab.machine.kill();
        let victim = lab.snapshots.remove(&lower).unwrap().order;
        let merged = lab.handles_of(&victim).remove(0);
        cut_at(point, Box::pin(lab.sessions.delete(&victim))).await;
        // Its daemon, and what that had in memory, ended with it.
        stopped::await_unlocked(&lab).await;
        let is_done = point == "merge-concluded";
        assert_eq!(backing(&lab.disks[0].image) == name(&merged), is_done);
        lab.check_views();
        lab.machine.start().await;
        lab.write().await;
        lab.check_views();
        lab.delete_order(&victim).await;
        lab.check().await;
        lab.delete(upper).await;
        lab.check().await;
    }
}

/// QEMU dies once it has rewritten the header above, and before it does anything else.
async fn has_all_on_disk_before_the_header(shape: Shape, started_anew: bool) {
    println!("{shape:?}, started anew: {started_anew}");
    let mut lab = lab(shape, 1).await;
    let (lower, upper) = (lab.take().await, lab.take().await);
    if started_anew {
        lab.restart().await;
    }
    let victim = lab.snapshots.remove(&lower).unwrap().order;
    let merged = lab.handles_of(&victim).remove(0);
    cut_at("merge-written-out", Box::pin(lab.sessions.delete(&victim))).await;
    let jobs = lab.machine.execute("query-jobs", json!({})).await;
    assert_eq!(jobs[0]["status"], "pending", "{jobs}");
    lab.machine.kill();
    let disk = lab.disks[0].image.clone();
    assert_eq!(backing(&disk), name(&lab.handles(upper)[0]), "the header is rewritten before the last step");
    lab.check_views();
    run("qemu-img", &["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", name(&merged), path(&disk)]);
    lab.check_views();
    lab.machine.start().await;
    lab.write().await;
    lab.check_views();
    lab.delete_order(&victim).await;
    lab.check().await;
    lab.delete(upper).await;
    if started_anew {
        lab.restart().await;
    }
    lab.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_merged_below_a_running_disk_is_on_disk_before_the_header_says_so() {
    for shape in [Shape::Blockdev, Shape::Direct, Shape::Iothreads, Shape::Inline] {
        Box::pin(has_all_on_disk_before_the_header(shape, false)).await;
    }
}

/// QEMU opened the images below the disk's own by their names, and named their nodes itself.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_merged_into_an_image_that_qemu_named_itself_is_on_disk_before_the_header_says_so() {
    for shape in [Shape::Blockdev, Shape::Iothreads, Shape::Legacy] {
        Box::pin(has_all_on_disk_before_the_header(shape, true)).await;
    }
}

/// A merge that the agent left waiting for its last step is finished, or makes way for a snapshot.
#[tokio::test(flavor = "multi_thread")]
async fn a_merge_that_waits_for_its_last_step_is_finished_or_makes_way() {
    for makes_way in [false, true] {
        let mut lab = lab(Shape::Blockdev, 1).await;
        let lower = lab.take().await;
        lab.take().await;
        let victim = lab.order_of(lower);
        cut_at("merge-written-out", Box::pin(lab.sessions.delete(&victim))).await;
        lab.write().await;
        if makes_way {
            lab.take().await;
        }
        lab.delete(lower).await;
        lab.check().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_that_was_begun_for_a_disk_that_its_owner_deleted_stands_in_no_ones_way() {
    for running in [false, true] {
        println!("another disk's VM runs: {running}");
        let mut lab = lab(Shape::Blockdev, 1).await;
        let (lower, upper) = (lab.take().await, lab.take().await);
        lab.machine.kill();
        begun(&lab, &lab.order_of(lower)).await;
        std::fs::remove_file(&lab.disks[0].image).unwrap();
        if running {
            lab.machine.set_drives(&[]);
            lab.machine.start().await;
        }
        let left = lab.sessions.delete(&lab.order_of(lower)).await.unwrap();
        let why = &find(&left.status.conditions, types::REMOVED).unwrap().message;
        assert!(!left.over && why.contains("need"), "{why}");
        assert_eq!(view(&lab.handles(upper)[0]), lab.snapshots[&upper].views[0]);
        lab.delete(upper).await;
        lab.delete(lower).await;
        assert_eq!(std::fs::read_dir(lab.images()).unwrap().count(), 0);
    }
}

/// What a comparison finds is looked at by [`crate::crashes`].
#[tokio::test(flavor = "multi_thread")]
async fn a_merge_whose_end_nobody_saw_is_compared_after_a_snapshot_that_waits() {
    let mut lab = lab(Shape::Blockdev, 1).await;
    let (lower, _) = (lab.take().await, lab.take().await);
    lab.machine.kill();
    let order = lab.order_of(lower);
    cut_at("merge-concluded", Box::pin(lab.sessions.delete(&order))).await;
    stopped::await_unlocked(&lab).await;
    let (locks, vm) = (VmLocks::default(), order.vm.clone());
    let turn = locks.turn_after_snapshots(&vm).await;
    let snapshot = tokio::spawn({
        let (locks, vm) = (locks.clone(), vm.clone());
        async move { drop(locks.turn_of_snapshot(&vm).await) }
    });
    locks.waiting(&vm).for_snapshot().await;
    let deletion = lab.sessions.delete_unless_waiting(&order, &locks.waiting(&vm)).await.unwrap();
    assert!(!deletion.over, "it kept the VM's turn to the end");
    drop(turn);
    snapshot.await.unwrap();
    lab.delete(lower).await;
    lab.check().await;
}
