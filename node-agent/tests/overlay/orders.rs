//! Deleting snapshots in every order, with the VM running, stopped, and restarted.

use freezeframe_api::v1alpha1::{DeletionPolicy, DiskSnapshotState};
use freezeframe_node_agent::session::journal::Stage;

use crate::machine::{make_image, view};
use crate::shapes::{Shape, lab};

pub fn orders(left: &[usize]) -> Vec<Vec<usize>> {
    if left.is_empty() {
        return vec![vec![]];
    }
    let with = |first: &usize| {
        let others: Vec<_> = left.iter().copied().filter(|other| other != first).collect();
        orders(&others).into_iter().map(|rest| [vec![*first], rest].concat()).collect::<Vec<_>>()
    };
    left.iter().flat_map(with).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn four_snapshots_of_a_running_vm_can_be_deleted_in_every_order() {
    let mut lab = lab(Shape::Blockdev, 1).await;
    for order in orders(&[0, 1, 2, 3]) {
        println!("order {order:?}");
        let mut taken = vec![];
        for _ in 0..4 {
            taken.push(lab.take().await);
        }
        lab.check().await;
        for at in order {
            lab.delete(taken[at]).await;
            lab.check().await;
            lab.write().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn four_snapshots_of_a_stopped_vm_can_be_deleted_in_every_order() {
    let mut lab = lab(Shape::Blockdev, 1).await;
    for order in orders(&[0, 1, 2, 3]) {
        println!("order {order:?}");
        let mut taken = vec![];
        for _ in 0..4 {
            taken.push(lab.take().await);
        }
        lab.machine.kill();
        for at in order {
            lab.delete(taken[at]).await;
            lab.check().await;
        }
        lab.machine.start().await;
        lab.check().await;
    }
}

/// Which of the restarts below come before which deletion differs from order to order.
#[tokio::test(flavor = "multi_thread")]
async fn a_vm_restarted_between_snapshots_and_deletions_loses_nothing_in_any_order() {
    let mut lab = lab(Shape::Blockdev, 1).await;
    for (number, order) in orders(&[0, 1, 2, 3]).into_iter().enumerate() {
        println!("order {order:?}");
        let mut taken = vec![];
        for at in 0..4 {
            if number & (1 << at) != 0 {
                lab.restart().await;
                lab.check().await;
            }
            taken.push(lab.take().await);
        }
        for (step, at) in order.into_iter().enumerate() {
            if (number + step) % 3 == 0 {
                lab.restart().await;
            }
            lab.check().await;
            lab.delete(taken[at]).await;
            lab.check().await;
            lab.write().await;
        }
    }
}

/// Nobody would learn of a retained image's move, so what is below it stays too; what is above it is merged.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_retained_snapshot_needs_is_kept() {
    for running in [true, false] {
        let mut lab = lab(Shape::Blockdev, 1).await;
        let (below, retained, above) = (lab.take().await, lab.take().await, lab.take().await);
        let mut order = lab.snapshots[&retained].order.clone();
        order.deletion_policy = DeletionPolicy::Retain;
        lab.delete_order(&order).await;
        lab.check().await;
        if !running {
            lab.machine.kill();
        }
        lab.delete(above).await;
        lab.check().await;
        let kept = lab.handles(below);
        let status = lab.delete_order(&lab.snapshots[&below].order.clone()).await;
        assert!(status.disks.iter().all(|disk| disk.state == DiskSnapshotState::Retained), "{:?}", status.disks);
        assert_eq!(lab.handles(below), kept, "what is kept doesn't move");
        lab.check().await;
        lab.restart().await;
        lab.check().await;
    }
}

/// What one disk of a snapshot leaves behind is a sibling's then, and must not be taken for a file that was kept.
#[tokio::test(flavor = "multi_thread")]
async fn of_a_snapshot_that_is_kept_by_half_only_that_half_is_kept() {
    let mut lab = lab(Shape::Blockdev, 2).await;
    let (below, above) = (lab.take().await, lab.take().await);
    let (order, kept) = (lab.snapshots[&below].order.clone(), lab.handles(below));
    let both = lab.handles(above);
    let mut retained = lab.sessions.journal.load(&lab.snapshots[&above].order.uid).unwrap().unwrap();
    let second = retained.tasks.remove(1);
    // A snapshot of one disk, whose file was kept: it needs that disk of the one below.
    let mut only_second = retained.clone();
    only_second.order.uid = "ffffffffffff-0000-4000-8000-000000000000".into();
    (only_second.tasks, only_second.stage) = (vec![second], Stage::Retained);
    lab.sessions.journal.save(&retained).unwrap();
    lab.sessions.journal.save(&only_second).unwrap();
    let status = lab.delete_order(&order).await;
    let found: Vec<_> = status.disks.iter().map(|disk| (disk.state, disk.handle.is_some())).collect();
    assert_eq!(found, [(DiskSnapshotState::Removed, false), (DiskSnapshotState::Retained, true)]);
    // The first disk of the snapshot above lives on under the removed one's name; nobody says that that is kept.
    let moved = lab.sessions.journal.load(&lab.snapshots[&above].order.uid).unwrap().unwrap();
    assert_eq!(moved.tasks[0].artifact.as_ref().unwrap().handle, kept[0]);
    let record = lab.sessions.journal.load(&order.uid).unwrap().unwrap();
    let named: Vec<_> = record.tasks.iter().map(|task| task.artifact.as_ref().map(|a| a.handle.clone())).collect();
    assert_eq!(named, [None, Some(kept[1].clone())]);
    assert!(both[1].exists() && !both[0].exists());
    // So it can go.
    let status = lab.delete_order(&moved.order).await;
    assert!(status.disks.iter().all(|disk| disk.state == DiskSnapshotState::Removed), "{:?}", status.disks);
    assert!(!kept[0].exists() && kept[1].exists());
}

/// The VM's owner has put another disk in its place; the old one, aside, still reads through the snapshot's file.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_an_image_outside_the_vm_needs_is_not_unlinked() {
    for running in [true, false] {
        let mut lab = lab(Shape::Blockdev, 1).await;
        let taken = lab.take().await;
        let (order, file) = (lab.snapshots[&taken].order.clone(), lab.handles(taken).remove(0));
        let (image, aside) = (lab.disks[0].image.clone(), lab.images().join("aside.qcow2"));
        lab.machine.kill();
        std::fs::rename(&image, &aside).unwrap();
        make_image(&image, None);
        if running {
            lab.machine.start().await;
        }
        let deletion = lab.sessions.delete(&order).await.unwrap();
        assert!(!deletion.over, "running {running}: {:?}", deletion.status.conditions);
        assert!(deletion.status.conditions.iter().any(|condition| condition.message.contains("aside.qcow2")));
        assert_eq!(view(&aside), lab.disks[0].now);
        std::fs::remove_file(&aside).unwrap();
        lab.delete_order(&order).await;
        assert!(!file.exists());
    }
}
