//! The window: one instant for all disks, and cuts that come too late.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use freezeframe_api::v1alpha1::ContentPhase;
use freezeframe_node_agent::drivers::Drivers;
use freezeframe_node_agent::drivers::overlay::Overlay;
use freezeframe_node_agent::session::order::Order;

use crate::cases::{Case, drivers, for_every_case};
use crate::counting::{self, COUNTER};
use crate::loopcopy::Loopcopy;
use crate::storage::{Kind, Storage, run};
use crate::world::{World, disk, two_disks};

const SOON: Duration = Duration::from_secs(180);
/// The guest that counts, on the first disk.
pub fn install_guest(world_disks: &[crate::machine::Disk]) {
    counting::install(&world_disks[0].file, &world_disks[0].format);
}

/// The counters that a snapshot has.
fn counters(world: &World, order: &Order) -> Vec<u32> {
    let scratch = tempfile::tempdir().unwrap();
    let raw = scratch.path().join("raw");
    let artifacts = world.artifacts(order).into_iter();
    let counter = artifacts.map(|artifact| {
        run(&format!("qemu-img convert -U -O raw -f {}", artifact.format), &[&artifact.handle, &raw]);
        let bytes = std::fs::read(&raw).unwrap();
        u32::from_le_bytes(bytes[COUNTER..COUNTER + 4].try_into().unwrap())
    });
    counter.collect()
}

/// Takes snapshots of a writing guest; each must be of one instant.
async fn check_instants(case: Case, drivers: Drivers) {
    let storage = Storage::new(case.storage);
    let disks = two_disks(&storage, case.format);
    install_guest(&disks);
    let world = World::with(storage, disks, drivers).await;
    let (end, mut last, mut taken) = (Instant::now() + SOON, 0, 0);
    for number in 1.. {
        let order = world.order(case.driver, number);
        world.snapshot(&order).await;
        let counters = counters(&world, &order);
        assert!(counters[0].wrapping_sub(counters[1]) <= 1, "snapshot {number}: {counters:?}");
        world.delete(&order).await;
        // Only snapshots between which the guest wrote count.
        taken += u32::from(counters[1] > last);
        last = counters[1];
        if taken >= 5 {
            return;
        }
        assert!(Instant::now() < end, "the guest doesn't write: {counters:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_disks_of_a_writing_guest_are_cut_at_one_instant() {
    for_every_case(|case| check_instants(case, drivers())).await;
}

static CUTS: AtomicU32 = AtomicU32::new(0);

/// Makes every other cut late: a guest that runs meanwhile writes many times.
fn dawdle() {
    if CUTS.fetch_add(1, Ordering::SeqCst) % 2 == 1 {
        std::thread::sleep(Duration::from_millis(300));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cuts_that_are_far_apart_are_one_instant_to_the_guest() {
    let case = Case { driver: "loopcopy", storage: Kind::Plain, format: "raw" };
    check_instants(case, Drivers::new(vec![Box::new(Loopcopy(dawdle))])).await;
}

const LATE: Duration = Duration::from_millis(200);

fn be_late() {
    std::thread::sleep(LATE);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_disk_says_how_much_later_than_the_first_it_was_cut() {
    let storage = Storage::new(Kind::Plain);
    let disks = vec![disk(&storage, "vd0", "raw"), disk(&storage, "vd1", "qcow2")];
    let drivers = Drivers::new(vec![Box::new(Loopcopy(be_late)), Box::new(Overlay)]);
    let world = World::with(storage, disks, drivers).await;
    let mut order = world.order("loopcopy", 1);
    order.drivers.extend(world.order("overlay", 1).drivers);
    let status = world.advance(&order).await;
    assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
    let late = i64::try_from(LATE.as_micros()).unwrap();
    let skews: Vec<_> = status.disks.iter().map(|disk| disk.skew_micros.unwrap()).collect();
    let total = status.consistency.unwrap().skew_micros;
    // The transaction takes a moment too, though a much shorter one.
    assert!(skews[1] == 0 && (late / 2..=total).contains(&skews[0]), "{skews:?} of {total}");
}

static LET_THE_CUT_GO_ON: AtomicBool = AtomicBool::new(false);

/// Blocks a cut as a file system that doesn't answer would.
fn hang() {
    let end = Instant::now() + SOON;
    while !LET_THE_CUT_GO_ON.load(Ordering::SeqCst) && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    let end = Instant::now() + SOON;
    while !condition().await {
        assert!(Instant::now() < end, "{what} doesn't happen");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_that_hangs_lets_the_guest_go_and_leaves_nothing_when_it_ends() {
    let storage = Storage::new(Kind::Plain);
    let disks = two_disks(&storage, "raw");
    let world = World::with(storage, disks, Drivers::new(vec![Box::new(Loopcopy(hang))])).await;
    let before = world.footprint().await;
    let order = world.order("loopcopy", 1);
    let watch = async {
        until("the pause", async || !world.machine().is_running().await).await;
        until("the end of the pause", async || world.machine().is_running().await).await;
        LET_THE_CUT_GO_ON.store(true, Ordering::SeqCst);
    };
    let (status, ()) = tokio::join!(world.advance(&order), watch);
    assert_eq!(status.phase, Some(ContentPhase::Failed));
    assert_eq!(world.footprint().await, before);
}
