//! A VM that is killed and started again with the very same command line, at every step of a snapshot's life, finds
//! all that it was told is durable. Needs `cargo xtask setup`.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use freezeframe_api::v1alpha1::Phase;
use freezeframe_e2e::snapshots::{checksums, files, images, phase};
use freezeframe_e2e::{Disk, Format, Style, World, WorldConfig, await_condition, witness};
use serde_json::json;

const SOON: Duration = Duration::from_secs(60);
const VM: &str = "db-1";

/// QEMU dies and starts again; the guest must find every record that it had reported.
async fn restart_guest(world: &mut World) -> Result<()> {
    let stopped = world.guest.take().context("a guest")?.kill()?;
    let written = stopped.records_written();
    let guest = stopped.restart_same_command_line().await?;
    // Its writer goes on behind the last record that it finds.
    let first = guest.heartbeat().beats().first().map_or(0, |beat| beat.record);
    ensure!(first > written, "records up to {written} were durable, but the guest goes on with {first}");
    world.guest = Some(guest);
    Ok(())
}

fn only_the_disks(world: &World) -> Result<()> {
    let found = files(&world.image_directory(VM))?;
    ensure!(found == ["vda.qcow2", "vdb.qcow2"], "left: {found:?}");
    Ok(())
}

async fn grow(world: &World) -> Result<()> {
    world.guest()?.await_records(10, SOON).await.map(drop)
}

/// The disks as they are when the guest is stopped hold whole file systems and gapless records.
fn check_disks(world: &mut World) -> Result<()> {
    let stopped = world.guest.take().context("a guest")?.kill()?;
    let disks: Vec<_> = stopped.images().into_iter().map(|path| Disk::existing(path, Format::Qcow2)).collect();
    witness::check(&disks)?.ensure_one_instant()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_restarted_after_each_step_of_two_snapshots_loses_nothing() -> Result<()> {
    let mut world = World::start(WorldConfig::default()).await?;
    grow(&world).await?;
    let one = world.take_ready("one", VM).await?;
    let known = checksums(&images(&one)?)?;
    restart_guest(&mut world).await?;
    grow(&world).await?;
    world.take_ready("two", VM).await?;
    grow(&world).await?;
    restart_guest(&mut world).await?;
    world.delete("two").await?;
    grow(&world).await?;
    ensure!(checksums(&images(&world.read_snapshot("one").await?)?)? == known, "one reads differently");
    world.take_ready("three", VM).await?;
    grow(&world).await?;
    restart_guest(&mut world).await?;
    world.delete("one").await?;
    grow(&world).await?;
    restart_guest(&mut world).await?;
    world.delete("three").await?;
    grow(&world).await?;
    only_the_disks(&world)?;
    restart_guest(&mut world).await?;
    check_disks(&mut world)
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_of_a_stopped_vm_are_deleted_and_it_starts_with_everything() -> Result<()> {
    let mut world = World::start(WorldConfig::default()).await?;
    for name in ["one", "two", "three"] {
        grow(&world).await?;
        world.take_ready(name, VM).await?;
    }
    let known = checksums(&images(&world.read_snapshot("three").await?)?)?;
    let stopped = world.guest.take().context("a guest")?.kill()?;
    let written = stopped.records_written();
    world.delete("two").await?;
    await_condition("three to read as before", SOON, async || {
        let now = checksums(&images(&world.read_snapshot("three").await?)?)?;
        Ok((now == known).then_some(()))
    })
    .await?;
    // The VM may be started while the layers are merged: either it waits for its lock, or the merge does.
    world.start_deleting("three").await?;
    world.start_deleting("one").await?;
    world.guest = Some(stopped.restart_when_unlocked().await?);
    let first = world.guest()?.heartbeat().beats().first().map_or(0, |beat| beat.record);
    ensure!(first > written, "records up to {written} were durable, but the guest goes on with {first}");
    for name in ["three", "one"] {
        world.await_gone(name).await?;
    }
    grow(&world).await?;
    only_the_disks(&world)?;
    check_disks(&mut world)
}

/// Runs the agent into a crash point by `lead`, lets the VM die too, and brings both back.
async fn crash_at(world: &mut World, point: &str, lead: impl AsyncFnOnce(&World) -> Result<()>) -> Result<()> {
    world.programs.agent.restart_with("FREEZEFRAME_CRASH_AT", point)?;
    world.programs.agent.await_ready().await?;
    lead(world).await?;
    let agent = &mut world.programs.agent;
    let crashed = await_condition("the agent to crash", SOON, async || Ok((!agent.is_running()?).then_some(()))).await;
    crashed.map_err(|error| world.with_logs(error))?;
    // The guard lets the guest go first: what it is told from then on is what counts.
    grow(world).await.map_err(|error| world.with_logs(error))?;
    restart_guest(world).await?;
    world.programs.agent.restart()?;
    world.programs.agent.await_ready().await
}

async fn snapshot_crashes(world: &mut World, points: &[&str]) -> Result<()> {
    for point in points {
        let name = format!("at-{point}");
        grow(world).await?;
        crash_at(world, point, async |world| world.apply_snapshot(&name, json!({"vmName": VM})).await.map(drop))
            .await
            .with_context(|| name.clone())?;
        let ended = world.await_end(&name).await?;
        let expected = if *point == "recorded" { Phase::Ready } else { Phase::Failed };
        ensure!(phase(&ended) == Some(expected), "{point}: {:#?}", ended.status);
        world.delete(&name).await?;
        grow(world).await?;
        only_the_disks(world).with_context(|| name.clone())?;
    }
    restart_guest(world).await?;
    check_disks(world)
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_and_vm_dying_at_each_step_of_a_snapshot_lose_nothing() -> Result<()> {
    let mut world = World::start(WorldConfig::default()).await?;
    snapshot_crashes(&mut world, &["planned", "prepared", "transaction", "cut", "thawed", "recorded"]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_and_vm_dying_at_each_step_of_a_deletion_lose_nothing() -> Result<()> {
    let mut world = World::start(WorldConfig::default()).await?;
    for point in ["job-completed", "switched", "removal-step"] {
        let (old, new) = (format!("old-{point}"), format!("new-{point}"));
        grow(&world).await?;
        let taken = world.take_ready(&old, VM).await?;
        let known = checksums(&images(&taken)?)?;
        grow(&world).await?;
        world.take_ready(&new, VM).await?;
        grow(&world).await?;
        crash_at(&mut world, point, async |world| world.start_deleting(&new).await).await.context(point)?;
        world.await_gone(&new).await?;
        ensure!(checksums(&images(&world.read_snapshot(&old).await?)?)? == known, "{old} reads differently");
        grow(&world).await?;
        world.delete(&old).await?;
        only_the_disks(&world).context(point)?;
    }
    restart_guest(&mut world).await?;
    check_disks(&mut world)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_legacy_drive_restarted_between_snapshot_and_deletion_loses_nothing() -> Result<()> {
    let mut world = World::start(WorldConfig { style: Style::Drive, ..WorldConfig::default() }).await?;
    grow(&world).await?;
    world.take_ready("one", VM).await?;
    grow(&world).await?;
    restart_guest(&mut world).await?;
    world.take_ready("two", VM).await?;
    grow(&world).await?;
    world.delete("one").await?;
    grow(&world).await?;
    restart_guest(&mut world).await?;
    world.delete("two").await?;
    grow(&world).await?;
    only_the_disks(&world)?;
    restart_guest(&mut world).await?;
    check_disks(&mut world)
}
