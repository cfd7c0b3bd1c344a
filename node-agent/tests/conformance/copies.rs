//! `copy` of whatever QEMU can open, into whatever the class asks for.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use freezeframe_api::v1alpha1::{ContentPhase, DiskSnapshotState, VMSnapshotContentStatus};
use freezeframe_node_agent::hypervisor::image::trusted_directory;
use freezeframe_node_agent::hypervisor::lock::ImageLock;
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

/// A file that gets the number which another had: the file system gives it away again, sooner or later.
fn with_number_of(gone: &Path) -> PathBuf {
    const MOST: u32 = 20_000;
    let number = std::fs::metadata(gone).unwrap().ino();
    std::fs::remove_file(gone).unwrap();
    let mut others = (0..MOST).map(|at| {
        let other = gone.with_extension(format!("other-{at}"));
        std::fs::write(&other, "mine").unwrap();
        other
    });
    others.find(|other| std::fs::metadata(other).unwrap().ino() == number).expect("no file got the number again")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_somebody_else_with_a_copys_name_and_inode_number_is_not_deleted() {
    let mut world = World::on(Kind::Xfs, "qcow2").await;
    world.write().await;
    let copies = world.storage.root().join("copies");
    std::fs::create_dir(&copies).unwrap();
    let order = with(&world, 1, &[("directory", copies.to_str().unwrap())]);
    world.snapshot(&order).await;
    let copy = world.artifacts(&order)[0].handle.clone();
    std::fs::rename(with_number_of(&copy), &copy).unwrap();
    world.delete(&order).await;
    assert_eq!(std::fs::read_to_string(&copy).unwrap(), "mine");
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

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_is_called_what_the_class_says_and_never_takes_a_name_that_is_taken() {
    let mut world = World::on(Kind::Plain, "raw").await;
    let copies = world.storage.root().join("copies");
    std::fs::create_dir(&copies).unwrap();
    let named = |world: &World, number| {
        let given = [("directory", copies.to_str().unwrap()), ("outputTemplate", "{namespace}/{vm}.{disk}.img")];
        with(world, number, &given)
    };
    world.write().await;
    let order = named(&world, 1);
    let taken = world.snapshot(&order).await;
    world.check_artifacts(&order, &taken);
    let files: Vec<_> = world.artifacts(&order).into_iter().map(|artifact| artifact.handle).collect();
    assert_eq!(files, ["vd0", "vd1"].map(|disk| copies.join(format!("shop/db-1.{disk}.img"))));
    world.write().await;
    let refused = refused(&world, &named(&world, 2)).await;
    assert!(refused.contains("db-1.vd0.img is there already"), "{refused}");
    world.check_artifacts(&order, &taken);
    world.delete(&order).await;
    assert!(files.iter().all(|file| !file.exists()));
    // What somebody removed with its directory is gone, and its deletion waits for nothing.
    let order = named(&world, 3);
    world.snapshot(&order).await;
    std::fs::remove_dir_all(copies.join("shop")).unwrap();
    // With nothing at all in it, the class's directory might not be mounted.
    std::fs::write(copies.join("other"), "").unwrap();
    world.delete(&order).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_class_that_names_copies_is_refused_outside_the_roots_and_by_the_bad_key() {
    let world = World::on(Kind::Plain, "raw").await;
    let before = world.files();
    let outside = refused(&world, &with(&world, 1, &[("outputTemplate", "{disk}")])).await;
    assert!(outside.contains("InvalidParameter") && outside.contains("`directory`"), "{outside}");
    let escapes = refused(&world, &with(&world, 2, &[("outputTemplate", "../{disk}")])).await;
    assert!(escapes.contains("InvalidParameter") && escapes.contains("`outputTemplate`"), "{escapes}");
    // A directory on the way that leads elsewhere is not followed.
    let copies = world.storage.root().join("copies");
    std::fs::create_dir(&copies).unwrap();
    std::os::unix::fs::symlink(world.copies.path(), copies.join("shop")).unwrap();
    let given = [("directory", copies.to_str().unwrap()), ("outputTemplate", "{namespace}/{disk}")];
    let linked = refused(&world, &with(&world, 3, &given)).await;
    assert!(linked.contains("failed to open directory"), "{linked}");
    std::fs::remove_file(copies.join("shop")).unwrap();
    assert_eq!(world.files(), before);
}

/// A directory of files that users made, and a class that names it.
fn with_targets(world: &World, number: u32, targets: &[(&str, &str)]) -> (PathBuf, Order) {
    let root = world.storage.root().join("targets");
    std::fs::create_dir_all(root.join("shop")).unwrap();
    let mut order = with(world, number, &[("targets", root.to_str().unwrap())]);
    order.targets = targets.iter().map(|(disk, file)| ((*disk).to_owned(), (*file).to_owned())).collect();
    (root.join("shop"), order)
}

fn create(file: &Path, format: &str, size: u64) {
    run(&format!("qemu-img create -q -f {format}"), &[file, Path::new(&size.to_string())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_goes_to_the_file_that_its_user_made_and_leaves_it_to_them() {
    for format in ["qcow2", "raw"] {
        let mut world = World::on(Kind::Plain, "raw").await;
        let (files, mut order) = with_targets(&world, 1, &[("vd0", "mine")]);
        order.drivers[0].parameters.insert("format".into(), format.into());
        let mine = files.join("mine");
        create(&mine, format, SIZE);
        world.write().await;
        let taken = world.snapshot(&order).await;
        world.check_artifacts(&order, &taken);
        assert_eq!(world.artifacts(&order)[0].handle, mine);
        let other = world.artifacts(&order)[1].handle.clone();
        assert!(other.starts_with(world.copies.path()), "{}", other.display());
        let deletion = world.sessions.delete(&order).await.unwrap();
        assert!(deletion.over && !other.exists());
        let said = format!("{:?}", deletion.status);
        assert!(said.contains("Retained") && said.contains("made by its user"), "{said}");
        taken[0].check(&mine, format).unwrap();
        assert_eq!(std::fs::read_dir(&files).unwrap().count(), 1, "something is left beside it");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_a_copy_cannot_go_to_is_refused_and_left_as_it_was() {
    let world = World::on(Kind::Plain, "raw").await;
    let (files, _) = with_targets(&world, 1, &[]);
    let elsewhere = world.storage.root().join("elsewhere");
    create(&elsewhere, "qcow2", SIZE);
    create(&files.join("small"), "qcow2", SIZE / 2);
    create(&files.join("raw"), "raw", SIZE);
    create(&files.join("full"), "qcow2", SIZE);
    run("qemu-io -f qcow2 -c", &[Path::new("write 1M 64k"), &files.join("full")]);
    create(&files.join("linked"), "qcow2", SIZE);
    std::fs::hard_link(files.join("linked"), files.join("linked-too")).unwrap();
    std::os::unix::fs::symlink(&elsewhere, files.join("symlink")).unwrap();
    run("qemu-img create -q -f qcow2 -F qcow2 -b", &[&elsewhere, &files.join("backed")]);
    create(&files.join("used"), "qcow2", SIZE);
    let directory = trusted_directory(&files).unwrap();
    let _used = ImageLock::take(&directory, "used").unwrap().unwrap();
    let before = world.files();
    let cases = [
        ("absent", "isn't there"),
        ("small", "bytes, and disk"),
        ("raw", "not a qcow2 image"),
        ("full", "is not empty"),
        ("linked", "other names"),
        ("symlink", "not a regular file"),
        ("backed", "needs another file"),
        ("used", "is in use"),
        // The API accepts no such name; what has a slash is a volume of a group.
        ("../shop/small", "volume group"),
    ];
    for (number, (file, why)) in (2..).zip(cases) {
        let (_, order) = with_targets(&world, number, &[("vd0", file)]);
        let said = refused(&world, &order).await;
        assert!(said.contains("InvalidTarget") && said.contains(why), "{file}: {said}");
    }
    let (_, unknown) = with_targets(&world, 30, &[("vd7", "small")]);
    assert!(refused(&world, &unknown).await.contains("DiskNotFound"));
    let (_, mut no_directory) = with_targets(&world, 31, &[("vd0", "small")]);
    no_directory.drivers[0].parameters.remove("targets");
    assert!(refused(&world, &no_directory).await.contains("`targets`"));
    assert_eq!(world.files(), before);
}

/// Expects a snapshot to fail, and says with what reason and message.
async fn refused(world: &World, order: &Order) -> String {
    let status = world.advance(order).await;
    assert_eq!(status.phase, Some(ContentPhase::Failed), "{:?}", status.conditions);
    let said = status.conditions.iter().map(|found| format!("{} {} {}", found.type_, found.reason, found.message));
    said.collect::<Vec<_>>().join("\n")
}

fn blocks(file: &Path) -> u64 {
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
