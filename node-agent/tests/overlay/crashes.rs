//! An agent that dies at any await, and a QEMU that dies with it.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use freezeframe_api::v1alpha1::{ContentPhase, DeletionPolicy};
use serde_json::json;
use tokio::time::{Instant, sleep};

use crate::lab::{Lab, Snapshot, Wanted};
use crate::shapes::{Shape, lab};

/// Drops `work` at its `polls`th await that had to wait, as a crash would; what it came to if it was done before.
pub async fn cut_off<T>(work: impl Future<Output = T>, polls: usize) -> Option<T> {
    let mut work = pin!(work);
    let mut left = polls;
    poll_fn(|context| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        work.as_mut().poll(context).map(Some)
    })
    .await
}

/// Takes snapshots whose agent dies at every point in turn, until one is whole; QEMU dies too at every second one. Each
/// ends ready, and is deleted, or leaves nothing.
pub async fn take_cut_off_anywhere(lab: &mut Lab) {
    let mut whole = false;
    let mut polls: usize = 1;
    while !whole {
        lab.write().await;
        let (number, order) = lab.order();
        whole = cut_off(Box::pin(lab.sessions.advance(&order, &Wanted)), polls).await.is_some();
        if polls.is_multiple_of(2) {
            lab.restart().await;
        }
        println!("polls {polls}");
        lab.write().await;
        // What was cut is of before the last write, and only what became Ready must read so.
        let status = lab.advance(&order).await;
        assert!(matches!(status.phase, Some(ContentPhase::Ready | ContentPhase::Failed)), "{status:?}");
        if status.phase == Some(ContentPhase::Ready) {
            let views = lab.handles_of(&order).iter().map(|image| crate::machine::view(image)).collect();
            lab.snapshots.insert(number, Snapshot { order, views });
        }
        lab.check().await;
        lab.write().await;
        if lab.snapshots.contains_key(&number) {
            lab.delete(number).await;
            lab.check().await;
        }
        polls += 1;
    }
    println!("{polls} points");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_cut_off_anywhere_ends_ready_or_leaves_nothing() {
    let mut lab = lab(Shape::Blockdev, 2).await;
    let old = lab.take().await;
    take_cut_off_anywhere(&mut lab).await;
    lab.delete(old).await;
    lab.check().await;
}

/// Deletions that are cut off: the first, a middle and the last snapshot in turn.
#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_cut_off_anywhere_harms_nothing_and_can_be_finished() {
    let mut lab = lab(Shape::Blockdev, 1).await;
    let mut polls = 1;
    let mut whole = 0;
    let mut taken = vec![lab.take().await, lab.take().await, lab.take().await];
    while whole < 6 {
        let at = polls % 3;
        let order = lab.snapshots[&taken[at]].order.clone();
        let deletion = cut_off(Box::pin(lab.sessions.delete(&order)), polls).await;
        whole += usize::from(deletion.is_some());
        println!("polls {polls} at {at} done {}", deletion.is_some());
        match polls % 4 {
            0 => lab.restart().await,
            1 => {
                lab.write().await;
                lab.restart().await;
            }
            2 => lab.machine.kill(),
            _ => lab.write().await,
        }
        lab.delete(taken.remove(at)).await;
        lab.check().await;
        if !lab.machine.is_running() {
            lab.machine.start().await;
            lab.check().await;
        }
        taken.push(lab.take().await);
        lab.check().await;
        polls += 1;
    }
    println!("{polls} points");
}

/// The data of the snapshot above has moved down, but its record doesn't say so yet.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_whose_data_moved_before_a_crash_is_deleted_where_it_is() {
    let mut lab = lab(Shape::Blockdev, 1).await;
    let mut seen = false;
    for polls in 1.. {
        let (lower, upper) = (lab.take().await, lab.take().await);
        let order = lab.snapshots[&lower].order.clone();
        let whole = cut_off(Box::pin(lab.sessions.delete(&order)), polls).await.is_some();
        let record = lab.sessions.journal.load(&order.uid).unwrap().unwrap();
        seen |= !whole && record.tasks[0].state["merging"]["done"] == true;
        lab.delete(upper).await;
        lab.delete(lower).await;
        lab.check().await;
        if whole {
            break;
        }
    }
    assert!(seen, "no crash came between the merge and the record of it");
}

/// The user is told where a retained file is, and after that it stays there.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_whose_data_moved_before_a_crash_is_retained_where_it_stays() {
    let mut lab = lab(Shape::Blockdev, 1).await;
    let (mut polls, mut misses) = (20, 0);
    let (lower, mut upper) = loop {
        let (lower, upper) = (lab.take().await, lab.take().await);
        let order = lab.snapshots[&lower].order.clone();
        if cut_off(Box::pin(lab.sessions.delete(&order)), polls).await.is_some() {
            // How often a job is waited for differs: the moment was missed.
            misses += 1;
            assert!(misses < 10, "no crash came between the merge and the record of it");
            lab.snapshots.remove(&lower);
            lab.delete(upper).await;
            polls -= 8;
            continue;
        }
        if lab.sessions.journal.load(&order.uid).unwrap().unwrap().tasks[0].state["merging"]["done"] == true {
            break (order, lab.snapshots.remove(&upper).unwrap());
        }
        lab.delete(upper).await;
        lab.delete(lower).await;
        polls += 1;
    };
    upper.order.deletion_policy = DeletionPolicy::Retain;
    lab.delete_order(&upper.order).await;
    let told = lab.handles_of(&upper.order).remove(0);
    lab.delete_order(&lower).await;
    assert_eq!(lab.handles_of(&upper.order), vec![told.clone()]);
    assert_eq!(crate::machine::view(&told), upper.views[0]);
}

/// What a stream writes to the layer that the VM runs on is in QEMU's memory until somebody has it flushed, and its
/// header, which then no longer names the snapshot's file, is not.
#[tokio::test(flavor = "multi_thread")]
async fn a_legacy_disk_keeps_all_data_when_qemu_dies_around_the_deletion_of_its_newest_snapshot() {
    let mut lab = lab(Shape::Legacy, 1).await;
    for polls in (1..).step_by(3) {
        let taken = lab.take().await;
        let order = lab.snapshots[&taken].order.clone();
        let whole = cut_off(Box::pin(lab.sessions.delete(&order)), polls).await.is_some();
        lab.machine.kill();
        assert_eq!(crate::machine::view(&lab.disks[0].image), lab.disks[0].now, "cut off at await {polls}");
        lab.machine.start().await;
        if whole {
            println!("{polls} points");
            break;
        }
        lab.delete(taken).await;
        // What was merged into a disk that QEMU named itself can be cut again when it is started anew.
        lab.restart().await;
        lab.check().await;
    }
}

/// A merge of the disk's own layer that was cancelled leaves an image that QEMU opened by itself writable, and what is
/// merged into it next would be in QEMU's memory alone: it is made read-only first.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_in_a_base_that_a_cancelled_merge_left_writable() {
    let mut lab = lab(Shape::Legacy, 1).await;
    let lower = lab.take().await;
    lab.restart().await;
    let graph = lab.machine.graph().await;
    let root = graph.disks()[0].root.clone().unwrap();
    let chain: Vec<_> = graph.chain(&root).iter().map(|node| node.name.clone()).collect();
    let merge = json!({"job-id": "cancelled", "device": root, "top-node": chain[0], "base-node": chain[1]});
    lab.machine.execute("block-commit", merge).await;
    until(async || lab.machine.execute("query-jobs", json!({})).await[0]["status"] == "ready").await;
    lab.machine.execute("block-job-cancel", json!({"device": "cancelled", "force": true})).await;
    until(async || lab.machine.execute("query-jobs", json!({})).await == json!([])).await;
    assert!(!lab.machine.graph().await.node(&chain[1]).unwrap().read_only, "this QEMU leaves no base writable");
    lab.take().await;
    lab.delete(lower).await;
    lab.machine.kill();
    assert_eq!(crate::machine::view(&lab.disks[0].image), lab.disks[0].now);
    lab.check().await;
    lab.machine.start().await;
    lab.check().await;
}

async fn until(mut holds: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !holds().await {
        assert!(Instant::now() < end, "it never comes to pass");
        sleep(Duration::from_millis(20)).await;
    }
}

/// QEMU, or the host, dies after a merge has rewritten the header above and before what it merged is on disk.
#[tokio::test(flavor = "multi_thread")]
async fn a_merge_whose_data_was_lost_is_done_once_more_before_its_source_goes() {
    let mut lab = lab(Shape::Blockdev, 1).await;
    let (lower, upper) = (lab.take().await, lab.take().await);
    lab.machine.kill();
    let order = lab.snapshots[&lower].order.clone();
    for polls in 1.. {
        assert!(
            cut_off(Box::pin(lab.sessions.delete(&order)), polls).await.is_none(),
            "no crash came before the merge"
        );
        let record = lab.sessions.journal.load(&order.uid).unwrap().unwrap();
        if record.tasks[0].state["merging"].is_object() {
            break;
        }
    }
    let (merged, disk) = (lab.handles(lower).remove(0), lab.disks[0].image.clone());
    let name = merged.file_name().unwrap();
    let rebased = std::process::Command::new("qemu-img")
        .args(["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b"])
        .args([name, disk.as_os_str()])
        .status();
    assert!(rebased.unwrap().success());
    lab.delete(lower).await;
    lab.check().await;
    lab.machine.start().await;
    lab.delete(upper).await;
    lab.check().await;
}
