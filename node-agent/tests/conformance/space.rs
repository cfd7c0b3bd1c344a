//! File systems that are full, nearly or altogether.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::{ContentPhase, RunState, VMTargetStatus};
use freezeframe_node_agent::targets::{Seen, probe};

use crate::cases::drivers;
use crate::instant::{install_guest, until};
use crate::storage::{Kind, Storage};
use crate::world::{World, two_disks};

const SOON: Duration = Duration::from_secs(30);

/// Takes all space that there is.
fn fill(file: &Path) {
    let mut filler = File::create(file).unwrap();
    for piece in [1 << 20, 4096] {
        while filler.write_all(&vec![7; piece]).is_ok() {}
        // What didn't fit any more is found out at the latest here.
        drop(filler.sync_all());
    }
}

async fn look(world: &World, before: Option<&VMTargetStatus>) -> VMTargetStatus {
    probe(&world.sessions, &World::key(), "node", &Seen::default(), before).await
}

fn said(status: &VMTargetStatus, type_: &str) -> Option<(String, String, String)> {
    let found = find(&status.conditions, type_)?;
    Some((found.status.clone(), found.reason.clone(), found.message.clone()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_whose_layer_has_no_space_left_says_so_with_the_disks_name_and_goes_on_when_there_is() {
    let storage = Storage::new(Kind::Xfs);
    let disks = two_disks(&storage, "qcow2");
    install_guest(&disks);
    let world = World::with(storage, disks, drivers()).await;
    let roomy = look(&world, None).await;
    assert_eq!(said(&roomy, types::SPACE_LOW), None);
    world.machine().stop().await;
    let order = world.order("overlay", 1);
    world.snapshot(&order).await;
    let filler = world.storage.root().join("filler");
    fill(&filler);
    world.machine().cont().await;
    until("the guest's stop", async || !world.machine().is_running().await).await;
    let full = look(&world, Some(&roomy)).await;
    let (status, reason, message) = said(&full, types::READY).unwrap();
    assert_eq!((full.run_state, status.as_str(), reason.as_str()), (RunState::Paused, "False", reasons::NO_SPACE));
    assert!(message.contains("disk vd0"), "{message}");
    let (status, _, message) = said(&full, types::SPACE_LOW).unwrap();
    assert!(status == "True" && message.contains("disk vd1") && message.contains("0 %"), "{message}");
    std::fs::remove_file(&filler).unwrap();
    world.machine().cont().await;
    // The file system gives back a deleted file's space a moment later.
    let enough = async || said(&look(&world, Some(&full)).await, types::SPACE_LOW).unwrap().1 == reasons::ENOUGH_SPACE;
    until("enough space", enough).await;
    assert_eq!(said(&look(&world, Some(&full)).await, types::READY).unwrap().0, "True");
    tokio::time::timeout(SOON, world.delete(&order)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_leaves_less_than_its_class_wants_is_refused_with_the_numbers() {
    let world = World::on(Kind::Xfs, "qcow2").await;
    let before = world.footprint().await;
    let mut order = world.order("overlay", 1);
    order.limits.min_free = Some("99%".into());
    let status = world.advance(&order).await;
    let ready = find(&status.conditions, types::READY).unwrap();
    assert_eq!((status.phase, ready.reason.as_str()), (Some(ContentPhase::Failed), reasons::NO_SPACE));
    assert!(ready.message.contains("8388608 bytes") && ready.message.contains("are free"), "{}", ready.message);
    assert_eq!(world.footprint().await, before);
    let mut order = world.order("overlay", 2);
    order.limits.min_free = Some("5%".into());
    world.snapshot(&order).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_the_guest_would_fill_before_the_classs_horizon_is_refused_with_the_rate() {
    let storage = Storage::new(Kind::Xfs);
    let disks = two_disks(&storage, "qcow2");
    install_guest(&disks);
    let world = World::with(storage, disks, drivers()).await;
    let writes = async || look(&world, None).await.disks.iter().any(|disk| disk.write_bytes_per_second > Some(0));
    until("a rate that was measured", writes).await;
    world.machine().stop().await;
    let before = world.footprint().await;
    let mut order = world.order("overlay", 1);
    order.limits.space_horizon = Some(Duration::from_secs(168 * 3600).into());
    let status = world.advance(&order).await;
    let ready = find(&status.conditions, types::READY).unwrap();
    assert_eq!((status.phase, ready.reason.as_str()), (Some(ContentPhase::Failed), reasons::NO_SPACE));
    assert!(ready.message.contains("within the class's 604800 s"), "{}", ready.message);
    assert_eq!(world.footprint().await, before);
    let mut order = world.order("overlay", 2);
    order.limits.space_horizon = Some(Duration::from_secs(1).into());
    world.snapshot(&order).await;
    world.delete(&order).await;
}
