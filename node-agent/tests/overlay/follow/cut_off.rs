//! The agent ends anywhere, or a merge is given up.

use std::path::Path;
use std::time::Duration;

use freezeframe_api::v1alpha1::ContentPhase;
use freezeframe_node_agent::locks::VmLocks;

use crate::crashes::cut_off;
use crate::lab::{Lab, Snapshot, Wanted};
use crate::machine::{REGION, view};

use super::{Base, check, current, drive, follow, lab, layer, write_target_file};

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
