//! A real guest, emulated in the emulated node, with disks on thin and thick volumes and in a qcow2 file: frozen, cut
//! at one instant by two layers, and let go.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};

use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::names::DriverName;
use freezeframe_api::v1alpha1::{ClassDriver, ConsistencyLevel, ContentPhase, VMSnapshotContentStatus};
use freezeframe_e2e::{Disk, Filesystem, Format, Guest, GuestConfig, Load, witness};
use freezeframe_node_agent::session::order::Order;

use crate::node::{GROUP, Lv, lvm, names, run, thick, thin};
use crate::world::World;

/// Room for a file system with a journal.
const SIZE: &str = "24m";
const BOOT: Duration = Duration::from_secs(900);
const MOST_ATTEMPTS: u32 = 10;
const RECORDS: Duration = Duration::from_secs(300);

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
        Some(pool) => lvm(&format!("lvcreate -qq -y -V {SIZE} --thinpool {GROUP}/{pool} -n {name}")),
        None => lvm(&format!("lvcreate -qq -y -L {SIZE} -Wy -n {name} {GROUP}")),
    };
    run("mkfs.ext4", &["-q".to_owned(), "-F".to_owned(), path.clone()]);
    Disk::existing(path, Format::Raw)
}

/// What a guest's agent that is too slow comes to.
const TOO_SLOW: [&str; 3] = [reasons::GUEST_AGENT_UNAVAILABLE, reasons::FREEZE_TIMED_OUT, reasons::THAW_OWED];

/// Takes a snapshot of all disks. The guest's agent, emulated twice over on a busy machine, may be too slow for the
/// product's bounds, which stay as they are: then the snapshot fails in words, is taken back, and another is taken.
async fn take(world: &World) -> (Order, VMSnapshotContentStatus) {
    let mut number = 1;
    loop {
        let mut order = World::order(number);
        order.required = ConsistencyLevel::Filesystem;
        (order.freeze_timeout, order.max_hold) = (Duration::from_secs(120), Duration::from_secs(240));
        order.drivers.push(ClassDriver { name: DriverName("overlay".into()), parameters: [].into() });
        let status = world.advance(&order).await;
        let ready = find(&status.conditions, types::READY).unwrap();
        if number == MOST_ATTEMPTS || !TOO_SLOW.contains(&ready.reason.as_str()) {
            return (order, status);
        }
        println!("not yet: {}", ready.message);
        let end = Instant::now() + RECORDS;
        while !world.sessions.delete(&order).await.unwrap().over {
            assert!(Instant::now() < end, "what a failed snapshot made is not taken back");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        number += 1;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_and_a_file_of_a_frozen_guest_are_one_instant() {
    lay_out_cache();
    // For the witness: nobody loads it here when a file is mounted.
    run("modprobe", &["loop".to_owned()]);
    let world = World::without_vm();
    let images = world.directory().join("images");
    std::fs::create_dir_all(&images).unwrap();
    let mut config = GuestConfig::new("shop", "db-1", &world.sessions.vm_root, &world.directory().join("guest"));
    config.disks = vec![
        formatted(&thin("frozen-a")),
        formatted(&thick("frozen-b")),
        Disk::create(images.join("vdc.qcow2"), Format::Qcow2, Filesystem::Ext4, 24).unwrap(),
    ];
    let before = names();
    (config.load, config.boot_bound) = (Load::Row, BOOT);
    // It must leave some time to the guest's agent.
    config.writer_pause = Duration::from_millis(500);
    let guest = Guest::boot(config).await.unwrap();
    guest.await_records(10, RECORDS).await.unwrap();

    let (order, status) = take(&world).await;
    assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
    let evidence = status.consistency.unwrap();
    println!("measured: thin, thick and overlay under a frozen guest: {evidence:?}");
    assert_eq!(evidence.level, ConsistencyLevel::Filesystem);
    assert_eq!((evidence.frozen_filesystems, evidence.thawed_filesystems), (Some(3), Some(3)));
    let taken: Vec<_> = status.disks.iter().map(|disk| disk.driver.0.as_str()).collect();
    assert_eq!(taken, ["lvm", "lvm", "overlay"]);
    guest.await_records(10, RECORDS).await.unwrap();

    let formats = [Format::Raw, Format::Raw, Format::Qcow2];
    let artifacts = status.disks.iter().zip(formats);
    let artifacts: Vec<_> =
        artifacts.map(|(disk, format)| Disk::existing(&disk.handle.as_ref().unwrap().0, format)).collect();
    let report = witness::check(&artifacts).unwrap();
    report.ensure_row_of_one_instant().unwrap();
    report.ensure_frozen().unwrap();

    let deletion = world.sessions.delete(&order).await.unwrap();
    assert!(deletion.over, "{:?}", deletion.status.conditions);
    assert_eq!(names(), before);
    guest.await_records(10, RECORDS).await.unwrap();
    let disks = guest.config().disks.clone();
    let stopped = guest.kill().unwrap();
    let own = witness::check(&disks).unwrap();
    own.ensure_row_of_one_instant().unwrap();
    assert!(own.disks.iter().all(|disk| disk.records.whole >= stopped.records_written()), "{own:?}");
}
