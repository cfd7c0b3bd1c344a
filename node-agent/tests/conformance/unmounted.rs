//! Deletions while the file system isn't mounted that the snapshot's data is on.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use freezeframe_api::conditions::{find, types};
use freezeframe_node_agent::session::order::Order;

use crate::cases::{Case, drivers, for_every_case};
use crate::storage::{Kind, Storage, run};
use crate::world::{World, two_disks};

const SOON: Duration = Duration::from_secs(30);

/// A VM whose directory is a file system of its own, where copies go too, and a good snapshot of it.
async fn snapshot(case: Case) -> (World, Order) {
    let kind = if case.storage == Kind::Plain { Kind::OldXfs } else { case.storage };
    let storage = Storage::of_vm(kind);
    let disks = two_disks(&storage, case.format);
    let mut world = World::with(storage, disks, drivers()).await;
    world.write().await;
    let mut order = world.order(case.driver, 1);
    if let Some(directory) = order.drivers[0].parameters.get_mut("directory") {
        *directory = world.storage.images().display().to_string();
    }
    world.snapshot(&order).await;
    (world, order)
}

/// A process that has just ended may hold the file system for a moment.
async fn unmount(mountpoint: &Path) {
    let end = Instant::now() + SOON;
    while !Command::new("umount").arg(mountpoint).status().unwrap().success() {
        assert!(Instant::now() < end, "{} is in use", mountpoint.display());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_whose_file_system_is_not_mounted_is_deleted_when_it_is() {
    for_every_case(|case| async move {
        let (mut world, order) = snapshot(case).await;
        world.quit().await;
        let images = world.storage.images();
        unmount(&images).await;
        for _ in 0..2 {
            let deletion = world.sessions.delete(&order).await.unwrap();
            let removed = find(&deletion.status.conditions, types::REMOVED).unwrap();
            assert!(!deletion.over && removed.message.contains("mount it"), "{}", removed.message);
        }
        run("mount -o loop", &[&world.storage.image(), &images]);
        world.delete(&order).await;
        let files: Vec<_> = world.storage.contents().into_iter().collect();
        let disks: Vec<_> = world.disks.iter().map(|disk| disk.file.display().to_string()).collect();
        assert_eq!(files, disks);
        world.check_images();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_that_left_its_directory_empty_is_over_though_its_end_was_not_written_down() {
    for_every_case(|case| async move {
        let (mut world, order) = snapshot(case).await;
        world.quit().await;
        let mut record = world.sessions.journal.load(&order.uid).unwrap().unwrap();
        world.delete(&order).await;
        // As an agent finds it that was killed after the last file went.
        record.removing = true;
        record.removed_from = (0..record.tasks.len()).collect();
        world.sessions.journal.save(&record).unwrap();
        for disk in &world.disks {
            std::fs::remove_file(&disk.file).unwrap();
        }
        // What was merged is in the disk, without which there is nothing to be sure of.
        if !drivers().find(case.driver).unwrap().merges() {
            world.delete(&order).await;
        }
    })
    .await;
}
