//! Thin pools that fill, or would: snapshots that are refused before the window, and what the VM's target says.

use std::time::{Duration, Instant};

use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::{ContentPhase, VMTargetStatus};
use freezeframe_node_agent::session::order::Order;
use freezeframe_node_agent::targets::{Seen, probe};

use crate::node::{GROUP, Pool, lvm, names};
use crate::world::World;

const SOON: Duration = Duration::from_secs(240);

/// What a snapshot is refused with for want of space, having made nothing.
async fn refused(world: &World, order: &Order) -> String {
    let before = names();
    let status = world.advance(order).await;
    let ready = find(&status.conditions, types::READY).unwrap();
    println!("refused: {}", ready.message);
    assert_eq!(
        (status.phase, ready.reason.as_str()),
        (Some(ContentPhase::Failed), reasons::NO_SPACE),
        "{}",
        ready.message
    );
    assert_eq!(names(), before);
    ready.message.clone()
}

fn numbers(text: &str) -> Vec<u64> {
    text.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

async fn look(world: &World, seen: &Seen, before: Option<&VMTargetStatus>) -> VMTargetStatus {
    probe(&world.sessions, &World::key(), "node", seen, before).await
}

/// Looks again and again until what is seen is as wanted.
async fn await_target(
    world: &World,
    what: &str,
    before: Option<&VMTargetStatus>,
    is_it: impl Fn(&VMTargetStatus) -> bool,
) -> VMTargetStatus {
    let (seen, end) = (Seen::default(), Instant::now() + SOON);
    loop {
        let status = look(world, &seen, before).await;
        if is_it(&status) {
            return status;
        }
        assert!(Instant::now() < end, "{what} is never seen: {status:?}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_is_nearly_full_is_refused_with_numbers() {
    let pool = Pool::new("small", 16);
    let mut world = World::new(&[pool.volume("full-a")]).await;
    world.write().await;
    // 15 of 16 MiB are in use then.
    pool.fill("filler", 7);
    let message = refused(&world, &World::order(1)).await;
    assert!(message.contains(&format!("{}: 1677720 bytes are needed, ", pool.path())), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_whose_metadata_is_nearly_full_is_refused_with_numbers_and_before_the_window() {
    let pool = Pool::new("packed", 16);
    let mut world = World::new(&[pool.volume("packed-a")]).await;
    world.write().await;
    let mut taken = world.snapshot(1).await;
    // LVM makes no snapshot any more in a pool with so much in use, and would say so when the guest is frozen.
    pool.fill_metadata(76.0);
    let message = refused(&world, &World::order(2)).await;
    assert!(message.contains(&format!("{}_tmeta: 1048577 bytes are needed, ", pool.path())), "{message}");
    taken.check();
    world.check_guest().await;
    world.remove(&mut taken.tasks).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_whose_pool_the_guest_would_fill_before_the_horizon_is_refused_to_the_byte() {
    let pool = Pool::new("horizon", 32);
    let world = World::counting(&[pool.volume("count-a"), pool.volume("count-b")]).await;
    let rate = |disk: &str| world.sessions.space.rate(&World::key(), disk);
    await_target(&world, "a rate", None, |_| rate("vd0").min(rate("vd1")) > Some(0)).await;
    // From here on neither the rate nor the pool changes.
    world.machine().monitor.stop(SOON).await.unwrap();
    let order = |number, seconds| {
        let mut order = World::order(number);
        order.drivers[0].parameters.insert("minFreePercent".into(), "0".into());
        order.limits.space_horizon = Some(Duration::from_secs(seconds).into());
        order
    };
    let message = refused(&world, &order(1, 604_800)).await;
    assert!(message.contains(&format!("thin pool {}: at ", pool.path())), "{message}");
    let [rate, written, seconds, same, mapped, data, metadata] = numbers(&message)[..] else { panic!("{message}") };
    assert_eq!((written, seconds, same), (rate * 604_800, 604_800, written));
    let chunk: u64 = pool.says("chunk_size").parse().unwrap();
    assert_eq!((chunk, mapped), (64 << 10, written.div_ceil(64 << 10) * 64));
    let hundredths: u64 = pool.says("data_percent").replace('.', "").parse().unwrap();
    assert_eq!(data, (32 << 20) - (32 << 20) * hundredths / 10_000);
    assert!(metadata > 0 && metadata < pool.says("lv_metadata_size").parse().unwrap(), "{message}");
    let fits = order(2, data / rate);
    let status = world.advance(&fits).await;
    assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
    assert!(world.sessions.delete(&fits).await.unwrap().over);
    refused(&world, &order(3, data / rate + 1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_says_that_the_pool_of_its_disk_fills_and_when_there_is_room_again() {
    let pool = Pool::new("filling", 16);
    let world = World::new(&[pool.volume("filling-a")]).await;
    let low = |status: &VMTargetStatus| find(&status.conditions, types::SPACE_LOW).cloned();
    // 15 of 16 MiB are in use then.
    pool.fill("filler", 7);
    let full = await_target(&world, "a pool that is full", None, |status| low(status).is_some()).await;
    let said = low(&full).unwrap();
    assert_eq!((said.status.as_str(), said.reason.as_str()), ("True", reasons::SPACE_LOW));
    assert_eq!(said.message, format!("disk vd0: 6 % of the data space of thin pool {} are free", pool.path()));
    let restarted = look(&world, &Seen::default(), Some(&full)).await;
    assert_eq!(low(&restarted), Some(said), "nothing is known yet");
    lvm(&format!("lvremove -qq -f {GROUP}/filler"));
    let enough = |status: &VMTargetStatus| low(status).is_some_and(|low| low.reason == reasons::ENOUGH_SPACE);
    await_target(&world, "room", Some(&full), enough).await;
}
