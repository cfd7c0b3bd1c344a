//! Getting data back, of a guest that writes all the while. Needs `cargo xtask setup`.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use freezeframe_api::RESTORED_BY_ANNOTATION;
use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::{
    BootResult, RestorePhase, RestoredDiskState, RunState, VMRestore, VMRestoreContent, VMSnapshot, VMSnapshotClass,
    VMTarget,
};
use freezeframe_e2e::restores::{restore_phase, restored_images};
use freezeframe_e2e::snapshots::{checksums, files, has_ended, images};
use freezeframe_e2e::{
    Cache, Disk, DiskSpec, Filesystem, Format, Load, Place, World, WorldConfig, await_condition, await_object, run,
    witness,
};
use kube::api::PostParams;
use kube::{Api, ResourceExt};
use serde_json::json;

const SOON: Duration = Duration::from_secs(60);
/// What the agent gives a guest on trial, and the snapshot itself.
const BOOTED: Duration = Duration::from_secs(180);
const VM: &str = "db-1";

/// A world whose guest has written, was snapshotted, and has written more.
async fn world_with_a_past() -> Result<(World, VMSnapshot)> {
    with_a_past(WorldConfig::default()).await
}

async fn with_a_past(config: WorldConfig) -> Result<(World, VMSnapshot)> {
    let world = World::start(config).await?;
    world.guest()?.await_records(20, SOON).await?;
    let snapshot = world.take_ready("yesterday", VM).await?;
    world.guest()?.await_records(20, SOON).await?;
    Ok((world, snapshot))
}

fn disks(world: &World) -> Vec<Disk> {
    ["vda.qcow2", "vdb.qcow2"].map(|name| Disk::existing(world.image_directory(VM).join(name), Format::Qcow2)).into()
}

fn records(images: &[Disk]) -> Result<Vec<u64>> {
    let report = witness::check(images)?;
    report.ensure_one_instant()?;
    Ok(report.disks.iter().map(|disk| disk.records.whole).collect())
}

async fn before_of(world: &World, restore: &VMRestore) -> Result<VMSnapshot> {
    let name = restore.status.as_ref().and_then(|status| status.pre_restore_snapshot_name.as_ref());
    world.read_snapshot(name.context("no snapshot of before")?).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_in_place_brings_back_that_instant_and_can_be_undone() -> Result<()> {
    let (mut world, snapshot) = world_with_a_past().await?;
    let then = records(&images(&snapshot)?)?;

    let restored = world.restore_in_place("back", &snapshot).await?;
    let stopped = world.guest.take().context("a guest")?.await_end().await?;
    let durable = stopped.records_written();
    ensure!(records(&disks(&world))? == then, "not the data of the snapshot");
    let guest = stopped.restart_same_command_line().await?;
    guest.await_records(10, SOON).await?;
    guest.quit()?;

    world.restore_in_place("undo", &before_of(&world, &restored).await?).await?;
    let undone = records(&disks(&world))?;
    ensure!(undone.iter().all(|count| *count >= durable), "told durable: {durable}, found: {undone:?}");
    Ok(())
}

/// Waits until the deletion of the snapshot says that it waits, and what for.
async fn await_wait_for(world: &World, what: &str) -> Result<()> {
    let says = |snapshot: &VMSnapshot| {
        let removed = snapshot.status.as_ref().and_then(|status| find(&status.conditions, types::REMOVED));
        removed.is_some_and(|removed| removed.reason == reasons::DELETE_FAILED && removed.message.contains(what))
    };
    let waits = await_object(&world.snapshots(), "yesterday", "the deletion to wait", SOON, says).await;
    waits.map(drop).map_err(|error| world.with_logs(error))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_vm_gets_the_snapshots_disks_while_the_old_one_goes_on() -> Result<()> {
    let (world, snapshot) = world_with_a_past().await?;
    let then = checksums(&images(&snapshot)?)?;
    world.apply_restore("linked", &snapshot, json!({"target": {"newVM": "copy-1"}})).await?;
    world.apply_restore("full", &snapshot, json!({"target": {"newVM": "copy-2"}, "mode": "Full"})).await?;
    let (linked, full) = (world.await_success("linked").await?, world.await_success("full").await?);
    for restore in [&linked, &full] {
        ensure!(checksums(&restored_images(restore))? == then, "{} reads differently", restore.name_any());
    }
    world.guest()?.await_records(10, SOON).await?;
    let targets: Api<VMTarget> = Api::namespaced(world.client.clone(), &world.namespace);
    let is_listed = |target: &VMTarget| {
        target.status.as_ref().is_some_and(|status| status.run_state == RunState::Stopped && status.disks.len() == 2)
    };
    await_object(&targets, "copy-1", "the new VM's target", SOON, is_listed).await?;

    // The linked images need the snapshot's data; nobody else does.
    world.start_deleting("yesterday").await?;
    await_wait_for(&world, "copy-1").await?;
    ensure!(checksums(&restored_images(&linked))? == then, "the linked images changed");
    for image in restored_images(&linked) {
        std::fs::remove_file(image.path)?;
    }
    world.await_gone("yesterday").await?;
    ensure!(checksums(&restored_images(&full))? == then, "the independent images changed");
    world.guest()?.await_records(10, SOON).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_overwritten_without_leave() -> Result<()> {
    let (world, snapshot) = world_with_a_past().await?;
    let found = files(&world.image_directory(VM))?;
    world.apply_restore("dry", &snapshot, json!({"dryRun": true})).await?;
    world.apply_restore("running", &snapshot, json!({"confirm": snapshot.uid()})).await?;
    world.apply_restore("stranger", &snapshot, json!({"confirm": "another", "stopVM": true})).await?;
    let dry = world.await_restore("dry").await?;
    ensure!(restore_phase(&dry) == Some(RestorePhase::Planned), "{dry:#?}");
    ensure!(dry.status.as_ref().is_some_and(|status| status.disks.len() == 2), "no plan: {dry:#?}");
    for (name, reason) in [("running", reasons::VM_RUNNING), ("stranger", reasons::NOT_CONFIRMED)] {
        let refused = world.await_restore(name).await?;
        let ready = refused.status.as_ref().and_then(|status| find(&status.conditions, types::READY));
        ensure!(ready.is_some_and(|ready| ready.reason == reason), "{name}: {refused:#?}");
    }
    ensure!(files(&world.image_directory(VM))? == found, "files came or went");
    world.guest()?.await_records(10, SOON).await.map(drop)
}

/// Our guests have no boot loader: the file in the VM's directory says how they start.
fn say_how_it_starts(world: &World) -> Result<()> {
    let (cache, kernels) = (Cache::locate()?, world.image_directory(VM));
    for file in ["vmlinuz", "initrd"] {
        std::fs::copy(cache.guest_file(file)?, kernels.join(file))?;
    }
    let boot = json!({
        "kernel": kernels.join("vmlinuz"), "initrd": kernels.join("initrd"), "machine": "pc",
        // Its init ends where nobody can control it, and the agent that it started must go on.
        "append": "quiet panic=-1 tsc=reliable no_timer_check random.trust_cpu=on mitigations=off load=none agent=on \
                   rdinit=/bin/sh -- -c \"/init; while :; do sleep 9; done\"",
    });
    let directory = world.directory().join("vms").join(&world.namespace).join(VM);
    // JSON is YAML.
    Ok(std::fs::write(directory.join("target.yaml"), json!({ "boot": boot }).to_string())?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_guest_is_seen_to_boot() -> Result<()> {
    let (world, snapshot) = world_with_a_past().await?;
    say_how_it_starts(&world)?;
    world.apply_restore("tried", &snapshot, json!({"target": {"newVM": "copy-3"}, "verify": "Boot"})).await?;
    let tried = world.await_success("tried").await?;
    let found = tried.status.as_ref().and_then(|status| status.boot.as_ref()).context("no result of booting")?;
    ensure!(found.result == BootResult::AgentAnswered && found.seconds > 0, "{found:?}");
    ensure!(checksums(&restored_images(&tried))? == checksums(&images(&snapshot)?)?, "booting changed the images");
    world.guest()?.await_records(10, SOON).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_seen_to_boot_while_its_vm_goes_on() -> Result<()> {
    let world = World::start(WorldConfig::default()).await?;
    say_how_it_starts(&world)?;
    let class = json!({
        "apiVersion": "freezeframe.dev/v1alpha1", "kind": "VMSnapshotClass",
        "metadata": {"name": "tried"}, "spec": {"verify": "Boot"},
    });
    Api::all(world.client.clone())
        .create(&PostParams::default(), &serde_json::from_value::<VMSnapshotClass>(class)?)
        .await?;
    world.guest()?.await_records(20, SOON).await?;
    world.apply_snapshot("tried", json!({"vmName": VM, "className": "tried"})).await?;
    let taken = await_object(&world.snapshots(), "tried", "the snapshot to be tried", BOOTED, has_ended).await;
    let taken = taken.map_err(|error| world.with_logs(error))?;
    let status = taken.status.as_ref().context("no status")?;
    let found = status.boot.as_ref().with_context(|| format!("no result of booting: {status:#?}"))?;
    ensure!(status.ready_to_use && found.result == BootResult::AgentAnswered, "{found:?}");
    witness::check(&images(&taken)?)?.ensure_frozen()?;
    world.guest()?.await_records(10, SOON).await.map(drop)
}

/// Every driver in one VM: what is brought back in place is of one instant, and so is what undoes it.
#[tokio::test(flavor = "multi_thread")]
async fn a_vm_of_mixed_layers_is_put_back_to_one_instant_boots_and_is_undone() -> Result<()> {
    let layers = [
        (Place::Plain, Format::Qcow2, "overlay"),
        (Place::Xfs, Format::Raw, "reflink"),
        (Place::Btrfs, Format::Qcow2, "btrfs"),
        (Place::Plain, Format::Raw, "copy"),
    ];
    let filesystems = [Filesystem::Ext4, Filesystem::Xfs].into_iter().cycle();
    let disk = |(layer, filesystem): (&(Place, Format, &str), _)| DiskSpec { format: layer.1, filesystem, mib: 320 };
    let mut world = World::start(WorldConfig {
        disks: layers.iter().zip(filesystems).map(disk).collect(),
        places: layers.iter().map(|layer| layer.0).collect(),
        load: Load::Row,
        ..WorldConfig::default()
    })
    .await?;
    let copy = json!({"name": "copy", "parameters": {"directory": world.copies()?}});
    world.apply_class("layers", &json!([{"name": "btrfs"}, {"name": "reflink"}, {"name": "overlay"}, copy]))?;
    world.guest()?.await_records(20, SOON).await?;
    let taken = world.take("yesterday", json!({"vmName": VM, "className": "layers"})).await?;
    let drivers: Vec<_> = taken.status.iter().flat_map(|status| &status.disks).map(|disk| &*disk.driver.0).collect();
    ensure!(drivers == layers.map(|layer| layer.2), "{}", world.with_logs(anyhow::anyhow!("{:#?}", taken.status)));
    let then = checksums(&images(&taken)?)?;
    world.guest()?.await_records(20, SOON).await?;

    for mode in ["Linked", "Full"] {
        let name = mode.to_lowercase();
        world.apply_restore(&name, &taken, json!({"target": {"newVM": name}, "mode": mode})).await?;
        let images = restored_images(&world.await_success(&name).await?);
        ensure!(checksums(&images)? == then, "{mode}: {images:?} read differently");
    }
    let restored = world.restore_in_place("back", &taken).await?;
    let stopped = world.guest.take().context("a guest")?.await_end().await?;
    let durable = stopped.records_written();
    ensure!(checksums(&restored_images(&restored))? == then, "not the data of the snapshot");
    witness::check(&restored_images(&restored))?.ensure_row_of_one_instant()?;
    let guest = stopped.restart_same_command_line().await?;
    guest.await_records(10, SOON).await?;
    guest.quit()?;

    let undone = world.restore_in_place("undo", &before_of(&world, &restored).await?).await?;
    let report = witness::check(&restored_images(&undone))?;
    report.ensure_row_of_one_instant()?;
    let found: Vec<_> = report.disks.iter().map(|disk| disk.records.whole).collect();
    ensure!(found.iter().all(|count| *count >= durable), "told durable: {durable}, found: {found:?}");
    Ok(())
}

/// The agent's `qemu-img` copies as slowly as on a busy disk; returns where its process id is put down.
async fn copy_slowly(world: &mut World) -> Result<PathBuf> {
    let real = run("which", ["qemu-img"])?;
    let (tools, pid) = (world.directory().join("tools"), world.directory().join("copying"));
    std::fs::create_dir_all(&tools)?;
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = convert ] || exec {real} \"$@\"\nshift; echo $$ > {pid}.new; mv {pid}.new {pid}\n\
         exec {real} convert -m 1 -r 1M \"$@\"\n",
        real = real.trim(),
        pid = pid.display(),
    );
    std::fs::write(tools.join("qemu-img"), script)?;
    std::fs::set_permissions(tools.join("qemu-img"), std::fs::Permissions::from_mode(0o755))?;
    let path = format!("{}:{}", tools.display(), std::env::var("PATH")?);
    world.programs.agent.restart_with("PATH", path)?;
    world.programs.agent.await_ready().await?;
    Ok(pid)
}

/// How far the first disk is that is being copied, in percent.
fn progress(restore: &VMRestore) -> Option<i32> {
    let mut disks = restore.status.iter().flat_map(|status| &status.disks);
    disks.find(|disk| disk.state == RestoredDiskState::Copying).and_then(|disk| disk.progress_percent)
}

/// Waits until the restore `slow` is further than `before`, and not at its end.
async fn await_progress(world: &World, before: i32) -> Result<VMRestore> {
    let is_further = |restore: &VMRestore| {
        restore_phase(restore) == Some(RestorePhase::Restoring)
            && progress(restore).is_some_and(|percent| percent > before && percent < 100)
    };
    let seen = await_object(&world.restores(), "slow", "progress of the copy", SOON, is_further).await;
    seen.map_err(|error| world.with_logs(error))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_restore_tells_how_far_it_is_and_deleting_it_ends_the_copy() -> Result<()> {
    // Half a minute of copying, in steps of 2 MiB.
    let (mut world, snapshot) = with_a_past(WorldConfig { ballast: 32, ..WorldConfig::default() }).await?;
    let found = files(&world.image_directory(VM))?;
    let pid = copy_slowly(&mut world).await?;
    world.apply_restore("slow", &snapshot, json!({"target": {"newVM": "copy-1"}, "mode": "Full"})).await?;
    let seen = await_progress(&world, 0).await?;
    let seen = await_progress(&world, progress(&seen).context("no progress")?).await?;
    let process = Path::new("/proc").join(std::fs::read_to_string(&pid)?.trim());
    ensure!(process.exists(), "nothing copies");
    let content = seen.status.and_then(|status| status.content_name).context("no content")?;
    let content: VMRestoreContent = Api::all(world.client.clone()).get(&content).await?;
    ensure!(content.status.is_some_and(|status| status.last_report_time.is_some()), "the node says not that it lives");
    let marked = world.read_snapshot("yesterday").await?.annotations().get(RESTORED_BY_ANNOTATION).cloned();
    ensure!(marked == world.restores().get("slow").await?.uid(), "no mark on the snapshot: {marked:?}");
    world.delete_restore("slow").await?;
    await_condition("the restore to be gone", SOON, async || {
        Ok(world.restores().get_opt("slow").await?.is_none().then_some(()))
    })
    .await
    .map_err(|error| world.with_logs(error))?;
    // Much sooner than the copy would be done.
    await_condition("qemu-img to end", Duration::from_secs(5), async || Ok((!process.exists()).then_some(()))).await?;
    ensure!(files(&world.image_directory(VM))? == found, "files are left");
    world.guest()?.await_records(10, SOON).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_is_snapshotted_while_another_is_made_of_its_past() -> Result<()> {
    let (mut world, snapshot) = with_a_past(WorldConfig { ballast: 32, ..WorldConfig::default() }).await?;
    let then = checksums(&images(&snapshot)?)?;
    copy_slowly(&mut world).await?;
    world.apply_restore("slow", &snapshot, json!({"target": {"newVM": "copy-1"}, "mode": "Full"})).await?;
    await_progress(&world, 0).await?;
    world.start_deleting("yesterday").await?;
    world.take_ready("today", VM).await?;
    let slow = world.restores().get("slow").await?;
    ensure!(restore_phase(&slow) == Some(RestorePhase::Restoring), "the snapshot waited: {:#?}", slow.status);
    await_wait_for(&world, "restore").await?;
    let slow = world.await_success("slow").await?;
    world.await_gone("yesterday").await?;
    ensure!(checksums(&restored_images(&slow))? == then, "it reads differently");
    world.guest()?.await_records(10, SOON).await.map(drop)
}

/// The names of a VM's disks are half changed when the agent dies, and the API is away when it starts.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_starts_finishes_what_it_had_begun_to_put_back_without_the_api() -> Result<()> {
    let (mut world, snapshot) = world_with_a_past().await?;
    let then = records(&images(&snapshot)?)?;
    world.programs.agent.restart_with("FREEZEFRAME_CRASH_AT", "restore-away")?;
    world.programs.agent.await_ready().await?;
    let spec = json!({"confirm": snapshot.uid(), "stopVM": true, "stopTimeout": "1s"});
    world.apply_restore("back", &snapshot, spec).await?;
    await_condition("the agent to die", BOOTED, async || Ok((!world.programs.agent.is_running()?).then_some(())))
        .await
        .map_err(|error| world.with_logs(error))?;
    let away = |name: &String| name.contains(".vmreplaced-");
    ensure!(files(&world.image_directory(VM))?.iter().any(away), "no disk is away from its name");
    world.control_plane.stop_apiserver()?;
    world.programs.agent.restart()?;
    await_condition("every disk to have its name", SOON, async || {
        let names = files(&world.image_directory(VM))?;
        let left = names.iter().any(|name| away(name) || name.contains(".vmrestore-"));
        Ok((!left && disks(&world).iter().all(|disk| disk.path.exists())).then_some(()))
    })
    .await
    .map_err(|error| world.with_logs(error))?;
    ensure!(records(&disks(&world))? == then, "not the data of the snapshot");
    let stopped = world.guest.take().context("a guest")?.await_end().await?;
    stopped.restart_same_command_line().await?.await_records(10, SOON).await?;
    world.control_plane.start_apiserver().await?;
    if !world.programs.operator.is_running()? {
        world.programs.operator.restart()?;
    }
    world.await_success("back").await.map(drop)
}
