//! Merges are slow where the class says so, and make way for a snapshot at once.

use std::time::Duration;

use freezeframe_api::v1alpha1::{ContentPhase, Limits};
use freezeframe_node_agent::hypervisor::VmKey;
use freezeframe_node_agent::locks::VmLocks;
use freezeframe_node_agent::session::order::Order;
use serde_json::json;
use tokio::time::{Instant, sleep};

use crate::lab::{Lab, Snapshot, Wanted};
use crate::machine::{REGION, view};
use crate::shapes::{Shape, lab};

const PATIENCE: Duration = Duration::from_secs(30);

/// So slow that the few regions of a layer take seconds.
fn slowly(lab: &mut Lab) {
    lab.limits = Limits { merge_speed: Some((4 * REGION).to_string()), ..Limits::default() };
}

async fn until_a_job_runs(lab: &Lab) {
    let end = Instant::now() + PATIENCE;
    while lab.machine.execute("query-jobs", json!({})).await == json!([]) {
        assert!(Instant::now() < end, "no merge begins");
        sleep(Duration::from_millis(10)).await;
    }
}

/// Deletes `victim` and asks for a snapshot while it is being merged; both as the controller does it. Returns how long
/// the snapshot waited for its turn.
async fn snapshot_in_the_middle(lab: &Lab, victim: &Order, order: &Order) -> Duration {
    let (locks, vm) = (VmLocks::default(), VmKey { namespace: "shop".into(), name: "db".into() });
    let delete = async {
        let _turn = locks.turn_after_snapshots(&vm).await;
        lab.sessions.delete_unless_waiting(victim, &locks.waiting(&vm)).await.unwrap()
    };
    let snapshot = async {
        until_a_job_runs(lab).await;
        let asked = Instant::now();
        let _turn = locks.turn_of_snapshot(&vm).await;
        (asked.elapsed(), lab.sessions.advance(order, &Wanted).await.unwrap())
    };
    let (deletion, (waited, _)) = tokio::join!(delete, snapshot);
    assert!(!deletion.over, "the merge didn't make way");
    waited
}

async fn makes_way(shape: Shape, at: usize) {
    println!("{shape:?}, snapshot {at}");
    let mut lab = lab(shape, 1).await;
    slowly(&mut lab);
    let taken = [lab.take().await, lab.take().await, lab.take().await];
    makes_way_in(lab, taken[at]).await;
}

async fn makes_way_in(mut lab: Lab, victim: u32) {
    let victim = lab.snapshots.remove(&victim).unwrap().order;
    let (number, order) = lab.order();
    let views = lab.views();
    let waited = Box::pin(snapshot_in_the_middle(&lab, &victim, &order)).await;
    assert!(waited < Duration::from_millis(500), "the snapshot waited for {waited:?}");
    let status = lab.advance(&order).await;
    assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
    lab.snapshots.insert(number, Snapshot { order, views });
    lab.write().await;
    for (number, snapshot) in &lab.snapshots {
        for (handle, wanted) in lab.handles(*number).iter().zip(&snapshot.views) {
            assert_eq!(view(handle), *wanted, "snapshot {number} after a merge that was given up half way");
        }
    }
    let begun = Instant::now();
    lab.delete_order(&victim).await;
    assert!(begun.elapsed() > Duration::from_millis(500), "a merge of some regions at four a second was quick");
    lab.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_of_the_disks_own_layer_makes_way_for_a_snapshot() {
    Box::pin(makes_way(Shape::Blockdev, 2)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_in_the_middle_of_a_chain_makes_way_for_a_snapshot() {
    Box::pin(makes_way(Shape::Iothreads, 1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_upwards_makes_way_for_a_snapshot() {
    Box::pin(makes_way(Shape::Legacy, 2)).await;
}

/// What is merged next into an image that this leaves writable would be in QEMU's memory alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_merge_into_an_image_that_qemu_named_itself_makes_way_for_a_snapshot() {
    let mut lab = lab(Shape::Legacy, 1).await;
    slowly(&mut lab);
    lab.take().await;
    let newest = lab.take().await;
    lab.restart().await;
    Box::pin(makes_way_in(lab, newest)).await;
}

/// QEMU rewrites a header before it writes the tables of what it copied.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_copied_upwards_is_on_disk_before_its_source_goes() {
    let mut lab = lab(Shape::Legacy, 1).await;
    let taken = lab.take().await;
    lab.delete(taken).await;
    lab.restart().await;
    lab.check().await;
}

/// The agent ends while a merge runs.
async fn leave_merging(lab: &Lab, victim: u32) {
    tokio::select! {
        _ = lab.sessions.delete(&lab.snapshots[&victim].order) => panic!("the merge ended too soon"),
        () = until_a_job_runs(lab) => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_that_nobody_waits_for_makes_way_for_a_snapshot() {
    for (shape, at, anew) in
        [(Shape::Blockdev, 1, false), (Shape::Iothreads, 0, false), (Shape::Legacy, 1, false), (Shape::Legacy, 1, true)]
    {
        println!("{shape:?}, snapshot {at}, started anew: {anew}");
        let mut lab = lab(shape, 1).await;
        slowly(&mut lab);
        let taken = [lab.take().await, lab.take().await];
        if anew {
            lab.restart().await;
        }
        leave_merging(&lab, taken[at]).await;
        lab.take().await;
        lab.delete(taken[at]).await;
        lab.check().await;
    }
}

/// Deletes the snapshot at `at` while another is asked for every half second, which is less than a merge takes.
async fn gets_done(shape: Shape, at: usize) {
    const ROUNDS: usize = 16;
    println!("{shape:?}, snapshot {at}");
    let mut lab = lab(shape, 1).await;
    slowly(&mut lab);
    let taken = [lab.take().await, lab.take().await, lab.take().await];
    let victim = lab.snapshots.remove(&taken[at]).unwrap().order;
    let (locks, vm) = (VmLocks::default(), VmKey { namespace: "shop".into(), name: "db".into() });
    for round in 1.. {
        assert!(round < ROUNDS, "snapshots every half second keep the merge from ever ending");
        let delete = async {
            let _turn = locks.turn_after_snapshots(&vm).await;
            let deletion = lab.sessions.delete_unless_waiting(&victim, &locks.waiting(&vm)).await.unwrap();
            println!("round {round}: {:?}", deletion.status.conditions.iter().map(|c| &c.message).collect::<Vec<_>>());
            deletion.over
        };
        let asked = async {
            sleep(Duration::from_millis(500)).await;
            let asked = Instant::now();
            let turn = locks.turn_of_snapshot(&vm).await;
            assert!(asked.elapsed() < Duration::from_millis(1500), "the snapshot waited for {:?}", asked.elapsed());
            turn
        };
        let (over, turn) = tokio::join!(Box::pin(delete), asked);
        if over {
            break;
        }
        // What the guest wrote meanwhile is in the way of no merge that is half done.
        lab.write().await;
        let (number, order) = lab.order();
        let views = lab.views();
        let status = lab.advance(&order).await;
        assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
        lab.snapshots.insert(number, Snapshot { order, views });
        drop(turn);
    }
    lab.check().await;
    lab.restart().await;
    lab.check().await;
    for number in lab.snapshots.keys().copied().take(2).collect::<Vec<_>>() {
        lab.limits = Limits::default();
        let mut order = lab.snapshots[&number].order.clone();
        order.limits = Limits::default();
        lab.snapshots.remove(&number);
        lab.delete_order(&order).await;
        lab.check().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_gets_done_though_snapshots_come_faster_than_it_takes() {
    Box::pin(gets_done(Shape::Blockdev, 1)).await;
    Box::pin(gets_done(Shape::Iothreads, 2)).await;
    Box::pin(gets_done(Shape::Backed, 0)).await;
}

/// Nobody writes to a stopped VM's disks, but a snapshot of it waits no longer for that.
#[tokio::test(flavor = "multi_thread")]
async fn a_merge_of_a_stopped_vms_layers_makes_way_for_a_snapshot() {
    for at in [1, 2] {
        let mut lab = lab(Shape::Blockdev, 1).await;
        let taken = [lab.take().await, lab.take().await, lab.take().await];
        let victim = lab.snapshots.remove(&taken[at]).unwrap().order;
        lab.machine.kill();
        let (locks, vm) = (VmLocks::default(), VmKey { namespace: "shop".into(), name: "db".into() });
        let held = locks.turn(&vm).await;
        let waits = tokio::spawn({
            let (locks, vm) = (locks.clone(), vm.clone());
            async move { drop(locks.turn_of_snapshot(&vm).await) }
        });
        let waiting = locks.waiting(&vm);
        waiting.for_snapshot().await;
        let deletion = lab.sessions.delete_unless_waiting(&victim, &waiting).await.unwrap();
        assert!(!deletion.over, "the merge didn't make way");
        // The snapshot's QEMU finds the images unlocked.
        crate::machine::run("qemu-img", &["check", "-q", crate::machine::path(&lab.disks[0].image)]);
        drop(held);
        waits.await.unwrap();
        assert_eq!(view(&lab.disks[0].image), lab.disks[0].now);
        for (number, snapshot) in &lab.snapshots {
            assert_eq!(view(&lab.handles(*number)[0]), snapshot.views[0], "snapshot {number}");
        }
        lab.machine.start().await;
        lab.delete_order(&victim).await;
        lab.check().await;
    }
}
