//! Agents that end anywhere.

use freezeframe_api::v1alpha1::ContentPhase;

use super::Lent;
use crate::crashes::cut_off;
use crate::follow::{Base, drive};
use crate::lab::{Snapshot, Wanted};
use crate::machine::view;

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
