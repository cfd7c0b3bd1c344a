//! The driver `lvm` on real logical volumes, with a real QEMU that writes on them and a real guard.
//!
//! For a machine that is thrown away afterwards: it makes a volume group of the empty disk that `LVM_TEST_DISK` names.
//! Not part of `cargo test`; the end-to-end test `lvm` runs it inside the node VM, one test after the other.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod boots;
#[path = "../conformance/content.rs"]
mod content;
#[path = "../conformance/counting.rs"]
mod counting;
mod frozen;
mod guests;
mod instant;
mod layers;
#[path = "../conformance/loader.rs"]
mod loader;
mod machine;
mod nested;
mod node;
#[path = "../restore/order.rs"]
mod restore_order;
mod restores;
mod targets;
mod world;

use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::ContentPhase;
use freezeframe_node_agent::drivers::lvm::{Lvm, fill};
use freezeframe_node_agent::drivers::{DriverError, Env, Pace, SnapshotDriver, Verdict};
use freezeframe_node_agent::hypervisor::disks::disks;

use node::{Lv, lvm, names, pool, thick, thin};
use world::World;

#[tokio::test(flavor = "multi_thread")]
async fn thin_and_thick_volumes_of_one_group_are_cut_in_one_pause_and_keep_what_was_before_it() {
    let mut world = World::new(&[thin("one-a"), thin("one-b"), thick("one-c")]).await;
    let before = names();
    world.write().await;
    let mut taken = world.snapshot(1).await;
    println!("measured: 2 thin and 1 thick in one cut: pause {:?}", taken.pause);
    world.write().await;
    taken.check();
    world.check_guest().await;
    world.remove(&mut taken.tasks).await;
    assert_eq!(names(), before);
    world.check_guest().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_window_of_one_two_and_four_volumes_is_measured() {
    for (kind, make) in [("thin", thin as fn(&str) -> Lv), ("thick", thick)] {
        for count in [1, 2, 4] {
            let volumes: Vec<_> = (0..count).map(|at| make(&format!("m{kind}{count}-{at}"))).collect();
            let world = World::new(&volumes).await;
            let mut taken = world.snapshot(1).await;
            println!("measured: {count} {kind}: pause {:?}", taken.pause);
            world.remove(&mut taken.tasks).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_three_snapshots_the_oldest_the_middle_or_the_newest_goes_first() {
    let mut world = World::new(&[thin("three-a"), thick("three-b")]).await;
    let before = names();
    for sequence in [[0, 1, 2], [1, 2, 0], [2, 0, 1]] {
        let mut taken = vec![];
        for number in 1..=3 {
            world.write().await;
            taken.push(world.snapshot(number).await);
        }
        world.write().await;
        for (gone, at) in sequence.into_iter().enumerate() {
            world.remove(&mut taken[at].tasks).await;
            sequence[gone + 1..].iter().for_each(|left: &usize| taken[*left].check());
            world.check_guest().await;
        }
        assert_eq!(names(), before, "{sequence:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_is_nearly_full_is_refused_with_numbers() {
    let pool = pool("small", "16m");
    let volume = Lv { pool: Some(pool), ..thin("full-a") };
    let mut world = World::new(&[volume]).await;
    world.write().await;
    // 15 of 16 MiB are in use then.
    let filler = thin("filler");
    lvm(&format!("lvcreate -qq -y -V 8m --thinpool {}/small -n {}", node::GROUP, filler.name));
    node::run(
        "dd",
        &["if=/dev/urandom", &format!("of={}", filler.path()), "bs=1M", "count=7", "oflag=direct"].map(String::from),
    );
    let before = names();
    let order = World::order(1);
    let status = world.advance(&order).await;
    assert_eq!(status.phase, Some(ContentPhase::Failed));
    let ready = find(&status.conditions, types::READY).unwrap();
    assert_eq!(ready.reason, reasons::NO_SPACE, "{}", ready.message);
    println!("refused: {}", ready.message);
    assert!(ready.message.contains("small") && ready.message.contains("bytes are needed"), "{}", ready.message);
    assert_eq!(names(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn thick_snapshots_that_do_not_fit_together_are_refused_before_the_window() {
    let world = World::new(&[thick("wide-a"), thick("wide-b")]).await;
    let before = names();
    let free: u64 = lvm(&format!("vgs --noheadings --units b --nosuffix -o vg_free {}", node::GROUP)).parse().unwrap();
    let mut order = World::order(1);
    // Each alone would fit.
    order.drivers[0].parameters.insert("size".into(), (free / 3 * 2).to_string());
    let status = world.advance(&order).await;
    let ready = find(&status.conditions, types::READY).unwrap();
    assert_eq!(ready.reason, reasons::NO_SPACE, "{}", ready.message);
    assert_eq!(names(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thick_snapshot_that_overflowed_is_reported_and_can_be_removed() {
    let mut world = World::new(&[thick("over-a")]).await;
    let before = names();
    world.write().await;
    let mut steps = world.steps(1, &[("size", "4Mi")]).await;
    world.cut(&steps).await;
    let early = fill(&steps[0]).await.unwrap().unwrap();
    assert!(early.percent < 50.0 && !early.overflowed, "{early:?}");
    for at in 0..8 {
        world.machine().io("vd0", &format!("write -P 9 {at}m 1000k")).await;
    }
    // What this host has in memory has changed nothing yet.
    node::run("sync", &["/dev/ff-vg/over-a".to_owned()]);
    let late = fill(&steps[0]).await.unwrap().unwrap();
    assert!(late.overflowed, "{late:?}");
    let vm = world.vm().await;
    let failed = Lvm.complete(&vm, &world.sessions.roots, &mut steps[0]).await.unwrap_err();
    drop(vm);
    println!("overflowed: {failed}");
    assert!(matches!(failed, DriverError::Verify(_)) && failed.to_string().contains("raise `size`"), "{failed}");
    world.remove(&mut steps).await;
    assert_eq!(names(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_after_any_step_leaves_nothing_once_it_is_taken_back() {
    let mut world = World::new(&[thin("crash-a"), thick("crash-b")]).await;
    let before = names();
    world.write().await;
    let mut prepared = world.steps(1, &[]).await;
    world.remove(&mut prepared).await;
    assert_eq!(names(), before, "after prepare");
    let mut cut = world.steps(1, &[]).await;
    world.cut(&cut).await;
    assert_eq!(names().len(), before.len() + 2);
    world.remove(&mut cut).await;
    assert_eq!(names(), before, "after the cut");
    world.remove(&mut cut).await;
    world.check_guest().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_has_the_snapshots_name_is_neither_taken_for_it_nor_touched() {
    let mut world = World::new(&[thin("taken-a")]).await;
    world.write().await;
    let order = World::order(1);
    let name = format!("taken-a-vmsnap-{}", order.id());
    lvm(&format!("lvcreate -qq -y -L 4m -n {name} {}", node::GROUP));
    let before = names();
    let status = world.advance(&order).await;
    assert_eq!(status.phase, Some(ContentPhase::Failed));
    let message = &find(&status.conditions, types::READY).unwrap().message;
    assert!(message.contains("already"), "{message}");
    let deletion = world.sessions.delete(&order).await.unwrap();
    assert!(deletion.over, "{:?}", deletion.status.conditions);
    assert_eq!(names(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_is_in_use_is_deleted_once_it_is_closed() {
    let mut world = World::new(&[thin("used-a")]).await;
    let before = names();
    world.write().await;
    let mut taken = world.snapshot(1).await;
    let user = std::fs::File::open(&taken.tasks[0].artifact.as_ref().unwrap().handle).unwrap();
    let vm = world.vm().await;
    let env = Env { vm: Some(&vm), roots: &world.sessions.roots, siblings: &[], pace: &Pace::default() };
    let kept = Lvm.remove(&env, &mut taken.tasks[0]).await.unwrap_err();
    assert!(matches!(&kept, DriverError::NotNow(why) if why.contains("in use")), "{kept}");
    drop((user, vm));
    world.remove(&mut taken.tasks).await;
    assert_eq!(names(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thick_volume_is_refused_without_a_size_and_says_so() {
    let world = World::new(&[thick("bare-a"), thin("bare-b")]).await;
    let found = disks(&world.vm().await, &world.sessions.roots).await.unwrap().found;
    let verdict = |at: usize| Lvm.can_take(&found[at].facts, &std::collections::BTreeMap::new());
    assert!(matches!(verdict(0), Verdict::Unusable(why) if why.contains("`size`")));
    assert!(matches!(verdict(1), Verdict::Usable(why) if why.contains("thin")));
}
