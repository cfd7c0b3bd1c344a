//! Cuts that are on record, and can't be completed or taken back at once.

use std::path::Path;
use std::time::Duration;

use freezeframe_api::conditions::{find, types};
use freezeframe_api::v1alpha1::{ContentPhase, VMSnapshotContentStatus};
use freezeframe_node_agent::session::order::Order;
use freezeframe_qemu::{Qmp, connect_beneath};
use tokio::time::{Instant, sleep};

use super::cut_at;
use crate::lab::{Lab, Snapshot, Wanted};
use crate::machine::path;
use crate::shapes::{Shape, lab};
use crate::stopped;

/// The agent ends as soon as the cut is on record, and so does the VM.
async fn cut_and_killed() -> (Lab, u32, Order) {
    let mut lab = stopped::stopped(Shape::Blockdev, 1).await;
    lab.machine.start().await;
    lab.write().await;
    let (number, order) = lab.order();
    cut_at("recorded", Box::pin(lab.sessions.advance(&order, &Wanted))).await;
    let views = lab.views();
    lab.snapshots.insert(number, Snapshot { order: order.clone(), views });
    lab.machine.kill();
    (lab, number, order)
}

/// The images' file system isn't mounted while `work` is done.
async fn unmounted<T>(lab: &Lab, work: impl Future<Output = T>) -> T {
    let (images, away) = (lab.images(), lab.sessions.vm_root.join("../away"));
    std::fs::rename(&images, &away).unwrap();
    std::fs::create_dir(&images).unwrap();
    let done = work.await;
    std::fs::remove_dir(&images).unwrap();
    std::fs::rename(&away, &images).unwrap();
    done
}

fn why_not_ready(status: &VMSnapshotContentStatus) -> &str {
    assert_eq!(status.phase, Some(ContentPhase::Completing), "{:?}", status.conditions);
    &find(&status.conditions, types::READY).unwrap().message
}

#[tokio::test(flavor = "multi_thread")]
async fn a_good_cut_is_completed_once_its_file_system_is_mounted() {
    let (mut lab, number, order) = cut_and_killed().await;
    let status = unmounted(&lab, lab.turn(&order)).await;
    assert!(why_not_ready(&status).contains(path(&lab.disks[0].image)), "{status:?}");
    let status = lab.advance(&order).await;
    assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
    lab.check().await;
    lab.machine.start().await;
    lab.check().await;
    lab.delete(number).await;
    lab.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_good_cut_of_a_running_vm_is_completed_once_the_agent_has_its_file_system_too() {
    let mut lab = lab(Shape::Blockdev, 1).await;
    lab.write().await;
    let (number, order) = lab.order();
    cut_at("recorded", Box::pin(lab.sessions.advance(&order, &Wanted))).await;
    let views = lab.views();
    let status = unmounted(&lab, lab.turn(&order)).await;
    assert!(why_not_ready(&status).contains("mount"), "{status:?}");
    let status = lab.advance(&order).await;
    assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
    lab.snapshots.insert(number, Snapshot { order, views });
    lab.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_good_cut_is_completed_once_the_monitor_has_time() {
    let mut lab = lab(Shape::Blockdev, 1).await;
    lab.write().await;
    let (number, order) = lab.order();
    cut_at("recorded", Box::pin(lab.sessions.advance(&order, &Wanted))).await;
    let views = lab.views();
    let socket = Path::new("shop/db/qmp.sock");
    // The agent's own connection ends a moment after it.
    let end = Instant::now() + Duration::from_secs(10);
    let other = loop {
        let (stream, _) = connect_beneath(&lab.sessions.vm_root, socket, Duration::from_secs(1)).await.unwrap();
        match Qmp::connect(stream, Duration::from_secs(1)).await {
            Ok(other) => break other,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        sleep(Duration::from_millis(20)).await;
    };
    let status = lab.turn(&order).await;
    assert!(why_not_ready(&status).contains("monitor"), "{status:?}");
    drop(other);
    let status = lab.advance(&order).await;
    assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
    lab.snapshots.insert(number, Snapshot { order, views });
    lab.check().await;
}

/// It was deleted before it was complete.
#[tokio::test(flavor = "multi_thread")]
async fn a_cut_that_is_taken_back_is_not_forgotten_while_its_file_system_is_not_mounted() {
    let (mut lab, number, order) = cut_and_killed().await;
    lab.snapshots.remove(&number);
    let deletion = unmounted(&lab, lab.sessions.delete(&order)).await.unwrap();
    let why = find(&deletion.status.conditions, types::REMOVED).map(|removed| removed.message.clone());
    assert!(!deletion.over && why.as_ref().is_some_and(|why| why.contains("mount")), "{why:?}");
    lab.delete_order(&order).await;
    lab.check().await;
    lab.machine.start().await;
    lab.check().await;
}
