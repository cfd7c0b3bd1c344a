//! A real guest, emulated in the emulated node, with a disk on every layer: volumes thin and thick, a qcow2 file, a raw
//! file on XFS, and one in a btrfs subvolume. Frozen, cut at one instant by four drivers and one transaction, let go.

use std::path::Path;
use std::time::{Duration, Instant};

use freezeframe_api::names::DriverName;
use freezeframe_api::v1alpha1::{ClassDriver, ConsistencyLevel, ContentPhase};
use freezeframe_e2e::{Disk, Filesystem, Format, Guest, HostFilesystem, LoopMount, witness};
use freezeframe_node_agent::session::order::Order;

use crate::nested::{MIB, RECORDS, config, formatted, remove_volumes};
use crate::node::{names, run, thick, thin};
use crate::world::World;

/// The drivers in the order that the class has them, after `lvm`.
const OTHERS: [&str; 3] = ["btrfs", "reflink", "overlay"];

/// The guest's disks, each with the driver that must take it.
fn disks(images: &Path) -> [(Disk, &'static str); 5] {
    let subvolume = images.join("btrfs/db-1");
    run("btrfs", &["subvolume", "create", subvolume.to_str().unwrap()].map(str::to_owned));
    let file = |path, format| Disk::create(images.join(path), format, Filesystem::Ext4, MIB).unwrap();
    [
        (formatted(&thin("frozen-a")), "lvm"),
        (file("vdb.qcow2", Format::Qcow2), "overlay"),
        (formatted(&thick("frozen-c")), "lvm"),
        (file("xfs/vdd.raw", Format::Raw), "reflink"),
        (file("btrfs/db-1/vde.raw", Format::Raw), "btrfs"),
    ]
}

/// An order for all disks with every driver that cuts one of them.
fn order() -> Order {
    let mut order = World::order(1);
    order.required = ConsistencyLevel::Filesystem;
    let other = |name: &str| ClassDriver { name: DriverName(name.into()), parameters: [].into() };
    order.drivers.extend(OTHERS.map(other));
    order
}

async fn remove(world: &World, order: &Order) {
    let end = Instant::now() + RECORDS;
    while !world.sessions.delete(order).await.unwrap().over {
        assert!(Instant::now() < end, "what snapshot {} made is not removed", order.content);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_guests_disks_on_every_layer_are_one_instant() {
    let started = Instant::now();
    let world = World::without_vm();
    let mut config = config(&world, vec![]);
    let images = world.directory().join("images");
    let mount = |filesystem, name: &str, mib| {
        LoopMount::new(filesystem, &world.directory().join(format!("{name}.img")), mib, &images.join(name)).unwrap()
    };
    let mounts = [mount(HostFilesystem::Xfs, "xfs", 320), mount(HostFilesystem::Btrfs, "btrfs", 256)];
    let (disks, wanted): (Vec<_>, Vec<_>) = disks(&images).into_iter().unzip();
    let before = names();
    config.disks.clone_from(&disks);
    println!("measured: disks made after {:?}", started.elapsed());
    let guest = Guest::boot(config).await.unwrap();
    println!("measured: guest up after {:?}", started.elapsed());
    guest.await_records(5, RECORDS).await.unwrap();

    let order = order();
    let status = world.advance(&order).await;
    assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
    let evidence = status.consistency.unwrap();
    println!("measured: every layer under a frozen guest, after {:?}: {evidence:?}", started.elapsed());
    assert_eq!(evidence.level, ConsistencyLevel::Filesystem);
    assert_eq!((evidence.frozen_filesystems, evidence.thawed_filesystems), (Some(5), Some(5)));
    let taken: Vec<_> = status.disks.iter().map(|disk| disk.driver.0.as_str()).collect();
    assert_eq!(taken, wanted);
    guest.await_records(5, RECORDS).await.unwrap();

    let artifacts: Vec<_> = status
        .disks
        .iter()
        .zip(&disks)
        .map(|(taken, disk)| Disk::existing(&taken.handle.as_ref().unwrap().0, disk.format))
        .collect();
    let report = witness::check(&artifacts).unwrap();
    report.ensure_row_of_one_instant().unwrap();
    report.ensure_frozen().unwrap();
    println!("measured: witness done after {:?}", started.elapsed());

    remove(&world, &order).await;
    assert_eq!(names(), before);
    guest.await_records(5, RECORDS).await.unwrap();
    let stopped = guest.kill().unwrap();
    let own = witness::check(&disks).unwrap();
    own.ensure_row_of_one_instant().unwrap();
    assert!(own.disks.iter().all(|disk| disk.records.whole >= stopped.records_written()), "{own:?}");
    drop((world, mounts));
    remove_volumes(&["frozen-a", "frozen-c"]);
    println!("measured: over after {:?}", started.elapsed());
}
