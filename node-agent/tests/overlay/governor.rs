//! Chains that are deeper than the class wants: what is left out, what is written, and what happens in between.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use freezeframe_api::v1alpha1::{DeletionPolicy, DiskSnapshotState, Limits};
use freezeframe_node_agent::drivers::DriverError;
use freezeframe_node_agent::locks::{VmLocks, Waiting};
use freezeframe_node_agent::session::shortening::{Depth, ShorteningError};

use serde_json::json;

use crate::crashes::cut_off;
use crate::lab::{Disk, Lab};
use crate::machine::REGION;
use crate::shapes::{Shape, lab};

async fn limited(shape: Shape, disks: usize, deepest: i32) -> Lab {
    let mut lab = lab(shape, disks).await;
    lab.limits = Limits { max_chain_depth: Some(deepest), ..Limits::default() };
    lab
}

impl Lab {
    /// Deletes a snapshot, but not its files.
    pub async fn retain(&self, number: u32) {
        let mut order = self.snapshots[&number].order.clone();
        order.deletion_policy = DeletionPolicy::Retain;
        self.delete_order(&order).await;
    }

    /// However slow its snapshots' classes want it.
    async fn shorten_fast(&self) {
        for snapshot in self.snapshots.values() {
            let mut record = self.sessions.journal.load(&snapshot.order.uid).unwrap().unwrap();
            record.order.limits.merge_speed = None;
            self.sessions.journal.save(&record).unwrap();
        }
        assert_eq!(self.shorten().await.unwrap(), Depth::Enough);
    }

    pub async fn shorten(&self) -> Result<Depth, ShorteningError> {
        let vm = self.snapshots.values().next().unwrap().order.vm.clone();
        Box::pin(self.sessions.shorten(&vm, &Waiting::default())).await
    }
}

fn bytes(files: &[std::path::PathBuf]) -> Vec<Vec<u8>> {
    files.iter().map(|file| std::fs::read(file).unwrap()).collect()
}

/// Of four snapshots the second was retained: then it goes out of the chain, and what it needs stays.
async fn a_retained_image_goes_out_of_the_chain(shape: Shape) {
    let backed = i32::from(shape == Shape::Backed);
    let mut lab = limited(shape, 2, 3 + backed).await;
    let taken = [lab.take().await, lab.take().await, lab.take().await, lab.take().await];
    lab.retain(taken[1]).await;
    let retained = bytes(&lab.handles(taken[1]));
    assert_eq!(lab.shorten().await.unwrap(), Depth::Enough);
    lab.left_out = 1;
    lab.check().await;
    assert_eq!(bytes(&lab.handles(taken[1])), retained, "a retained file was written");
    lab.write().await;
    lab.check().await;
    // What the retained file needs is kept, and everything else goes.
    let status = lab.delete_order(&lab.snapshots[&taken[0]].order.clone()).await;
    assert!(status.disks.iter().all(|disk| disk.state == DiskSnapshotState::Retained), "{:?}", status.disks);
    lab.check().await;
    lab.delete(taken[2]).await;
    lab.check().await;
    lab.restart().await;
    lab.check().await;
    lab.delete(taken[3]).await;
    lab.check().await;
    assert_eq!(bytes(&lab.handles(taken[1])), retained, "a retained file was written");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retained_image_goes_out_of_a_chain_that_is_too_deep_and_nothing_reads_otherwise() {
    a_retained_image_goes_out_of_the_chain(Shape::Blockdev).await;
    a_retained_image_goes_out_of_the_chain(Shape::Inline).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_throttled_disks_chain_is_shortened_below_its_filter() {
    a_retained_image_goes_out_of_the_chain(Shape::Throttled).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chains_of_disks_on_iothreads_are_shortened() {
    a_retained_image_goes_out_of_the_chain(Shape::Iothreads).await;
    a_retained_image_goes_out_of_the_chain(Shape::InlineIothreads).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_over_a_template_and_one_past_the_page_cache_are_shortened_and_the_template_is_left_alone() {
    a_retained_image_goes_out_of_the_chain(Shape::Direct).await;
    a_retained_image_goes_out_of_the_chain(Shape::Backed).await;
}

/// QEMU opened all but the disk's own image by their names, and named their nodes itself.
async fn a_retained_image_goes_out_of_the_chain_after_a_restart(shape: Shape) {
    println!("{shape:?}");
    let backed = i32::from(shape == Shape::Backed);
    let mut lab = limited(shape, 2, 2 + backed).await;
    let taken = [lab.take().await, lab.take().await, lab.take().await];
    lab.retain(taken[1]).await;
    let retained = bytes(&lab.handles(taken[1]));
    lab.restart().await;
    lab.write().await;
    assert_eq!(lab.shorten().await.unwrap(), Depth::Enough);
    lab.left_out = 1;
    lab.check().await;
    lab.restart().await;
    lab.check().await;
    let last = lab.take().await;
    lab.delete(taken[2]).await;
    lab.check().await;
    lab.restart().await;
    lab.delete(last).await;
    lab.check().await;
    assert_eq!(bytes(&lab.handles(taken[1])), retained, "a retained file was written");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_chain_of_a_vm_that_was_restarted_is_shortened() {
    for shape in [Shape::Blockdev, Shape::Legacy, Shape::Backed, Shape::Direct] {
        a_retained_image_goes_out_of_the_chain_after_a_restart(shape).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_chain_of_a_restarted_vm_with_filters_or_iothreads_is_shortened() {
    for shape in [Shape::Throttled, Shape::Iothreads, Shape::InlineIothreads] {
        a_retained_image_goes_out_of_the_chain_after_a_restart(shape).await;
    }
}

/// What is copied into a layer that QEMU named itself is on disk before the layer's header says so: the agent and QEMU die
/// at every await in turn.
#[tokio::test(flavor = "multi_thread")]
async fn shortening_after_a_restart_that_is_cut_off_anywhere_loses_nothing() {
    let (mut polls, mut whole) = (1, false);
    let mut lab = limited(Shape::Blockdev, 1, 2).await;
    while !whole {
        let taken = [lab.take().await, lab.take().await, lab.take().await];
        lab.retain(taken[1]).await;
        lab.restart().await;
        whole = cut_off(Box::pin(lab.shorten()), polls).await.is_some();
        println!("polls {polls} done {whole}");
        lab.restart().await;
        lab.left_out = 3 - depth_of(&lab).await;
        lab.check().await;
        assert_eq!(lab.shorten().await.unwrap(), Depth::Enough);
        lab.left_out = 1;
        lab.check().await;
        lab = limited(Shape::Blockdev, 1, 2).await;
        polls += 2 + polls / 8;
    }
}

/// With no snapshot above it, the disk's own layer takes what the retained image has.
#[tokio::test(flavor = "multi_thread")]
async fn the_latest_image_that_was_retained_goes_into_the_disks_own() {
    for shape in [Shape::Blockdev, Shape::Throttled, Shape::Iothreads] {
        let mut lab = limited(shape, 1, 1).await;
        let (first, second, third) = (lab.take().await, lab.take().await, lab.take().await);
        lab.retain(second).await;
        lab.retain(third).await;
        let retained = bytes(&[lab.handles(second), lab.handles(third)].concat());
        assert_eq!(lab.shorten().await.unwrap(), Depth::Enough);
        lab.left_out = 2;
        lab.check().await;
        // What was copied is on disk, whatever the guest flushes or doesn't.
        lab.restart().await;
        lab.check().await;
        assert_eq!(bytes(&[lab.handles(second), lab.handles(third)].concat()), retained);
        lab.write().await;
        lab.delete_order(&lab.snapshots[&first].order.clone()).await;
        lab.check().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_stays_as_it_is_where_less_would_be_left_free_than_a_class_wants() {
    let mut lab = limited(Shape::Blockdev, 1, 2).await;
    let taken = [lab.take().await, lab.take().await, lab.take().await];
    lab.retain(taken[1]).await;
    // As if the file system had filled up since.
    let mut record = lab.sessions.journal.load(&lab.snapshots[&taken[0]].order.uid).unwrap().unwrap();
    record.order.limits.min_free = Some("100%".into());
    lab.sessions.journal.save(&record).unwrap();
    let Err(ShorteningError::Driver { source, .. }) = lab.shorten().await else { panic!("the chain was shortened") };
    assert!(matches!(*source, DriverError::NoSpace { needed, free, .. } if needed > free), "{source}");
    lab.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_that_snapshots_need_stays_and_it_is_said_which_they_are() {
    let mut lab = limited(Shape::Blockdev, 1, 2).await;
    for _ in 0..4 {
        lab.take().await;
    }
    let Depth::Needed(said) = lab.shorten().await.unwrap() else { panic!("not too deep") };
    assert!(
        said[0].contains("disk vda reads through 4")
            && said[0].contains("snapshot-1, snapshot-2, snapshot-3, snapshot-4"),
        "{said:?}"
    );
    lab.check().await;
    lab.delete(1).await;
    lab.delete(3).await;
    assert_eq!(lab.shorten().await.unwrap(), Depth::Enough);
    lab.check().await;
}

/// The agent dies at every await in turn, QEMU with it at some; a snapshot comes in between at others.
#[tokio::test(flavor = "multi_thread")]
async fn shortening_that_is_cut_off_anywhere_changes_nothing_that_anybody_reads() {
    let mut polls = 1;
    let mut whole = false;
    while !whole {
        let mut lab = limited(Shape::Blockdev, 1, 2).await;
        let taken = [lab.take().await, lab.take().await, lab.take().await];
        lab.retain(taken[1]).await;
        let retained = bytes(&lab.handles(taken[1]));
        whole = cut_off(Box::pin(lab.shorten()), polls).await.is_some();
        println!("polls {polls} done {whole}");
        match polls % 3 {
            // Its nodes are by name then, and stay as they are.
            0 => lab.restart().await,
            1 => drop(lab.take().await),
            _ => lab.write().await,
        }
        let depth = lab.shorten().await.unwrap();
        let chain = depth_of(&lab).await;
        assert!(polls % 3 != 2 || depth == Depth::Enough, "{depth:?}");
        lab.left_out = lab.snapshots.len() - chain;
        lab.check().await;
        assert_eq!(bytes(&lab.handles(taken[1])), retained, "a retained file was written");
        lab.delete(taken[2]).await;
        lab.left_out = lab.snapshots.len() - depth_of(&lab).await;
        lab.check().await;
        polls += 3 + polls / 8;
    }
}

async fn depth_of(lab: &Lab) -> usize {
    let graph = lab.machine.graph().await;
    graph.chain(graph.disks()[0].root.as_deref().unwrap()).len() - 1
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_is_asked_for_while_a_chain_is_shortened_has_its_turn_at_once() {
    let mut lab = limited(Shape::Blockdev, 1, 2).await;
    // Minutes, if it didn't make way.
    lab.limits.merge_speed = Some(REGION.to_string());
    let taken = [lab.take().await, lab.take().await, lab.take().await];
    lab.retain(taken[1]).await;
    let vm = lab.snapshots[&taken[0]].order.vm.clone();
    let locks = VmLocks::default();
    let turn = locks.turn(&vm).await;
    let waiting = locks.waiting(&vm);
    let shortening = async {
        let depth = lab.sessions.shorten(&vm, &waiting).await.unwrap();
        drop(turn);
        depth
    };
    let asked = async {
        until_a_job_runs(&lab).await;
        tokio::time::timeout(Duration::from_secs(10), locks.turn_of_snapshot(&vm)).await.expect("its turn")
    };
    let (depth, turn) = tokio::join!(Box::pin(shortening), asked);
    assert_eq!(depth, Depth::Unseen);
    lab.check().await;
    lab.take().await;
    drop(turn);
    lab.check().await;
    lab.restart().await;
    lab.check().await;
}

async fn until_a_job_runs(lab: &Lab) {
    for _ in 0..1000 {
        let jobs = lab.machine.execute("query-block-jobs", json!({})).await;
        if jobs.as_array().is_some_and(|jobs| !jobs.is_empty()) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("no job");
}

/// A VM that was stopped long ago, with a file that names its disks.
fn stop(lab: &mut Lab) {
    let disk = |disk: &Disk| json!({"name": disk.id, "path": disk.image, "format": "qcow2"});
    let disks: Vec<_> = lab.disks.iter().map(disk).collect();
    lab.machine.kill();
    // JSON is YAML.
    std::fs::write(directory_of(lab).join("target.yaml"), json!({"disks": disks}).to_string()).unwrap();
    let long_ago = SystemTime::now() - Duration::from_secs(3600);
    std::fs::File::open(directory_of(lab)).unwrap().set_modified(long_ago).unwrap();
}

fn directory_of(lab: &Lab) -> PathBuf {
    lab.sessions.vm_root.join("shop/db")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_chain_of_a_stopped_vm_is_shortened() {
    for shape in [Shape::Blockdev, Shape::Legacy, Shape::Backed] {
        println!("{shape:?}");
        let backed = i32::from(shape == Shape::Backed);
        let mut lab = limited(shape, 2, 2 + backed).await;
        let taken = [lab.take().await, lab.take().await, lab.take().await];
        lab.retain(taken[1]).await;
        let retained = bytes(&lab.handles(taken[1]));
        lab.machine.kill();
        // Somebody may be about to start it again.
        assert_eq!(lab.shorten().await.unwrap(), Depth::Unseen);
        stop(&mut lab);
        assert_eq!(lab.shorten().await.unwrap(), Depth::Enough);
        lab.check().await;
        lab.machine.start().await;
        lab.left_out = 1;
        lab.check().await;
        lab.write().await;
        assert_eq!(bytes(&lab.handles(taken[1])), retained, "a retained file was written");
        lab.take().await;
        stop(&mut lab);
        let Depth::Needed(said) = lab.shorten().await.unwrap() else { panic!("not too deep") };
        assert!(said[0].contains("snapshot-1, snapshot-3, snapshot-4"), "{said:?}");
        lab.machine.start().await;
        lab.check().await;
    }
}

/// Nothing that is copied into a disk's own image or a layer below it is lost by ending our QEMU.
#[tokio::test(flavor = "multi_thread")]
async fn the_chain_of_a_stopped_vm_is_left_alone_once_it_is_being_started_or_a_snapshot_is_asked_for() {
    let mut lab = limited(Shape::Blockdev, 1, 1).await;
    lab.limits.merge_speed = Some(REGION.to_string());
    let taken = [lab.take().await, lab.take().await, lab.take().await];
    for number in &taken[1..] {
        lab.retain(*number).await;
    }
    let vm = lab.snapshots[&taken[0]].order.vm.clone();
    let locks = VmLocks::default();
    for snapshot in [true, false] {
        stop(&mut lab);
        let waiting = locks.waiting(&vm);
        let held = locks.turn(&vm).await;
        let shortening = async {
            let depth = lab.sessions.shorten(&vm, &waiting).await.unwrap();
            drop(held);
            depth
        };
        let interrupting = async {
            until_locked(&lab.disks[0].image).await;
            if snapshot {
                drop(locks.turn_of_snapshot(&vm).await);
            } else {
                // As a QEMU does, before it finds that its image is locked.
                std::fs::write(directory_of(&lab).join("its.sock"), "").unwrap();
            }
        };
        let both = async { tokio::join!(Box::pin(shortening), interrupting) };
        let (depth, ()) = tokio::time::timeout(Duration::from_secs(10), both).await.expect("it lets go");
        assert_eq!(depth, Depth::Unseen);
        lab.check().await;
        lab.machine.start().await;
        lab.check().await;
    }
    lab.limits.merge_speed = None;
    lab.shorten_fast().await;
    lab.left_out = 2;
    lab.check().await;
    lab.restart().await;
    lab.check().await;
}

/// The image is open in somebody's QEMU, which has work to do.
async fn until_locked(image: &std::path::Path) {
    for _ in 0..1000 {
        let asked = std::process::Command::new("qemu-img").arg("info").arg(image).output().unwrap();
        if !asked.status.success() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never locked");
}
