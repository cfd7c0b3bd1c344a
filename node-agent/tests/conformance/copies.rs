//! `copy` of whatever QEMU can open, into whatever the class asks for.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use freezeframe_api::v1alpha1::{ContentPhase, DiskSnapshotState, VMSnapshotContentStatus};
use freezeframe_node_agent::session::order::Order;
use freezeframe_node_agent::session::{Progress, Turn};

use crate::cases::drivers;
use crate::content::SIZE;
use crate::machine::Disk;
use crate::storage::{Kind, Storage, run};
use crate::world::{World, disk, two_disks};

const SOON: Duration = Duration::from_secs(30);

fn with(world: &World, number: u32, parameters: &[(&str, &str)]) -> Order {
    let mut order = world.order("copy", number);
    let given = parameters.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    order.drivers[0].parameters.extend(given);
    order
}

/// Takes a copy while the guest writes, looks at it, and deletes it.
async fn copy_and_delete(world: &mut World, number: u32, parameters: &[(&str, &str)]) -> Vec<PathBuf> {
    world.write().await;
    let before = world.footprint().await;
    let order = with(world, number, parameters);
    let taken = world.snapshot(&order).await;
    world.write().await;
    world.check_artifacts(&order, &taken);
    let files = world.artifacts(&order).into_iter().map(|artifact| artifact.handle).collect();
    world.check_guest().await;
    world.delete(&order).await;
    world.check_tidy(&before).await;
    files
}

/// A server or a device that a disk is; it goes with this.
enum Source {
    Nbd(Child),
    Loop(String),
    File,
}

impl Drop for Source {
    fn drop(&mut self) {
        match self {
            Self::Nbd(server) => drop((server.kill(), server.wait())),
            Self::Loop(device) => drop(Command::new("losetup").args(["-d", device]).status()),
            Self::File => {}
        }
    }
}

fn nbd(storage: &Storage) -> (Source, Disk) {
    let mut vd0 = disk(storage, "vd0", "raw");
    let socket = storage.images().join("nbd.sock");
    let server = Command::new("qemu-nbd").args(["-f", "raw", "-t", "-k"]).arg(&socket).arg(&vd0.file).spawn().unwrap();
    let end = Instant::now() + SOON;
    while !socket.exists() {
        assert!(Instant::now() < end, "qemu-nbd doesn't listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    vd0.file = socket;
    (Source::Nbd(server), vd0)
}

fn block_device(storage: &Storage) -> (Source, Disk) {
    let mut vd0 = disk(storage, "vd0", "raw");
    let device = run("losetup --find --show", &[&vd0.file]).trim().to_owned();
    vd0.file = device.clone().into();
    (Source::Loop(device), vd0)
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_qemu_opens_is_copied() {
    for format in ["qed", "vdi", "vmdk", "nbd", "block device"] {
        println!("{format}");
        let storage = Storage::new(Kind::Plain);
        let (_source, vd0) = match format {
            "nbd" => nbd(&storage),
            "block device" => block_device(&storage),
            file => (Source::File, disk(&storage, "vd0", file)),
        };
        let mut world = World::with(storage, vec![vd0], drivers()).await;
        copy_and_delete(&mut world, 1, &[]).await;
        world.quit().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_is_raw_or_compressed_where_the_class_says_so() {
    let mut world = World::on(Kind::Plain, "qcow2").await;
    let raw = copy_and_delete(&mut world, 1, &[("format", "raw")]).await;
    assert!(raw.iter().all(|file| file.extension().is_some_and(|end| end == "raw")), "{raw:?}");
    world.write().await;
    let (plain, compressed) = (with(&world, 2, &[]), with(&world, 3, &[("compressed", "true")]));
    let taken = world.snapshot(&plain).await;
    world.snapshot(&compressed).await;
    world.check_artifacts(&compressed, &taken);
    let space = |order: &Order| world.artifacts(order).iter().map(|found| blocks(&found.handle)).sum::<u64>();
    let (plain, compressed) = (space(&plain), space(&compressed));
    assert!(compressed * 2 < plain, "{compressed} blocks compressed, {plain} not: was the reserve given back?");
}

fn blocks(file: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(file).unwrap().blocks()
}

/// Keeps what it is told.
#[derive(Default)]
struct Listener(Mutex<Vec<VMSnapshotContentStatus>>);

#[async_trait]
impl Progress for Listener {
    fn cancelled(&self) -> bool {
        false
    }

    async fn tell(&self, status: VMSnapshotContentStatus) {
        self.0.lock().unwrap().push(status);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_copy_tells_how_far_it_is_in_steps() {
    let storage = Storage::new(Kind::Plain);
    let mut disks = two_disks(&storage, "raw");
    disks.truncate(1);
    let mut world = World::with(storage, disks, drivers()).await;
    world.write().await;
    // Eight seconds for the disk's few blocks of data, so that it is looked at twice.
    let order = with(&world, 1, &[("speed", &(SIZE / 8).to_string())]);
    let listener = Listener::default();
    let status = loop {
        match world.sessions.advance(&order, &listener).await.unwrap() {
            Turn::Over(status) => break status,
            Turn::Report(_) => {}
        }
    };
    assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
    let told = listener.0.into_inner().unwrap();
    let percents: Vec<_> = told.iter().map(|status| status.disks[0].progress_percent.unwrap()).collect();
    assert!(!percents.is_empty() && percents.len() <= 20, "{percents:?}");
    assert!(percents.windows(2).all(|two| two[0] + 5 <= two[1]), "{percents:?}");
    let copying = |status: &VMSnapshotContentStatus| {
        status.phase == Some(ContentPhase::Completing) && status.disks[0].state == DiskSnapshotState::Copying
    };
    assert!(told.iter().all(copying), "{told:?}");
}
