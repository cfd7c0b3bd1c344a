//! A real guest, emulated in the emulated node, with a disk on every layer: volumes thin and thick, a qcow2 file, a raw
//! file on XFS, and one in a btrfs subvolume. Frozen, cut at one instant by four drivers and one transaction, let go.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};

use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::names::DriverName;
use freezeframe_api::v1alpha1::{ClassDriver, ConsistencyLevel, ContentPhase, VMSnapshotContentStatus};
use freezeframe_e2e::{Disk, Filesystem, Format, Guest, GuestConfig, HostFilesystem, Load, LoopMount, witness};
use freezeframe_node_agent::session::order::Order;

use crate::node::{GROUP, Lv, lvm, names, run, thick, thin};
use crate::world::World;

/// Room for a file system with a journal, in MiB.
const MIB: u64 = 24;
const BOOT: Duration = Duration::from_secs(900);
/// For how long snapshots are tried again that the product's own bounds refuse.
const PATIENCE: Duration = Duration::from_secs(1500);
const RECORDS: Duration = Duration::from_secs(300);
/// The drivers in the order that the class has them, after `lvm`.
const OTHERS: [&str; 3] = ["btrfs", "reflink", "overlay"];

/// The guest's kernel and initramfs, where the parts of the end-to-end tests look for them.
fn lay_out_cache() {
    let cache = std::env::var("FREEZEFRAME_CACHE").expect("FREEZEFRAME_CACHE must name a directory to be made");
    let guest = Path::new(&cache).join("guest");
    std::fs::create_dir_all(&guest).unwrap();
    for file in ["vmlinuz", "initrd"] {
        symlink(Path::new("/share").join(file), guest.join(file)).unwrap();
    }
}

fn formatted(volume: &Lv) -> Disk {
    let (name, path) = (&volume.name, volume.path());
    match &volume.pool {
        Some(pool) => lvm(&format!("lvcreate -qq -y -V {MIB}m --thinpool {GROUP}/{pool} -n {name}")),
        None => lvm(&format!("lvcreate -qq -y -L {MIB}m -Wy -n {name} {GROUP}")),
    };
    run("mkfs.ext4", &["-q".to_owned(), "-F".to_owned(), path.clone()]);
    Disk::existing(path, Format::Raw)
}

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

/// What a guest's agent that is too slow comes to.
const TOO_SLOW: [&str; 3] = [reasons::GUEST_AGENT_UNAVAILABLE, reasons::FREEZE_TIMED_OUT, reasons::THAW_OWED];

/// Takes a snapshot of all disks. The guest's agent, emulated twice over on a busy machine, may be too slow for the
/// product's bounds, which stay as they are: then the snapshot fails in words, is taken back, and another is taken.
async fn take(world: &World) -> (Order, VMSnapshotContentStatus) {
    let (mut number, end) = (1, Instant::now() + PATIENCE);
    loop {
        let mut order = World::order(number);
        order.required = ConsistencyLevel::Filesystem;
        (order.freeze_timeout, order.max_hold) = (Duration::from_secs(120), Duration::from_secs(240));
        let other = |name: &str| ClassDriver { name: DriverName(name.into()), parameters: [].into() };
        order.drivers.extend(OTHERS.map(other));
        let status = world.advance(&order).await;
        let ready = find(&status.conditions, types::READY).unwrap();
        if Instant::now() > end || !TOO_SLOW.contains(&ready.reason.as_str()) {
            return (order, status);
        }
        println!("not yet: {}", ready.message);
        remove(world, &order).await;
        number += 1;
    }
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
    lay_out_cache();
    // For the file systems and the witness: nobody loads it here when a file is mounted.
    run("modprobe", &["loop".to_owned()]);
    let world = World::without_vm();
    let images = world.directory().join("images");
    let mount = |filesystem, name: &str, mib| {
        LoopMount::new(filesystem, &world.directory().join(format!("{name}.img")), mib, &images.join(name)).unwrap()
    };
    let mounts = [mount(HostFilesystem::Xfs, "xfs", 320), mount(HostFilesystem::Btrfs, "btrfs", 256)];
    let (disks, wanted): (Vec<_>, Vec<_>) = disks(&images).into_iter().unzip();
    let before = names();
    let mut config = GuestConfig::new("shop", "db-1", &world.sessions.vm_root, &world.directory().join("guest"));
    (config.disks, config.load, config.boot_bound) = (disks.clone(), Load::Row, BOOT);
    // It must leave some time to the guest's agent.
    config.writer_pause = Duration::from_secs(2);
    println!("measured: disks made after {:?}", started.elapsed());
    let guest = Guest::boot(config).await.unwrap();
    println!("measured: guest up after {:?}", started.elapsed());
    guest.await_records(5, RECORDS).await.unwrap();

    let (order, status) = take(&world).await;
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
    for volume in ["frozen-a", "frozen-c"] {
        lvm(&format!("lvremove -qq -f {GROUP}/{volume}"));
    }
    println!("measured: over after {:?}", started.elapsed());
}
