//! Names that can't change hands at once: the guest must not go on with its disk's name on another file.

use std::fs::File;
use std::time::Duration;

use freezeframe_api::v1alpha1::ContentPhase;
use rustix::fs::FlockOperation;
use serde_json::json;
use tokio::time::{Instant, sleep};

use crate::lab::{Lab, Wanted};
use crate::machine::{REGIONS, view};
use crate::shapes::{Shape, lab};

const PATIENCE: Duration = Duration::from_secs(10);

/// Another disk's change of names in the same directory that doesn't end.
fn lock_directory(lab: &Lab) -> File {
    let directory = File::open(lab.images()).unwrap();
    rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive).unwrap();
    directory
}

/// What the guest writes is in the file that its command line names, though the agent could not see to that.
async fn expect_names_right(lab: &mut Lab) {
    let end = Instant::now() + PATIENCE;
    while lab.sessions.guard.owed("shop/db").await.unwrap() {
        assert!(Instant::now() < end, "the guard doesn't settle");
        sleep(Duration::from_millis(20)).await;
    }
    let status = lab.machine.execute("query-status", json!({})).await;
    assert_eq!(status["status"], "running");
    // Over whatever any layer has.
    for disk in &mut lab.disks {
        for region in 0..REGIONS {
            lab.machine.write(&disk.id, region, 250).await;
        }
        disk.now = [250; REGIONS];
    }
    lab.machine.kill();
    for disk in &lab.disks {
        assert_eq!(view(&disk.image), disk.now, "the disk {} by its name", disk.id);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_whose_names_cannot_change_hands_is_finished_by_the_guard() {
    let mut lab = lab(Shape::Blockdev, 2).await;
    let (_, order) = lab.order();
    let locked = lock_directory(&lab);
    lab.sessions.advance(&order, &Wanted).await.unwrap();
    expect_names_right(&mut lab).await;
    drop(locked);
    lab.machine.start().await;
    let status = lab.advance(&order).await;
    assert_eq!(status.phase, Some(ContentPhase::Failed), "{:?}", status.conditions);
    lab.delete_order(&order).await;
    lab.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_whose_names_cannot_change_hands_is_finished_by_the_guard() {
    let mut lab = lab(Shape::Blockdev, 1).await;
    let taken = lab.take().await;
    let order = lab.snapshots[&taken].order.clone();
    let locked = lock_directory(&lab);
    assert!(!lab.sessions.delete(&order).await.unwrap().over);
    expect_names_right(&mut lab).await;
    drop(locked);
    lab.machine.start().await;
    lab.delete(taken).await;
    lab.check().await;
}
