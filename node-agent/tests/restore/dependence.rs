//! Deleting snapshots that restored images depend on, or seem to.

use std::os::unix::fs::MetadataExt;

use freezeframe_api::v1alpha1::{DeletionPolicy, RestoreMode};
use freezeframe_node_agent::restore::order::RestoreOrder;
use freezeframe_node_agent::session::journal::Stage;
use freezeframe_node_agent::session::order::Order;
use serde_json::json;

use crate::cases::for_every;
use crate::lab::{CASES, Lab};

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_stays_for_as_long_as_a_new_vm_needs_it() {
    for_every(CASES.iter().copied(), |case| async move {
        let mut lab = Lab::with_copies_in_reach(case).await;
        lab.world.write().await;
        let (below, _) = lab.snapshot(case.driver, 1).await;
        lab.world.write().await;
        let (snapshot, taken) = lab.snapshot(case.driver, 2).await;
        lab.world.write().await;
        let order = lab.order_to_new(&snapshot, "new", RestoreMode::Linked);
        let images = lab.restore(&order).await;
        let linked = lab.restores.journal.load(&order.uid).unwrap().unwrap().status.unwrap().disks[0].linked;
        let format = |at: usize| images[at].extension().unwrap().to_str().unwrap().to_owned();
        let check = || {
            for (at, content) in taken.iter().enumerate() {
                content.check(&images[at], &format(at)).unwrap();
            }
        };
        // What is below may be merged into what the new VM needs, but not move it.
        let kept = lab.delete(&below).await;
        check();
        let refused = lab.delete(&snapshot).await;
        assert_eq!(refused.is_some(), linked, "{refused:?}");
        assert!(!linked || refused.as_ref().unwrap().contains("new-vd"), "{refused:?}");
        check();
        lab.world.check_guest().await;
        for image in &images {
            std::fs::remove_file(image).unwrap();
        }
        assert_eq!(lab.delete(&snapshot).await, None);
        if kept.is_some() {
            assert_eq!(lab.delete(&below).await, None);
        }
        lab.world.check_guest().await;
    })
    .await;
}

fn orders(left: &[usize]) -> Vec<Vec<usize>> {
    if left.is_empty() {
        return vec![vec![]];
    }
    let with = |first: &usize| {
        let others: Vec<_> = left.iter().copied().filter(|other| other != first).collect();
        orders(&others).into_iter().map(|rest| [vec![*first], rest].concat()).collect::<Vec<_>>()
    };
    left.iter().flat_map(with).collect()
}

/// The restored snapshot has two children then: the disk, and the snapshot that came after it.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_restore_in_place_snapshots_can_be_deleted_in_any_order_though_some_must_wait() {
    let all = orders(&[0, 1, 2, 3]);
    for_every(all.into_iter().enumerate().map(|(n, order)| Subject(n, order)), |Subject(number, order)| async move {
        let case = CASES[0];
        let mut lab = Lab::of(case).await;
        let mut snapshots = vec![];
        for number in 1..=2 {
            lab.world.write().await;
            snapshots.push(lab.snapshot(case.driver, number).await);
        }
        lab.world.write().await;
        snapshots.push(lab.stop_and_keep(case.driver, 3).await);
        // Snapshot 0 comes back; 1 is later; 2 keeps the state before.
        let restore = lab.order_in_place(&snapshots[0].0.clone(), &snapshots[2].0.clone());
        lab.restore(&restore).await;
        lab.world.contents = snapshots[0].1.clone();
        lab.world.start().await;
        lab.world.write().await;
        snapshots.push(lab.snapshot(case.driver, 4).await);
        lab.world.write().await;
        if number % 2 == 0 {
            lab.world.quit().await;
        }
        let mut waiting = order;
        // What must wait is tried again, as the agent does.
        for _ in 0..4 {
            let mut still = vec![];
            for at in waiting {
                if lab.delete(&snapshots[at].0).await.is_some() {
                    still.push(at);
                } else {
                    match number % 2 {
                        1 => lab.world.check_guest().await,
                        _ => lab.world.check_images(),
                    }
                }
            }
            waiting = still;
        }
        assert!(waiting.is_empty(), "never deleted: {waiting:?}");
        let images = std::fs::read_dir(lab.world.storage.images()).unwrap().count();
        assert_eq!(images, 2, "{:?}", lab.files());
        if number % 2 == 0 {
            lab.world.check_images();
            lab.world.start().await;
        }
        lab.world.check_guest().await;
    })
    .await;
}

struct Subject(usize, Vec<usize>);

impl std::fmt::Display for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "order {:?}", self.1)
    }
}

/// The image that depends on the copy has a name of its own by then, and another image its old one.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_stays_for_a_linked_image_that_was_itself_cut_since() {
    let case = CASES[2];
    let mut lab = Lab::with_copies_in_reach(case).await;
    lab.world.write().await;
    let (old, old_data) = lab.snapshot(case.driver, 1).await;
    lab.world.write().await;
    let (before, _) = lab.stop_and_keep(case.driver, 2).await;
    let order: RestoreOrder = lab.order_in_place(&old, &before);
    lab.restore(&order).await;
    lab.world.contents.clone_from(&old_data);
    lab.world.start().await;
    let (cut, _) = lab.snapshot("overlay", 3).await;
    lab.world.write().await;
    let refused = lab.delete(&old).await;
    assert!(refused.as_ref().is_some_and(|why| why.contains("vmsnap-")), "{refused:?}");
    lab.world.check_guest().await;
    assert_eq!(lab.delete(&cut).await, None);
    assert!(lab.delete(&old).await.is_some());
    lab.world.check_guest().await;
}

/// What was begun before its neighbour was retained can't be finished any more, and is kept: nobody else is for it, and
/// nobody waits for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_removal_that_ended_half_way_for_good_keeps_no_other_snapshot_and_no_restore() {
    let mut lab = Lab::of(CASES[0]).await;
    let mut snapshots = vec![];
    for number in 1..=4 {
        lab.world.write().await;
        snapshots.push(lab.snapshot("overlay", number).await.0);
    }
    let retain = Order { deletion_policy: DeletionPolicy::Retain, ..snapshots[1].clone() };
    assert_eq!(lab.delete(&retain).await, None);
    begin_merge(&lab, &snapshots[0], &snapshots[1]);
    assert_eq!(lab.delete(&snapshots[2]).await, None);
    let stage = |order: &Order| lab.world.sessions.journal.load(&order.uid).unwrap().unwrap().stage;
    assert_eq!(stage(&snapshots[2]), Stage::Removed);
    assert_eq!(lab.delete(&snapshots[0]).await, None);
    assert_eq!(stage(&snapshots[0]), Stage::Retained);
    let order = lab.order_to_new(&snapshots[3].clone(), "new", RestoreMode::Linked);
    lab.restore(&order).await;
    lab.world.check_guest().await;
}

/// As if the agent had been killed when it had recorded that it would merge the layer above.
fn begin_merge(lab: &Lab, below: &Order, above: &Order) {
    let journal = &lab.world.sessions.journal;
    let mut record = journal.load(&below.uid).unwrap().unwrap();
    for (task, above) in record.tasks.iter_mut().zip(lab.world.artifacts(above)) {
        let found = std::fs::metadata(&above.handle).unwrap();
        task.state["merging"] = json!({
            "above": above.handle.file_name().unwrap().to_str(),
            "above_id": {"inode": found.ino()},
            "done": false,
        });
    }
    record.removing = true;
    journal.save(&record).unwrap();
}
