//! Disks that are more than one image: a backing file that two disks share, and snapshots of several drivers in turn.

use std::fmt;
use std::path::Path;

use freezeframe_node_agent::drivers::Verdict;
use freezeframe_node_agent::hypervisor::disks::disks;

use crate::cases::{drivers, for_every, for_every_case_of, parameters};
use crate::content::{Content, qemu_io};
use crate::machine::Disk;
use crate::storage::{Kind, Storage, run};
use crate::world::{World, disk};

/// Two disks over one base, which has data that neither disk has itself; `backing` is how they name it.
fn two_disks_on_one_base(storage: &Storage, backing: &Path) -> (Vec<Disk>, Vec<Content>) {
    let base = disk(storage, "base", "qcow2");
    let mut content = Content::default();
    qemu_io(&base.file, "qcow2", &[], &content.write(200)).unwrap();
    let disks = ["vd0", "vd1"].map(|name| {
        let file = storage.images().join(format!("{name}.qcow2"));
        run("qemu-img create -q -f qcow2 -F qcow2 -b", &[backing, &file]);
        Disk { name: name.into(), file, format: "qcow2".into(), options: String::new() }
    });
    (disks.into(), vec![content; 2])
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_on_one_backing_file_keep_their_snapshots_and_the_file_stays() {
    for_every_case_of("qcow2", |case| async move {
        let storage = Storage::new(case.storage);
        let (images, contents) = two_disks_on_one_base(&storage, Path::new("base.qcow2"));
        let mut world = World::with(storage, images, drivers()).await;
        world.contents = contents;
        let before = world.footprint().await;
        let orders = [1, 2].map(|number| world.order(case.driver, number));
        world.write().await;
        let first = world.snapshot(&orders[0]).await;
        world.write().await;
        let second = world.snapshot(&orders[1]).await;
        world.write().await;
        world.check_artifacts(&orders[0], &first);
        world.check_artifacts(&orders[1], &second);
        world.restart().await;
        world.delete(&orders[0]).await;
        world.check_artifacts(&orders[1], &second);
        world.check_guest().await;
        world.delete(&orders[1]).await;
        world.check_tidy(&before).await;
        world.check_guest().await;
        world.quit().await;
        world.check_images();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backing_file_named_by_its_whole_path_is_cloned_but_not_left_to_a_subvolume() {
    let storage = Storage::new(Kind::Btrfs);
    let base = storage.images().join("base.qcow2");
    let (images, contents) = two_disks_on_one_base(&storage, &base);
    let mut world = World::with(storage, images, drivers()).await;
    world.contents = contents;
    let facts = disks(&world.vm().await, &world.sessions.roots).await.unwrap().found.remove(0).facts;
    let verdict = |driver: &str| drivers().find(driver).unwrap().can_take(&facts, &parameters(driver, Path::new("/")));
    assert!(matches!(verdict("btrfs"), Verdict::Unusable(why) if why.contains("absolute path")));
    assert!(matches!(verdict("reflink"), Verdict::Usable(_)));
    let order = world.order("reflink", 1);
    let taken = world.snapshot(&order).await;
    let handle = world.artifacts(&order).remove(0).handle;
    let chain = run("qemu-img info -U --backing-chain", &[&handle]);
    assert!(!chain.contains(&format!("image: {}\n", base.display())), "{chain}");
    world.write().await;
    world.check_artifacts(&order, &taken);
}

/// The order in which snapshots of several drivers are taken, and that in which they go.
struct Mixture {
    taken: Vec<&'static str>,
    gone: [usize; 4],
}

impl fmt::Display for Mixture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} gone as {:?}", self.taken, self.gone)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_of_several_drivers_of_one_disk_leave_each_other_alone() {
    let rotations = (0..4).map(|by| {
        let mut taken = vec!["overlay", "reflink", "btrfs", "copy"];
        taken.rotate_left(by);
        taken
    });
    let mixtures = rotations.flat_map(|taken| {
        [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]].map(|gone| Mixture { taken: taken.clone(), gone })
    });
    for_every(mixtures, |Mixture { taken, gone }| async move {
        let mut world = World::on(Kind::Btrfs, "qcow2").await;
        let before = world.footprint().await;
        let mut snapshots = vec![];
        for (number, driver) in (1..).zip(taken) {
            world.write().await;
            let order = world.order(driver, number);
            let content = world.snapshot(&order).await;
            snapshots.push((order, content));
        }
        world.write().await;
        for (at, number) in gone.into_iter().enumerate() {
            world.delete(&snapshots[number].0).await;
            for &left in &gone[at + 1..] {
                world.check_artifacts(&snapshots[left].0, &snapshots[left].1);
            }
            world.check_guest().await;
        }
        world.check_tidy(&before).await;
    })
    .await;
}
