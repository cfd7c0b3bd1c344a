//! Every storage layer under a guest that writes all the while: each driver alone, and all of them in one snapshot.
//! Needs root and `cargo xtask setup`.
//!
//! Orders of deletion, crashes and odd images are the conformance suite's; here a real guest is frozen by a real agent,
//! and what it was told is durable is there.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use freezeframe_api::conditions::types;
use freezeframe_api::v1alpha1::{ConsistencyEvidence, ConsistencyLevel, Phase, TargetDisk, VMSnapshot, VMTarget};
use freezeframe_e2e::snapshots::{checksums, images, phase};
use freezeframe_e2e::{
    Disk, DiskSpec, Filesystem, Format, Load, Place, World, WorldConfig, await_condition, await_object, run,
    verify_by_booting, witness,
};
use kube::Api;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const VM: &str = "db-1";

/// A guest's disk and the driver that must take it.
#[derive(Clone, Copy)]
struct Layer {
    place: Place,
    format: Format,
    driver: &'static str,
}

const fn layer(place: Place, format: Format, driver: &'static str) -> Layer {
    Layer { place, format, driver }
}

/// A world with its disks, and what its snapshots held when they were taken.
struct Layers {
    world: World,
    disks: Vec<Layer>,
    load: Load,
    known: BTreeMap<String, Vec<u64>>,
    /// What is there when no snapshot is.
    files: BTreeSet<String>,
}

impl Layers {
    /// A guest on the layers, and class `layers` with these drivers.
    async fn start(layers: &[Layer], load: Load, drivers: &[&str]) -> Result<Self> {
        let filesystems = [Filesystem::Ext4, Filesystem::Xfs].into_iter().cycle();
        let disk = |(layer, filesystem): (&Layer, _)| DiskSpec { format: layer.format, filesystem, mib: 320 };
        let config = WorldConfig {
            disks: layers.iter().zip(filesystems).map(disk).collect(),
            places: layers.iter().map(|layer| layer.place).collect(),
            load,
            ..WorldConfig::default()
        };
        let world = World::start(config).await?;
        let copies = world.copies()?;
        let driver = |name: &&str| match *name {
            "copy" => json!({"name": "copy", "parameters": {"directory": copies}}),
            "overlay, followed" => json!({"name": "overlay", "parameters": {"follow": "true"}}),
            name => json!({"name": name}),
        };
        world.apply_class("layers", &drivers.iter().map(driver).collect::<Value>())?;
        let mut this = Self { world, disks: layers.to_vec(), load, known: BTreeMap::new(), files: BTreeSet::new() };
        this.files = this.found()?;
        Ok(this)
    }

    /// All files of images and copies, and all subvolumes, also those that are deleted and not yet gone.
    fn found(&self) -> Result<BTreeSet<String>> {
        let mut found = BTreeSet::new();
        list(&self.world.site.image_roots[0], &mut found)?;
        list(&self.world.copies()?, &mut found)?;
        if self.disks.iter().any(|layer| layer.place == Place::Btrfs) {
            let directory = self.world.image_directory_on(Place::Btrfs, VM);
            for deleted in [&["subvolume", "list"][..], &["subvolume", "list", "-d"]] {
                let listed = run("btrfs", deleted.iter().map(Path::new).chain([directory.as_path()]))?;
                found.extend(listed.lines().filter_map(|line| line.split(" path ").nth(1)).map(str::to_owned));
            }
        }
        Ok(found)
    }

    /// Takes a snapshot while the guest writes; it must be Ready, of one proved instant, each disk by its driver.
    async fn take(&mut self, name: &str) -> Result<VMSnapshot> {
        self.world.guest()?.await_records(20, SOON).await?;
        let taken = self.world.take(name, json!({"vmName": VM, "className": "layers"})).await?;
        let logged = |error| self.world.with_logs(error);
        self.ensure_proved(&taken).map_err(logged)?;
        let report = witness::check(&images(&taken)?)?;
        let row = if self.load == Load::Row { report.ensure_row_of_one_instant() } else { Ok(()) };
        row.and_then(|()| report.ensure_frozen()).map_err(logged)?;
        self.known.insert(name.to_owned(), checksums(&images(&taken)?)?);
        self.world.guest()?.await_records(20, SOON).await?;
        Ok(taken)
    }

    fn ensure_proved(&self, taken: &VMSnapshot) -> Result<()> {
        ensure!(phase(taken) == Some(Phase::Ready), "not Ready: {:#?}", taken.status);
        let evidence = evidence(taken)?;
        let frozen = i64::try_from(self.disks.len())?;
        ensure!(evidence.level == ConsistencyLevel::Filesystem, "{evidence:?}");
        ensure!(
            evidence.frozen_filesystems == Some(frozen) && evidence.thawed_filesystems == Some(frozen),
            "{evidence:?}"
        );
        let outside_qemu = self.disks.iter().any(|layer| matches!(layer.driver, "reflink" | "btrfs"));
        // What is cut by QEMU and what is cut outside are together one instant only while nothing runs.
        ensure!(!outside_qemu || evidence.pause_millis > 0 && evidence.skew_micros > 0, "{evidence:?}");
        ensure!(outside_qemu || evidence.pause_millis == 0, "a cut by QEMU needs no pause: {evidence:?}");
        let disks = &taken.status.as_ref().context("a status")?.disks;
        let drivers = disks.iter().map(|disk| disk.driver.0.as_str());
        ensure!(drivers.eq(self.disks.iter().map(|layer| layer.driver)), "taken by other drivers: {disks:?}");
        ensure!(disks.iter().all(|disk| disk.driver_reason.is_some()), "without a reason: {disks:?}");
        println!("{VM}: {evidence:?}");
        Ok(())
    }

    /// Every snapshot that is left reads as it did.
    async fn check(&self) -> Result<()> {
        for (name, then) in &self.known {
            let images = images(&self.world.read_snapshot(name).await?)?;
            ensure!(checksums(&images)? == *then, "{name} reads differently: {images:?}");
        }
        Ok(())
    }

    async fn delete(&mut self, name: &str) -> Result<()> {
        self.world.delete(name).await?;
        self.known.remove(name);
        self.check().await.map_err(|error| self.world.with_logs(error))?;
        self.world.guest()?.await_records(10, SOON).await.map(drop)
    }

    /// QEMU dies and is started with its old command line: all that the guest was told is durable is there.
    async fn restart(&mut self) -> Result<()> {
        let stopped = self.world.guest.take().context("the guest")?.kill()?;
        let written = stopped.records_written();
        let guest = stopped.restart_same_command_line().await?;
        ensure!(guest.records_written() > written, "told durable: {written}, found: {}", guest.records_written());
        self.world.guest = Some(guest);
        self.check().await
    }

    /// No snapshot is left and the guest powers off: nothing but its disks is there, and they are whole.
    async fn ensure_unharmed(mut self) -> Result<()> {
        ensure!(self.known.is_empty(), "snapshots are left");
        ensure!(self.found()? == self.files, "left: {:?} beside {:?}", self.found()?, self.files);
        let stopped = self.world.guest.take().context("the guest")?.quiesce_and_quit().await?;
        let disks = stopped.images().into_iter().zip(&self.disks);
        let disks: Vec<_> = disks.map(|(path, layer)| Disk::existing(path, layer.format)).collect();
        witness::check(&disks)?.ensure_frozen()?;
        for disk in verify_by_booting(&disks, &self.world.directory().join("verify"))? {
            ensure!(disk.clean && disk.bad == 0 && disk.records >= stopped.records_written(), "{disk:?}");
        }
        Ok(())
    }
}

fn evidence(taken: &VMSnapshot) -> Result<ConsistencyEvidence> {
    taken.status.as_ref().and_then(|status| status.consistency.clone()).context("a snapshot without evidence")
}

fn list(directory: &Path, found: &mut BTreeSet<String>) -> Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            list(&entry.path(), found)?;
        } else {
            found.insert(entry.path().display().to_string());
        }
    }
    Ok(())
}

/// Three snapshots, of which the middle one goes first, then the newest, then the oldest, with the VM restarted in
/// between.
async fn keeps_what_it_took(layers: &[Layer], load: Load, drivers: &[&str]) -> Result<()> {
    let mut layers = Layers::start(layers, load, drivers).await?;
    for name in ["one", "two", "three"] {
        layers.take(name).await?;
    }
    layers.delete("two").await?;
    layers.restart().await?;
    layers.delete("three").await?;
    layers.delete("one").await?;
    layers.ensure_unharmed().await
}

#[tokio::test(flavor = "multi_thread")]
async fn clones_on_xfs_are_one_instant_of_a_writing_guest_and_go_in_any_order() -> Result<()> {
    let disks = [layer(Place::Xfs, Format::Raw, "reflink"), layer(Place::Xfs, Format::Qcow2, "reflink")];
    keeps_what_it_took(&disks, Load::Heavy, &["reflink"]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_of_a_btrfs_subvolume_are_one_instant_of_a_writing_guest_and_go_in_any_order() -> Result<()> {
    let disks = [layer(Place::Btrfs, Format::Raw, "btrfs"), layer(Place::Btrfs, Format::Qcow2, "btrfs")];
    keeps_what_it_took(&disks, Load::Heavy, &["btrfs"]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_are_one_instant_of_a_writing_guest_and_go_in_any_order() -> Result<()> {
    let disks = [layer(Place::Plain, Format::Raw, "copy"), layer(Place::Plain, Format::Qcow2, "copy")];
    keeps_what_it_took(&disks, Load::Light, &["copy"]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn overlays_are_one_instant_of_a_writing_guest_and_go_in_any_order() -> Result<()> {
    let disks = [layer(Place::Plain, Format::Qcow2, "overlay"), layer(Place::Plain, Format::Qcow2, "overlay")];
    keeps_what_it_took(&disks, Load::Light, &["overlay"]).await
}

/// What the VMTarget says to start each disk with, once it says that the owner has to follow, or needn't any more.
async fn told(world: &World, needed: &str) -> Result<Vec<Option<Disk>>> {
    let targets: Api<VMTarget> = Api::namespaced(world.client.clone(), &world.namespace);
    let is_told = |target: &VMTarget| {
        let conditions = target.status.iter().flat_map(|status| &status.conditions);
        conditions.into_iter().any(|found| found.type_ == types::FOLLOW_NEEDED && found.status == needed)
    };
    let target = await_object(&targets, VM, "FollowNeeded to be told", SOON, is_told).await?;
    let disks = target.status.context("a status")?.disks;
    let start_with = |disk: &TargetDisk| {
        let now = disk.start_with.as_ref()?;
        let format = if now.format == "raw" { Format::Raw } else { Format::Qcow2 };
        Some(Disk::existing(&now.path, format))
    };
    Ok(disks.iter().map(start_with).collect())
}

/// The VM is killed, and started with what its owner was told.
async fn follow(layers: &mut Layers) -> Result<()> {
    let now = told(&layers.world, "True").await?;
    let stopped = layers.world.guest.take().context("the guest")?.kill()?;
    let was = stopped.images().into_iter().zip(&layers.disks);
    let disks = now.into_iter().zip(was).map(|(now, (was, layer))| now.unwrap_or(Disk::existing(was, layer.format)));
    let (disks, written) = (disks.collect(), stopped.records_written());
    let guest = stopped.restart_with(disks).await?;
    ensure!(guest.records_written() > written, "told durable: {written}, found: {}", guest.records_written());
    layers.world.guest = Some(guest);
    layers.check().await?;
    ensure!(told(&layers.world, "False").await?.iter().all(Option::is_none), "it is followed, and still told");
    Ok(())
}

/// The disk is another image from the first snapshot on, and its old one again once the last is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_raw_disk_is_followed_to_its_layer_and_back_while_its_guest_writes() -> Result<()> {
    let disks = [layer(Place::Plain, Format::Raw, "overlay"), layer(Place::Plain, Format::Qcow2, "overlay")];
    let mut layers = Layers::start(&disks, Load::Light, &["overlay, followed"]).await?;
    let old = layers.world.guest()?.config().disks.clone();
    let taken = layers.take("one").await?;
    let told = taken.status.context("a status")?.disks.into_iter().map(|disk| disk.start_with.is_some());
    ensure!(told.eq([true, false]), "only the raw disk is another image now");
    layers.take("two").await?;
    follow(&mut layers).await?;
    layers.take("three").await?;
    for name in ["two", "one", "three"] {
        layers.delete(name).await?;
    }
    follow(&mut layers).await?;
    let now = &layers.world.guest()?.config().disks;
    ensure!(now.iter().zip(&old).all(|(now, old)| now.path == old.path), "not the old command line: {now:?}");
    layers.ensure_unharmed().await
}

/// A disk for every layer that needs no device-mapper, and the order of drivers in which each takes its own.
const EVERY_LAYER: [Layer; 4] = [
    layer(Place::Plain, Format::Qcow2, "overlay"),
    layer(Place::Xfs, Format::Raw, "reflink"),
    layer(Place::Btrfs, Format::Qcow2, "btrfs"),
    layer(Place::Plain, Format::Raw, "copy"),
];
const EVERY_DRIVER: [&str; 4] = ["btrfs", "reflink", "overlay", "copy"];

#[tokio::test(flavor = "multi_thread")]
async fn disks_on_every_layer_of_one_vm_are_one_instant_and_go_in_any_order() -> Result<()> {
    keeps_what_it_took(&EVERY_LAYER, Load::Row, &EVERY_DRIVER).await
}

/// Nothing but the stopped virtual CPUs holds the disks together here, and QEMU's are cut long before the others.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_freeze_disks_on_every_layer_of_one_vm_are_one_instant_too() -> Result<()> {
    let mut layers = Layers::start(&EVERY_LAYER, Load::Row, &EVERY_DRIVER).await?;
    let world = &mut layers.world;
    let released = world.directory().join("released");
    world.programs.agent.restart_with("FREEZEFRAME_HANG_AT", format!("host-cut:{}", released.display()))?;
    world.programs.agent.await_ready().await?;
    world.guest()?.await_records(20, SOON).await?;
    let wanted = json!({"vmName": VM, "className": "layers", "consistency": {"required": "Crash"}});
    world.apply_snapshot("crash", wanted).await?;
    let hangs = async || Ok(world.programs.agent.log()?.contains("crash point reached").then_some(()));
    await_condition("the cuts outside QEMU to hang", SOON, hangs).await?;
    let wrote = world.guest()?.await_records(10, Duration::from_millis(500)).await;
    std::fs::write(released, "")?;
    let taken = world.await_end("crash").await?;
    ensure!(phase(&taken) == Some(Phase::Ready), "not Ready: {:#?}", taken.status);
    let proof = evidence(&taken)?;
    ensure!(proof.level == ConsistencyLevel::Crash && proof.frozen_filesystems.is_none(), "{proof:?}");
    witness::check(&images(&taken)?)?.ensure_row_of_one_instant()?;
    ensure!(wrote.is_err(), "the guest wrote between two cuts");
    world.delete("crash").await?;
    layers.ensure_unharmed().await
}
