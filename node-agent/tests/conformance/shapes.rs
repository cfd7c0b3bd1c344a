//! What a file system or a format does that a driver must know before it starts.

use std::path::Path;

use freezeframe_api::conditions::{find, types};
use freezeframe_api::v1alpha1::ContentPhase;
use freezeframe_node_agent::drivers::{Drivers, Verdict};
use freezeframe_node_agent::hypervisor::disks::disks;

use crate::cases::{drivers, parameters};
use crate::content::SIZE;
use crate::machine::Disk;
use crate::storage::{Kind, Storage, run};
use crate::world::{World, disk};

async fn verdict(world: &World, driver: &str) -> Verdict {
    let facts = disks(&world.vm().await, &world.sessions.roots).await.unwrap().found.remove(0).facts;
    drivers().find(driver).unwrap().can_take(&facts, &parameters(driver, Path::new("/")))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_whose_data_is_in_another_file_is_left_to_drivers_that_know_both() {
    let storage = Storage::new(Kind::Btrfs);
    let file = storage.images().join("vd0.qcow2");
    let data = format!("data_file={}", storage.images().join("vd0.data").display());
    run(&format!("qemu-img create -q -f qcow2 -o {data}"), &[&file, Path::new(&SIZE.to_string())]);
    let vd0 = Disk { name: "vd0".into(), file, format: "qcow2".into(), options: String::new() };
    let world = World::with(storage, vec![vd0], drivers()).await;
    for driver in ["reflink", "btrfs", "overlay", "lvm"] {
        let verdict = verdict(&world, driver).await;
        assert!(matches!(&verdict, Verdict::Unusable(why) if why.contains("another file")), "{driver}: {verdict:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_not_copied_on_write_is_cloned_all_the_same() {
    let storage = Storage::new(Kind::Btrfs);
    let vd0 = disk(&storage, "vd0", "raw");
    std::fs::remove_file(&vd0.file).unwrap();
    run("qemu-img create -q -f raw -o nocow=on", &[&vd0.file, Path::new(&SIZE.to_string())]);
    assert!(run("lsattr", &[&vd0.file]).split(' ').next().unwrap().contains('C'));
    let mut world = World::with(storage, vec![vd0], drivers()).await;
    for (number, driver) in [(1, "reflink"), (2, "btrfs")] {
        world.write().await;
        let order = world.order(driver, number);
        let taken = world.snapshot(&order).await;
        world.write().await;
        world.check_artifacts(&order, &taken);
        world.check_guest().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_xfs_that_cannot_share_data_is_found_out_before_the_window() {
    let mut world = World::on(Kind::OldXfs, "raw").await;
    world.write().await;
    let before = world.footprint().await;
    let status = world.advance(&world.order("reflink", 1)).await;
    assert_eq!(status.phase, Some(ContentPhase::Failed));
    let said = &find(&status.conditions, types::READY).unwrap().message;
    assert!(said.contains("clone into"), "{said}");
    assert_eq!(world.footprint().await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subvolume_that_holds_only_a_part_of_the_chain_is_not_enough() {
    let storage = Storage::new(Kind::Btrfs);
    let base = storage.root().join("base.qcow2");
    run("qemu-img create -q -f qcow2", &[&base, Path::new(&SIZE.to_string())]);
    let file = storage.images().join("vd0.qcow2");
    run("qemu-img create -q -f qcow2 -F qcow2 -b ../base.qcow2", &[&file]);
    let vd0 = Disk { name: "vd0".into(), file, format: "qcow2".into(), options: String::new() };
    let mut world = World::with(storage, vec![vd0], drivers()).await;
    let verdict = verdict(&world, "btrfs").await;
    assert!(matches!(&verdict, Verdict::Unusable(why) if why.contains("is outside subvolume")), "{verdict:?}");
    world.write().await;
    let order = world.order("reflink", 1);
    let taken = world.snapshot(&order).await;
    world.write().await;
    world.check_artifacts(&order, &taken);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_driver_that_the_agent_does_not_have_is_named() {
    let storage = Storage::new(Kind::Plain);
    let vd0 = disk(&storage, "vd0", "raw");
    let world = World::with(storage, vec![vd0], Drivers::default()).await;
    let status = world.advance(&world.order("loopcopy", 1)).await;
    let accepted = find(&status.conditions, types::ACCEPTED).unwrap();
    assert_eq!(accepted.reason, "UnknownDriver");
    assert!(accepted.message.contains("`loopcopy`"), "{}", accepted.message);
}
