//! What is checked before a snapshot is called ready: a damaged image, and how much of it each level finds.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::{ContentPhase, Verify};

use crate::cases::{drivers, for_every_case};
use crate::content::{SIZE, qemu_io};
use crate::machine::Disk;
use crate::storage::{Kind, Storage, run};
use crate::world::{World, disk};

const CLUSTER: u64 = 64 << 10;
/// A cluster that no epoch of the tests writes or reads.
const ELSEWHERE: u64 = 4;
/// Where a qcow2 header has the offsets of its two tables.
const L1_TABLE: u64 = 40;
const REFCOUNT_TABLE: u64 = 48;

fn number(file: &File, at: u64) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, at).unwrap();
    u64::from_be_bytes(bytes)
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

/// A qcow2 disk with data in a cluster that the tests don't touch, maybe compressed.
fn disk_with_data(storage: &Storage, compressed: bool) -> Disk {
    let vd0 = disk(storage, "vd0", "qcow2");
    let write = format!("write -P 7 {} {CLUSTER}", ELSEWHERE * CLUSTER);
    qemu_io(&vd0.file, "qcow2", &[], &[write]).unwrap();
    if compressed {
        let plain = vd0.file.with_extension("plain");
        std::fs::rename(&vd0.file, &plain).unwrap();
        run("qemu-img convert -c -f qcow2 -O qcow2", &[&plain, &vd0.file]);
        std::fs::remove_file(&plain).unwrap();
    }
    vd0
}

/// Counts a cluster that is used once as used twice, which QEMU doesn't notice while it runs.
fn miscount(path: &Path) {
    const WRITABLE_IN_PLACE: u64 = 1 << 63;
    let file = open(path);
    let l2 = number(&file, number(&file, L1_TABLE)) & !WRITABLE_IN_PLACE;
    let data = (number(&file, l2 + ELSEWHERE * 8) & !WRITABLE_IN_PLACE) / CLUSTER;
    let counts = number(&file, number(&file, REFCOUNT_TABLE));
    file.write_all_at(&2_u16.to_be_bytes(), counts + data * 2).unwrap();
}

/// Overwrites compressed data, which no check of the metadata looks at.
fn garble(path: &Path) {
    const OFFSET: u64 = (1 << 54) - 1;
    let file = open(path);
    let l2 = number(&file, number(&file, L1_TABLE)) & !(1 << 63);
    let data = number(&file, l2 + ELSEWHERE * 8) & OFFSET;
    file.write_all_at(&[0xff; 32], data).unwrap();
}

async fn a_full_check_fails(vd0: Disk, storage: Storage, said: &str) {
    let mut world = World::with(storage, vec![vd0], drivers()).await;
    world.write().await;
    let before = world.footprint().await;
    let mut order = world.order("overlay", 1);
    order.verify = Verify::Full;
    let status = world.advance(&order).await;
    let ready = find(&status.conditions, types::READY).unwrap();
    assert_eq!((status.phase, ready.reason.as_str()), (Some(ContentPhase::Failed), reasons::VERIFY_FAILED));
    assert!(ready.message.contains(said) && ready.message.contains("vd0"), "{}", ready.message);
    world.check_tidy(&before).await;
    world.check_guest().await;
    for (number, level) in [(2, Verify::None), (3, Verify::Quick)] {
        let mut order = world.order("overlay", number);
        order.verify = level;
        world.snapshot(&order).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_with_damaged_metadata_fails_a_full_check_and_is_taken_back() {
    let storage = Storage::new(Kind::Plain);
    let vd0 = disk_with_data(&storage, false);
    miscount(&vd0.file);
    Box::pin(a_full_check_fails(vd0, storage, "is damaged")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_whose_data_cannot_be_read_fails_a_full_check_and_is_taken_back() {
    let storage = Storage::new(Kind::Plain);
    let vd0 = disk_with_data(&storage, true);
    garble(&vd0.file);
    Box::pin(a_full_check_fails(vd0, storage, "can't be read")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_good_snapshot_of_every_driver_passes_a_full_check_while_the_guest_writes() {
    for_every_case(|case| async move {
        let mut world = World::of(case).await;
        world.write().await;
        let mut order = world.order(case.driver, 1);
        order.verify = Verify::Full;
        let taken = world.snapshot(&order).await;
        world.write().await;
        world.check_artifacts(&order, &taken);
        assert_eq!(world.artifacts(&order).len(), world.disks.len(), "{SIZE}");
    })
    .await;
}
