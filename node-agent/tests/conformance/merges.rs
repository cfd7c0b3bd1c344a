//! A merge beside a guest that writes all the while.

use std::time::Duration;

use freezeframe_api::v1alpha1::Limits;
use serde_json::{Value, json};

use crate::cases::drivers;
use crate::instant::{install_guest, until};
use crate::storage::{Kind, Storage};
use crate::world::{World, two_disks};

const SOON: Duration = Duration::from_secs(30);

async fn rests(world: &World) -> bool {
    let jobs: Value = world.machine().monitor.execute("query-block-jobs", json!({}), SOON).await.unwrap();
    jobs[0]["paused"] == true
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_rests_while_the_guests_writes_are_slow_and_goes_on_when_they_are_not() {
    let storage = Storage::new(Kind::Plain);
    let disks = two_disks(&storage, "qcow2");
    install_guest(&disks);
    let world = World::with(storage, disks, drivers()).await;
    let before = world.files();
    let mut order = world.order("overlay", 1);
    // No write is so quick, and no merge so slow that it couldn't keep up with the guest.
    let max_merge_latency = Some(Duration::from_nanos(1).into());
    order.limits = Limits { merge_speed: Some((1 << 20).to_string()), max_merge_latency, ..Limits::default() };
    world.snapshot(&order).await;
    for block in 0..64 {
        world.machine().io("vd0", &format!("write -P 9 {} 65536", (16 + block) << 16)).await;
    }
    let (deletion, ()) = tokio::join!(world.sessions.delete(&order), async {
        until("a rest of the merge", async || rests(&world).await).await;
        world.machine().stop().await;
    });
    let deletion = deletion.unwrap();
    assert!(deletion.over, "{:?}", deletion.status.conditions);
    assert_eq!(world.files(), before);
}
