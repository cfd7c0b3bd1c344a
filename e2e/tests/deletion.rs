//! Snapshots are deleted in any order, and what is left reads as before. Needs `cargo xtask setup`.
//!
//! Every order, every shape of a command line, and a crash at every await are in the agent's own tests, on a QEMU
//! without a guest; here a guest writes all the while.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use freezeframe_api::v1alpha1::{Phase, VMSnapshot};
use freezeframe_e2e::snapshots::{checksums, files, images, phase};
use freezeframe_e2e::{
    Disk, DiskSpec, Filesystem, Format, Load, Style, World, WorldConfig, await_condition, await_object,
    verify_by_booting, witness,
};
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const VM: &str = "db-1";

/// What every snapshot's images held when it was taken.
type Known = BTreeMap<String, Vec<u64>>;

async fn take(world: &World, known: &mut Known, name: &str) -> Result<()> {
    world.guest()?.await_records(10, SOON).await?;
    let taken = world.take_ready(name, VM).await?;
    known.insert(name.to_owned(), checksums(&images(&taken)?)?);
    Ok(())
}

/// Every snapshot's images are where its status says, hold what they held, and nothing else is there.
async fn check(world: &World, known: &Known) -> Result<()> {
    let mut expected = vec!["vda.qcow2".to_owned(), "vdb.qcow2".to_owned()];
    for (name, then) in known {
        let images = images(&world.read_snapshot(name).await?)?;
        ensure!(checksums(&images)? == *then, "{name} reads differently: {images:?}");
        let names = images.iter().filter_map(|image| image.path.file_name());
        expected.extend(names.map(|name| name.to_string_lossy().into_owned()));
    }
    expected.sort();
    let found = files(&world.image_directory(VM))?;
    ensure!(found == expected, "files {found:?} instead of {expected:?}");
    Ok(())
}

/// Waits for the status to follow an image that moved.
async fn settled(world: &World, known: &Known) -> Result<()> {
    let checked =
        await_condition("the survivors to be right", SOON, async || check(world, known).await.map(Some)).await;
    checked.map_err(|error| world.with_logs(error))
}

async fn delete(world: &World, known: &mut Known, name: &str) -> Result<()> {
    world.delete(name).await?;
    known.remove(name);
    settled(world, known).await
}

/// The guest goes on, and QEMU holds two layers a disk for each snapshot: one for the format, one for the file.
async fn check_vm(world: &World, snapshots: usize) -> Result<()> {
    let guest = world.guest()?;
    guest.await_records(10, SOON).await?;
    let nodes = guest.monitor().execute("query-named-block-nodes", json!({"flat": true})).await?;
    let count = nodes.as_array().map_or(0, Vec::len);
    ensure!(count == 4 * (1 + snapshots), "{count} nodes with {snapshots} snapshots: {nodes:#}");
    let jobs = guest.monitor().execute("query-jobs", json!({})).await?;
    ensure!(jobs == json!([]), "{jobs}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_of_a_writing_guest_are_deleted_in_orders_of_every_kind() -> Result<()> {
    let mut world = World::start(WorldConfig { load: Load::Heavy, ..WorldConfig::default() }).await?;
    for (round, order) in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2], [2, 0, 3, 1]].into_iter().enumerate() {
        let names = [0, 1, 2, 3].map(|at| format!("round-{round}-{at}"));
        let mut known = Known::new();
        for name in &names {
            take(&world, &mut known, name).await?;
        }
        settled(&world, &known).await?;
        for at in order {
            delete(&world, &mut known, &names[at]).await?;
            check_vm(&world, known.len()).await?;
        }
    }
    let guest = world.guest.take().context("a guest")?;
    let stopped = guest.quiesce_and_quit().await?;
    let disks: Vec<_> = stopped.images().into_iter().map(|path| Disk::existing(path, Format::Qcow2)).collect();
    witness::check(&disks)?.ensure_one_instant()?;
    for disk in verify_by_booting(&disks, &world.directory().join("verify"))? {
        ensure!(disk.clean && disk.bad == 0 && disk.records >= stopped.records_written(), "{disk:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_of_a_legacy_drive_are_deleted_without_harm() -> Result<()> {
    let mut world = World::start(WorldConfig { style: Style::Drive, ..WorldConfig::default() }).await?;
    let mut known = Known::new();
    for name in ["one", "two", "three"] {
        take(&world, &mut known, name).await?;
    }
    for name in ["two", "three", "one"] {
        delete(&world, &mut known, name).await?;
        world.guest()?.await_records(10, SOON).await?;
    }
    let stopped = world.guest.take().context("a guest")?.kill()?;
    let written = stopped.records_written();
    let guest = stopped.restart_same_command_line().await?;
    ensure!(guest.records_written() > written, "told durable: {written}, found: {}", guest.records_written());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn retained_data_stays_whole_when_its_neighbours_are_deleted() -> Result<()> {
    let world = World::start(WorldConfig::default()).await?;
    let mut known = Known::new();
    for name in ["one", "two", "three"] {
        take(&world, &mut known, name).await?;
    }
    let then = known.remove("two").context("two was taken")?;
    let content =
        world.read_snapshot("two").await?.status.and_then(|status| status.content_name).context("a content")?;
    let policy = Patch::Merge(json!({"spec": {"deletionPolicy": "Retain"}}));
    world.snapshots().patch("two", &PatchParams::default(), &policy).await?;
    world.start_deleting("two").await?;
    let snapshots = world.snapshots();
    let gone = async || Ok(snapshots.get_opt("two").await?.is_none().then_some(()));
    await_condition("two to be gone", SOON, gone).await.map_err(|error| world.with_logs(error))?;
    for name in ["one", "three"] {
        ensure!(checksums(&retained(&world, &content).await?)? == then, "what was retained reads differently");
        world.delete(name).await?;
        world.guest()?.await_records(10, SOON).await?;
    }
    // An image may move when its neighbour goes: the content says where it is.
    let moved = async || Ok((checksums(&retained(&world, &content).await?)? == then).then_some(()));
    await_condition("what is retained to read as before", SOON, moved).await.map_err(|error| world.with_logs(error))?;
    let images = retained(&world, &content).await?;
    world.contents().delete(&content, &DeleteParams::default()).await?;
    let contents = world.contents();
    let gone = async || Ok(contents.get_opt(&content).await?.is_none().then_some(()));
    await_condition("the content to be gone", SOON, gone).await.map_err(|error| world.with_logs(error))?;
    ensure!(checksums(&images)? == then, "what was retained went with its content");
    world.take_ready("four", VM).await?;
    world.delete("four").await?;
    ensure!(checksums(&images)? == then, "a later snapshot's deletion changed what was retained");
    Ok(())
}

/// Where a content says that its data is.
async fn retained(world: &World, content: &str) -> Result<Vec<Disk>> {
    let content = world.contents().get(content).await?;
    let disks = content.status.map(|status| status.disks).unwrap_or_default();
    let handles = disks.into_iter().filter_map(|disk| disk.handle);
    let images: Vec<_> = handles.map(|handle| Disk::existing(handle.0, Format::Qcow2)).collect();
    ensure!(images.len() == 2, "the content lists {images:?}");
    Ok(images)
}

/// A class whose copies are in a directory of the world's own.
fn copying_class(world: &World, speed: Option<&str>) -> Result<std::path::PathBuf> {
    let copies = world.copies()?;
    let mut parameters = json!({"directory": copies});
    if let Some(speed) = speed {
        parameters["speed"] = speed.into();
    }
    world.apply_class("copying", &json!([{"name": "copy", "parameters": parameters}]))?;
    Ok(copies)
}

fn raw_disks() -> WorldConfig {
    let disk = |filesystem| DiskSpec { format: Format::Raw, filesystem, mib: 320 };
    WorldConfig { disks: vec![disk(Filesystem::Ext4), disk(Filesystem::Xfs)], ..WorldConfig::default() }
}

fn copied() -> Value {
    json!({"vmName": VM, "className": "copying"})
}

fn copies_left(copies: &std::path::Path) -> Result<Vec<String>> {
    let directory = copies.join("shop.db-1");
    if directory.exists() { files(&directory) } else { Ok(vec![]) }
}

#[tokio::test(flavor = "multi_thread")]
async fn raw_disks_are_copied_at_one_instant_and_the_copies_deleted() -> Result<()> {
    let world = World::start(WorldConfig { load: Load::Heavy, ..raw_disks() }).await?;
    let copies = copying_class(&world, None)?;
    world.guest()?.await_records(20, SOON).await?;
    let taken = world.take("copied", copied()).await?;
    ensure!(phase(&taken) == Some(Phase::Ready), "{:#?}", taken.status);
    let report = witness::check(&images(&taken)?)?;
    report.ensure_frozen()?;
    world.guest()?.await_records(10, SOON).await?;
    world.delete("copied").await?;
    ensure!(copies_left(&copies)?.is_empty(), "left: {:?}", copies_left(&copies)?);
    check_vm(&world, 0).await
}

/// Takes a snapshot whose copy stays under way: the class lets it go slowly.
async fn start_copying(world: &World, name: &str) -> Result<VMSnapshot> {
    world.apply_snapshot(name, copied()).await?;
    await_object(&world.snapshots(), name, "the cut", SOON, |s| phase(s) == Some(Phase::Completing)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_ends_with_its_snapshot_or_its_vm_and_leaves_nothing() -> Result<()> {
    let mut world = World::start(WorldConfig { load: Load::Heavy, ..raw_disks() }).await?;
    let copies = copying_class(&world, Some("1Mi"))?;
    // The more it has written, the longer a copy takes.
    world.guest()?.await_records(100, SOON).await?;
    start_copying(&world, "deleted").await?;
    world.delete("deleted").await?;
    ensure!(copies_left(&copies)?.is_empty(), "left after deletion: {:?}", copies_left(&copies)?);
    check_vm(&world, 0).await?;

    start_copying(&world, "killed").await?;
    let stopped = world.guest.take().context("a guest")?.kill()?;
    let ended = world.await_end("killed").await?;
    ensure!(phase(&ended) == Some(Phase::Failed), "{:#?}", ended.status);
    await_condition("nothing to be left", SOON, async || Ok(copies_left(&copies)?.is_empty().then_some(()))).await?;
    let written = stopped.records_written();
    world.guest = Some(stopped.restart_same_command_line().await?);
    ensure!(world.guest()?.records_written() > written, "the guest lost records");
    world.delete("killed").await
}
