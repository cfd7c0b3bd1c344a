//! VMs that don't run: their disks are taken as they lie, and they start with their old command line. Needs
//! `cargo xtask setup`.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use freezeframe_api::v1alpha1::{ConsistencyLevel, Phase, RunState, VMSnapshot, VMTarget};
use freezeframe_e2e::snapshots::{checksums, files, images, phase};
use freezeframe_e2e::{Disk, Filesystem, Format, World, WorldConfig, await_condition, await_object, witness};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const VM: &str = "db-1";

async fn await_target(world: &World, vm: &str, wanted: impl Fn(&VMTarget) -> bool) -> Result<VMTarget> {
    let targets: Api<VMTarget> = Api::namespaced(world.client.clone(), &world.namespace);
    let found = await_object(&targets, vm, "the target to be as it should", SOON, wanted).await;
    found.map_err(|error| world.with_logs(error))
}

fn is(target: &VMTarget, state: RunState) -> bool {
    target.status.as_ref().is_some_and(|status| status.run_state == state)
}

fn crash(vm: &str) -> Value {
    json!({"vmName": vm, "consistency": {"required": "Crash"}})
}

/// A snapshot of a stopped VM that must become Ready, and says that nothing was frozen.
async fn ready(world: &World, name: &str, vm: &str) -> Result<VMSnapshot> {
    let taken = world.take(name, crash(vm)).await?;
    let level = taken.status.as_ref().and_then(|status| Some(status.consistency.as_ref()?.level));
    let good = phase(&taken) == Some(Phase::Ready) && level == Some(ConsistencyLevel::Crash);
    ensure!(good, "{}", world.with_logs(anyhow::anyhow!("{name}: {:#?}", taken.status)));
    Ok(taken)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_vm_is_snapshotted_and_started_with_the_same_command_line() -> Result<()> {
    let mut world = World::start(WorldConfig::default()).await?;
    world.guest()?.await_records(10, SOON).await?;
    await_target(&world, VM, |target| is(target, RunState::Running)).await?;
    let stopped = world.guest.take().context("a guest")?.quiesce_and_quit().await?;
    await_target(&world, VM, |target| is(target, RunState::Stopped)).await?;
    // The agent forgets what it saw, and has it from the API again.
    world.programs.agent.kill_9()?;
    world.programs.agent.restart()?;
    world.programs.agent.await_ready().await?;
    let taken = images(&ready(&world, "one", VM).await?)?;
    witness::check(&taken)?.ensure_one_instant()?;
    let known = checksums(&taken)?;
    let own: Vec<_> = stopped.images().into_iter().map(|path| Disk::existing(path, Format::Qcow2)).collect();
    ensure!(checksums(&own)? == known, "the snapshot isn't what the VM stopped with");
    ready(&world, "two", VM).await?;
    let written = stopped.records_written();
    world.guest = Some(stopped.restart_same_command_line().await?);
    let first = world.guest()?.heartbeat().beats().first().map_or(0, |beat| beat.record);
    ensure!(first > written, "records up to {written} were durable, but the guest goes on with {first}");
    world.guest()?.await_records(10, SOON).await?;
    ensure!(checksums(&images(&world.read_snapshot("one").await?)?)? == known, "one reads differently");
    world.delete("two").await?;
    ensure!(checksums(&images(&world.read_snapshot("one").await?)?)? == known, "one reads differently without two");
    world.guest()?.await_records(10, SOON).await?;
    let stopped = world.guest.take().context("a guest")?.kill()?;
    world.delete("one").await?;
    let left = files(&world.image_directory(VM))?;
    ensure!(left == ["vda.qcow2", "vdb.qcow2"], "left: {left:?}");
    witness::check(&own)?.ensure_one_instant()?;
    world.guest = Some(stopped.restart_same_command_line().await?);
    world.guest()?.await_records(5, SOON).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_dies_between_cut_and_names_leaves_a_stopped_vm_as_it_was() -> Result<()> {
    let mut world = World::start(WorldConfig::default()).await?;
    world.guest()?.await_records(10, SOON).await?;
    await_target(&world, VM, |target| is(target, RunState::Running)).await?;
    let mut stopped = world.guest.take().context("a guest")?.quit()?;
    for (point, wanted) in [("transaction", Phase::Failed), ("cut", Phase::Failed), ("recorded", Phase::Ready)] {
        await_target(&world, VM, |target| is(target, RunState::Stopped)).await?;
        world.programs.agent.restart_with("FREEZEFRAME_CRASH_AT", point)?;
        world.programs.agent.await_ready().await?;
        let name = format!("at-{point}");
        world.apply_snapshot(&name, crash(VM)).await?;
        let agent = &mut world.programs.agent;
        let crashed = await_condition("the crash", SOON, async || Ok((!agent.is_running()?).then_some(()))).await;
        crashed.map_err(|error| world.with_logs(error))?;
        // Nobody may have to end the QEMU that had the disks: it ended with the agent.
        let written = stopped.records_written();
        let guest = stopped.restart_when_unlocked().await?;
        let first = guest.heartbeat().beats().first().map_or(0, |beat| beat.record);
        ensure!(first > written, "records up to {written} were durable, but the guest goes on with {first}");
        world.programs.agent.restart()?;
        world.programs.agent.await_ready().await?;
        let ended = world.await_end(&name).await?;
        ensure!(phase(&ended) == Some(wanted), "{point}: {:#?}", ended.status);
        guest.await_records(5, SOON).await?;
        world.delete(&name).await?;
        let left = files(&world.image_directory(VM))?;
        ensure!(left == ["vda.qcow2", "vdb.qcow2"], "{point} left {left:?}");
        stopped = guest.quit()?;
    }
    let disks: Vec<_> = stopped.images().into_iter().map(|path| Disk::existing(path, Format::Qcow2)).collect();
    witness::check(&disks)?.ensure_one_instant()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_never_ran_is_known_by_its_file() -> Result<()> {
    let world = World::start(WorldConfig::default()).await?;
    let (directory, images) = (world.site.vm_root.join(&world.namespace).join("new"), world.image_directory("new"));
    std::fs::create_dir_all(&directory)?;
    std::fs::create_dir_all(&images)?;
    let write = |file: Value| {
        std::fs::write(directory.join("target.yaml"), serde_yaml::to_string(&file)?).map_err(anyhow::Error::from)
    };
    let path = images.join("vda.qcow2");
    let disk = json!({"name": "vda", "path": path, "format": "qcow2"});
    write(json!({"disks": [disk.clone()], "labels": {"app": "db"}}))?;
    let missing = |target: &VMTarget| {
        let message = target.status.as_ref().and_then(|status| status.message.clone()).unwrap_or_default();
        is(target, RunState::Stopped) && message.contains("isn't there")
    };
    await_target(&world, "new", missing).await?;
    Disk::create(&path, Format::Qcow2, Filesystem::Ext4, 64)?;
    let cd = images.join("cd.raw");
    Disk::create(&cd, Format::Raw, Filesystem::Ext4, 64)?;
    let cd = json!({"name": "cd", "path": cd, "format": "raw", "readOnly": true});
    write(json!({"disks": [disk, cd], "labels": {"app": "shop"}}))?;
    let known = |target: &VMTarget| {
        let labelled = target.labels().get("app").is_some_and(|app| app == "shop");
        labelled && target.status.as_ref().is_some_and(|status| status.disks.len() == 2 && status.message.is_none())
    };
    let target = await_target(&world, "new", known).await?;
    let disks = target.status.unwrap_or_default().disks;
    let told: Vec<_> = disks.iter().map(|disk| (disk.name.as_str(), disk.read_only, disk.size_bytes >> 20)).collect();
    ensure!(told == [("vda", false, 64), ("cd", true, 64)], "{told:?}");
    ensure!(disks[0].drivers.iter().any(|driver| driver.usable && driver.name.as_str() == "overlay"), "{disks:?}");
    let taken = ready(&world, "one", "new").await?;
    ensure!(taken.status.is_some_and(|status| status.disks.len() == 1), "the read-only disk was taken");
    world.delete("one").await?;
    ensure!(files(&images)? == ["cd.raw", "vda.qcow2"], "left: {:?}", files(&images)?);
    write(json!({"disks": []}))?;
    await_target(&world, "new", |target| target.labels().is_empty()).await.map(drop)
}
