//! Somebody who may write to the VM's directory gives names in it to something else.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use freezeframe_node_agent::session::order::Order;

use crate::storage::{Kind, run};
use crate::world::World;

/// A snapshot of a subvolume, and where that is.
async fn snapshot(world: &mut World) -> (Order, PathBuf) {
    world.write().await;
    let order = world.order("btrfs", 1);
    world.snapshot(&order).await;
    let subvolume = world.artifacts(&order)[0].handle.parent().unwrap().to_owned();
    (order, subvolume)
}

fn subvolume(path: &Path) {
    run("btrfs subvolume create", &[path]);
    std::fs::write(path.join("data"), "somebody else's").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_in_the_place_of_a_btrfs_snapshot_is_not_followed() {
    let mut world = World::on(Kind::Btrfs, "raw").await;
    let (order, taken) = snapshot(&mut world).await;
    let victim = world.storage.root().join("victim");
    subvolume(&victim);
    std::fs::rename(&taken, taken.with_file_name("away")).unwrap();
    symlink("../victim", &taken).unwrap();
    world.delete(&order).await;
    assert!(victim.join("data").exists());
    assert!(taken.is_symlink());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subvolume_in_the_place_of_a_btrfs_snapshot_is_not_deleted_nor_one_of_another_snapshot() {
    let mut world = World::on(Kind::Btrfs, "raw").await;
    let (order, taken) = snapshot(&mut world).await;
    let away = taken.with_file_name("away");
    std::fs::rename(&taken, &away).unwrap();
    subvolume(&taken);
    world.delete(&order).await;
    assert!(taken.join("data").exists() && away.exists());

    run("btrfs subvolume delete", &[&taken]);
    world.sessions.journal.forget(&order.uid).unwrap();
    let (order, taken) = snapshot(&mut world).await;
    std::fs::rename(&taken, taken.with_file_name("later")).unwrap();
    std::fs::rename(&away, &taken).unwrap();
    world.delete(&order).await;
    assert!(taken.exists(), "another snapshot of the same subvolume");
}
