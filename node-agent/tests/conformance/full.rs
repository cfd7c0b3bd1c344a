//! A file system with no room left: a snapshot that can't be made fails in words and leaves nothing, one that needs no
//! room may be made, and the VM doesn't notice either.

use std::fs::File;
use std::path::PathBuf;

use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::ContentPhase;
use rustix::fs::{FallocateFlags, fallocate};

use crate::cases::{Case, for_every};
use crate::storage::Kind;
use crate::world::World;

/// Takes all the room that there is, in ever smaller pieces.
fn fill(world: &World) -> PathBuf {
    const SMALLEST: u64 = 4096;
    let path = world.storage.root().join("filler");
    let file = File::create(&path).unwrap();
    let (mut size, mut piece) = (0, 1 << 30);
    while piece >= SMALLEST {
        match fallocate(&file, FallocateFlags::empty(), size, piece) {
            Ok(()) => size += piece,
            Err(_) => piece /= 2,
        }
    }
    file.sync_all().unwrap();
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_full_file_system_a_snapshot_is_whole_or_leaves_nothing_and_the_vm_goes_on() {
    let cases = [
        Case { driver: "reflink", storage: Kind::Xfs, format: "raw" },
        Case { driver: "btrfs", storage: Kind::Btrfs, format: "raw" },
        Case { driver: "overlay", storage: Kind::Xfs, format: "qcow2" },
        Case { driver: "copy", storage: Kind::Xfs, format: "raw" },
    ];
    for_every(cases, |case| async move {
        let mut world = World::of(case).await;
        world.write().await;
        let mut order = world.order(case.driver, 1);
        if case.driver == "copy" {
            let copies = world.storage.root().join("copies");
            std::fs::create_dir(&copies).unwrap();
            order.drivers[0].parameters.insert("directory".into(), copies.display().to_string());
        }
        let filler = fill(&world);
        let before = world.footprint().await;
        let status = world.advance(&order).await;
        assert!(world.machine().is_running().await);
        let ready = find(&status.conditions, types::READY).unwrap();
        println!("{case}: {} {}", ready.reason, ready.message);
        if status.phase == Some(ContentPhase::Ready) {
            assert!(matches!(case.driver, "reflink" | "btrfs"), "{case} found room in none");
            world.check_artifacts(&order, &world.contents);
        } else {
            assert_eq!(ready.reason, reasons::NO_SPACE, "{}", ready.message);
        }
        world.delete(&order).await;
        world.check_tidy(&before).await;
        std::fs::remove_file(filler).unwrap();
        world.write().await;
        world.check_guest().await;
        world.quit().await;
        world.check_images();
    })
    .await;
}
