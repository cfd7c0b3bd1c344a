//! Agents that end anywhere.

use super::*;
use crate::crashes::cut_off;
use crate::lab::Wanted;

/// At every second point QEMU dies too, and the owner starts the VM with what it had.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_onto_a_device_cut_off_anywhere_ends_ready_or_gives_the_device_back() {
    let mut on = OnDevice::start(Base::Raw).await;
    let mut whole = false;
    let mut polls: usize = 1;
    while !whole {
        println!("polls {polls}");
        on.lab.write().await;
        let (number, order) = on.lab.order();
        whole = cut_off(Box::pin(on.lab.sessions.advance(&order, &Wanted)), polls).await.is_some();
        let before = on.lab.sessions.journal.load(&order.uid).unwrap();
        if polls.is_multiple_of(2) {
            on.lab.restart().await;
        }
        on.lab.write().await;
        let status = on.lab.advance(&order).await;
        let record = on.lab.sessions.journal.load(&order.uid).unwrap().unwrap();
        match (status.phase, record.stage) {
            (Some(ContentPhase::Ready), _) if polls.is_multiple_of(2) => {
                // Of what was cut before the restart, the former disk must have been looked at by then.
                if before.is_some_and(|before| before.stage != Stage::Open) {
                    assert!(on.lab.sessions.overwritten(&record.tasks[0]).unwrap().is_some());
                }
                // Its owner was told, and is to decide.
                on.start_over().await;
                on.lab.delete_order(&order).await;
            }
            (Some(ContentPhase::Ready), _) => {
                note(&mut on, number, order);
                on.check().await;
                on.delete(number).await;
            }
            // The cut was made, and what the guest wrote since is on the device.
            (Some(ContentPhase::Failed), Stage::Retained) => on.moved.push(order),
            (Some(ContentPhase::Failed), Stage::Removed) => {}
            other => panic!("{other:?}: {:?}", status.conditions),
        }
        on.check().await;
        if on.is_on_device() {
            on.follow().await;
            on.start_over().await;
        }
        polls += 1;
    }
    println!("{polls} points");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_of_a_layer_on_a_device_cut_off_anywhere_can_be_finished() {
    let mut on = OnDevice::start(Base::Raw).await;
    let mut polls = 1;
    let mut whole = 0;
    while whole < 4 {
        let number = on.take().await;
        if polls % 8 > 3 {
            on.follow().await;
        }
        if polls % 4 == 2 {
            on.lab.machine.kill();
        }
        let order = on.lab.snapshots[&number].order.clone();
        let deletion = cut_off(Box::pin(on.lab.sessions.delete(&order)), polls).await;
        whole += usize::from(deletion.is_some());
        println!("polls {polls} done {}", deletion.is_some());
        if polls % 4 == 1 {
            on.lab.write().await;
        }
        if polls % 4 == 3 {
            let device = on.device.0.clone();
            on.start_with(&device).await;
            on.lab.write().await;
        }
        on.delete(number).await;
        on.follow().await;
        on.start_over().await;
        polls += 1;
    }
    println!("{polls} points");
}
