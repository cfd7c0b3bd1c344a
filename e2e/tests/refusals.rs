//! What can't be served says so, in the reason and in words, and leaves nothing; what can be served with less says with
//! how much. Needs `cargo xtask setup`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::{
    ConsistencyEvidence, ConsistencyLevel, Phase, RunState, VMSnapshot, VMSnapshotClass, VMSnapshotStatus, VMTarget,
};
use freezeframe_e2e::snapshots::{files, has_ended, images, phase};
use freezeframe_e2e::{
    Agent, DiskSpec, Filesystem, Format, World, WorldConfig, await_condition, await_object, run, witness,
};
use k8s_openapi::api::events::v1::Event;
use kube::Api;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const STANDARD: &str = "standard";
const DEFAULT_CLASS: &str = "freezeframe.dev/is-default-class";

fn status(snapshot: &VMSnapshot) -> Result<&VMSnapshotStatus> {
    snapshot.status.as_ref().context("a status")
}

/// Status, reason and message of a condition.
fn condition(snapshot: &VMSnapshot, type_: &str) -> (String, String, String) {
    let conditions = snapshot.status.as_ref().map_or(&[][..], |status| &status.conditions);
    let found = find(conditions, type_);
    found.map_or_else(Default::default, |found| (found.status.clone(), found.reason.clone(), found.message.clone()))
}

fn evidence(snapshot: &VMSnapshot) -> Result<&ConsistencyEvidence> {
    status(snapshot)?.consistency.as_ref().context("evidence")
}

async fn make_class(world: &World, name: &str, drivers: Value) -> Result<()> {
    let class = json!({
        "apiVersion": "freezeframe.dev/v1alpha1", "kind": "VMSnapshotClass",
        "metadata": {"name": name}, "spec": {"drivers": drivers, "deletionPolicy": "Delete"},
    });
    let classes: Api<VMSnapshotClass> = Api::all(world.client.clone());
    classes.create(&PostParams::default(), &serde_json::from_value(class)?).await?;
    Ok(())
}

/// A snapshot that fails for a reason that the order itself has, so that it isn't accepted; returns the message.
async fn refused(world: &World, name: &str, spec: Value, expected: &str) -> Result<String> {
    let ended = world.take(name, spec).await?;
    let (accepted, why, message) = condition(&ended, types::ACCEPTED);
    let as_expected = phase(&ended) == Some(Phase::Failed) && accepted == "False" && why == expected;
    ensure!(as_expected, "{name} is not refused with {expected}: {:#?}", ended.status);
    ensure!(condition(&ended, types::STALLED).0 == "True", "{name} is not Stalled");
    Ok(message)
}

/// A snapshot that fails though it could have been served; returns the message.
async fn failed(world: &World, name: &str, spec: Value, expected: &str) -> Result<String> {
    let ended = world.take(name, spec).await?;
    let (_, why, message) = condition(&ended, types::READY);
    let as_expected = phase(&ended) == Some(Phase::Failed) && why == expected;
    ensure!(
        as_expected,
        "{name} did not fail with {expected}: {}",
        world.with_logs(anyhow::anyhow!("{:#?}", ended.status))
    );
    Ok(message)
}

/// A snapshot that becomes ready.
async fn ready(world: &World, name: &str, spec: Value) -> Result<VMSnapshot> {
    world.apply_snapshot(name, spec).await?;
    ensure_ready(world, name).await
}

async fn ensure_ready(world: &World, name: &str) -> Result<VMSnapshot> {
    let ended = world.await_end(name).await?;
    let is_ready = phase(&ended) == Some(Phase::Ready);
    ensure!(is_ready, "{name} is not Ready: {}", world.with_logs(anyhow::anyhow!("{:#?}", ended.status)));
    Ok(ended)
}

/// Waits until a snapshot waits for what `expected` says is missing.
async fn waits(world: &World, name: &str, expected: &str) -> Result<VMSnapshot> {
    let what = format!("{name} to wait with {expected}");
    await_object(&world.snapshots(), name, &what, SOON, |snapshot| {
        !has_ended(snapshot) && condition(snapshot, types::ACCEPTED).1 == expected
    })
    .await
    .map_err(|error| world.with_logs(error))
}

fn drivers_of(snapshot: &VMSnapshot) -> Result<Vec<(String, String)>> {
    let disks = &status(snapshot)?.disks;
    Ok(disks.iter().map(|disk| (disk.name.0.clone(), disk.driver.0.clone())).collect())
}

fn disk(format: Format, filesystem: Filesystem, mib: u64) -> DiskSpec {
    DiskSpec { format, filesystem, mib }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_no_driver_takes_is_refused_by_name_unless_it_is_excluded_or_copied() -> Result<()> {
    let mut config = WorldConfig::default();
    config.disks.push(disk(Format::Raw, Filesystem::Ext4, 64));
    let world = World::start(config).await?;
    let copies = world.directory().join("copies");
    std::fs::create_dir(&copies)?;
    make_class(&world, "overlay-only", json!([{"name": "overlay"}])).await?;
    let with_copy = json!([{"name": "overlay"}, {"name": "copy", "parameters": {"directory": copies}}]);
    make_class(&world, "with-copy", with_copy).await?;
    make_class(&world, "strange", json!([{"name": "zfs"}])).await?;
    make_class(&world, "odd", json!([{"name": "overlay", "parameters": {"colour": "red"}}])).await?;
    let of = |class: &str, disks: Value| json!({"vmName": "db-1", "className": class, "disks": disks});

    let message = refused(&world, "raw", of("overlay-only", json!({})), reasons::DISK_NOT_SUPPORTED).await?;
    assert!(message.contains("`vdc`") && message.contains("raw"), "{message}");
    let message =
        refused(&world, "ghost", of("with-copy", json!({"include": ["vdz"]})), reasons::DISK_NOT_FOUND).await?;
    assert!(message.contains("`vdz`") && message.contains("vda, vdb, vdc"), "{message}");
    let message = refused(&world, "zfs", of("strange", json!({})), reasons::UNKNOWN_DRIVER).await?;
    assert!(message.contains("`zfs`") && message.contains("overlay"), "{message}");
    let message = refused(&world, "red", of("odd", json!({})), reasons::INVALID_PARAMETER).await?;
    assert!(message.contains("colour"), "{message}");
    assert_eq!(files(&world.image_directory("db-1"))?, ["vda.qcow2", "vdb.qcow2", "vdc.raw"], "refusals make nothing");

    let without = ready(&world, "without", of("overlay-only", json!({"exclude": ["vdc"]}))).await?;
    assert_eq!(drivers_of(&without)?, [("vda".into(), "overlay".into()), ("vdb".into(), "overlay".into())]);
    let whole = ready(&world, "whole", of("with-copy", json!({}))).await?;
    assert_eq!(drivers_of(&whole)?[2], ("vdc".into(), "copy".into()));
    witness::check(&images(&whole)?)?.ensure_frozen()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_waits_for_its_class_and_its_vm_and_no_longer_than_its_deadline() -> Result<()> {
    let world = World::start(WorldConfig::default()).await?;
    world.apply_snapshot("classless", json!({"vmName": "db-1", "className": "later"})).await?;
    waits(&world, "classless", reasons::CLASS_NOT_FOUND).await?;
    make_class(&world, "later", json!([{"name": "overlay"}])).await?;
    ensure_ready(&world, "classless").await?;

    let classes: Api<VMSnapshotClass> = Api::all(world.client.clone());
    let default = |value: Value| Patch::Merge(json!({"metadata": {"annotations": {DEFAULT_CLASS: value}}}));
    // The class that isn't, or no longer, the default one; how many are; and what puts that right.
    let obstacles = [(STANDARD, Value::Null, "no VMSnapshotClass"), ("later", "true".into(), "2 VMSnapshotClasses")];
    for (class, value, words) in obstacles {
        let name = format!("by-default-{class}");
        let before = if value.is_null() { "true".into() } else { Value::Null };
        classes.patch(class, &PatchParams::default(), &default(value)).await?;
        world.apply_snapshot(&name, json!({"vmName": "db-1"})).await?;
        let waiting = waits(&world, &name, reasons::NO_DEFAULT_CLASS).await?;
        assert!(condition(&waiting, types::ACCEPTED).2.contains(words), "{:?}", waiting.status);
        classes.patch(class, &PatchParams::default(), &default(before)).await?;
        ensure_ready(&world, &name).await?;
    }

    // The VM is found while it still boots: nothing in it can be frozen yet.
    let any_level = json!({"vmName": "db-2", "consistency": {"required": "Crash"}});
    world.apply_snapshot("early", any_level.clone()).await?;
    waits(&world, "early", reasons::VM_NOT_FOUND).await?;
    let guest = world.boot(&WorldConfig { vm: "db-2".into(), ..WorldConfig::default() }).await?;
    ensure_ready(&world, "early").await?;

    let stopped = guest.quit()?;
    await_target(&world, "db-2", |target| target == Some(RunState::Stopped)).await?;
    world.apply_snapshot("down", json!({"vmName": "db-2"})).await?;
    waits(&world, "down", reasons::VM_NOT_RUNNING).await?;
    let brief = json!({"vmName": "db-2", "failureDeadline": "2s"});
    let message = failed(&world, "too-late", brief, reasons::DEADLINE_EXCEEDED).await?;
    assert!(message.contains("doesn't run") && message.contains("Degrade"), "{message}");
    world.delete("down").await?;
    world.apply_snapshot("as-it-lies", any_level).await?;
    ensure_ready(&world, "as-it-lies").await?;
    let guest = stopped.restart_same_command_line().await?;
    guest.await_records(5, SOON).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_without_agent_is_refused_or_cut_while_it_is_paused() -> Result<()> {
    let world = World::start(WorldConfig { agent: Agent::Off, ..WorldConfig::default() }).await?;
    failed(&world, "strict", json!({"vmName": "db-1"}), reasons::GUEST_AGENT_UNAVAILABLE).await?;
    assert_eq!(files(&world.image_directory("db-1"))?, ["vda.qcow2", "vdb.qcow2"], "what was prepared is gone");

    let degrade = json!({"vmName": "db-1", "consistency": {"required": "Filesystem", "fallback": "Degrade"}});
    let taken = ready(&world, "degraded", degrade).await?;
    ensure_crash_by_pause(&taken)?;
    assert_eq!(condition(&taken, types::QUIESCED).1, reasons::DEGRADED);
    let crash = ready(&world, "crash", json!({"vmName": "db-1", "consistency": {"required": "Crash"}})).await?;
    ensure_crash_by_pause(&crash)?;
    world.guest()?.await_records(20, SOON).await.map(drop)
}

/// Crash-consistent, of one instant after replay, with no freeze and the virtual CPUs stopped over the cut.
fn ensure_crash_by_pause(taken: &VMSnapshot) -> Result<()> {
    let evidence = evidence(taken)?;
    ensure!(evidence.level == ConsistencyLevel::Crash && evidence.frozen_filesystems.is_none(), "{evidence:?}");
    ensure!(evidence.pause_millis > 0 && evidence.pause_millis < 2000, "{evidence:?}");
    let report = witness::check(&images(taken)?)?;
    report.ensure_one_instant()?;
    ensure!(report.ensure_frozen().is_err(), "nobody froze it: {report:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_level_that_is_reported_is_the_one_that_was_asked_for_and_proved() -> Result<()> {
    let world = World::start(WorldConfig::default()).await?;
    let guest = world.guest()?;
    let asked =
        |consistency: Value, quiesce: Value| json!({"vmName": "db-1", "consistency": consistency, "quiesce": quiesce});

    let crash = ready(&world, "crash", asked(json!({"required": "Crash"}), json!({}))).await?;
    ensure_crash_by_pause(&crash)?;
    assert_eq!(condition(&crash, types::QUIESCED).1, reasons::NOT_REQUESTED);

    let always = ready(&world, "always", asked(json!({}), json!({"pause": "Always"}))).await?;
    let proof = evidence(&always)?;
    assert_eq!((proof.level, proof.frozen_filesystems), (ConsistencyLevel::Filesystem, Some(2)));
    assert!(proof.pause_millis > 0, "{proof:?}");
    witness::check(&images(&always)?)?.ensure_frozen()?;

    let some = ready(&world, "some", asked(json!({}), json!({"mountpoints": ["/mnt/vda"]}))).await?;
    let proof = evidence(&some)?;
    assert_eq!((proof.frozen_filesystems, proof.thawed_filesystems), (Some(1), Some(1)));
    assert_eq!(proof.pause_millis, 0, "what is frozen needs no pause");
    let nowhere = asked(json!({}), json!({"mountpoints": ["/mnt/vda", "/nowhere"]}));
    failed(&world, "nowhere", nowhere, reasons::NOTHING_FROZEN).await?;
    guest.await_records(5, SOON).await?;

    let application = asked(json!({"required": "Application"}), json!({}));
    failed(&world, "application", application, reasons::LEVEL_NOT_PROVABLE).await?;

    guest.monitor().execute("stop", json!({})).await?;
    refused(&world, "paused", asked(json!({}), json!({})), reasons::VM_PAUSED).await?;
    let degrade = json!({"required": "Filesystem", "fallback": "Degrade"});
    let degraded = ready(&world, "paused-degraded", asked(degrade, json!({}))).await?;
    let proof = evidence(&degraded)?;
    assert_eq!((proof.level, proof.pause_millis), (ConsistencyLevel::Crash, 0));
    let state = guest.monitor().execute("query-status", json!({})).await?;
    assert_eq!(state["status"], "paused", "what we did not pause we never resume");
    guest.monitor().execute("cont", json!({})).await?;
    guest.await_records(20, SOON).await.map(drop)
}

/// A small file system; unmounted on drop.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path, mib: u32) -> Result<Self> {
        std::fs::create_dir_all(at)?;
        let size = format!("size={mib}m");
        run(
            "mount",
            ["-t".as_ref(), "tmpfs".as_ref(), "-o".as_ref(), size.as_ref(), "tmpfs".as_ref(), at.as_os_str()],
        )?;
        Ok(Self(at.to_owned()))
    }

    /// Leaves this much free.
    fn fill_up(&self, left_mib: u64) -> Result<PathBuf> {
        let filler = self.0.join("filler");
        let found = rustix::fs::statvfs(&self.0)?;
        let size = (found.f_bavail * found.f_frsize).saturating_sub(left_mib << 20);
        let file = std::fs::File::create(&filler)?;
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, size)?;
        Ok(filler)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a guest may have its images there. A mount that is left is seen by whoever looks for one.
        let _ = run("umount", [Path::new("-l"), &self.0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_found_before_the_window_and_does_no_harm() -> Result<()> {
    let world = World::start(WorldConfig::default()).await?;
    let copies = SmallDisk::mount(&world.directory().join("copies"), 64)?;
    make_class(&world, "copying", json!([{"name": "copy", "parameters": {"directory": copies.0}}])).await?;
    let copying = json!({"vmName": "db-1", "className": "copying"});
    let message = failed(&world, "big", copying, reasons::NO_SPACE).await?;
    assert!(message.contains("copies") && message.contains(&(64 << 20).to_string()), "{message}");
    let left: Vec<_> =
        files(&copies.0)?.iter().map(|directory| files(&copies.0.join(directory))).collect::<Result<_>>()?;
    assert!(left.iter().all(Vec::is_empty), "{left:?}");

    let image_disk = SmallDisk::mount(&world.image_directory("db-2"), 600)?;
    let guest = world.boot(&WorldConfig { vm: "db-2".into(), ..WorldConfig::default() }).await?;
    let filler = image_disk.fill_up(2)?;
    let message = failed(&world, "no-layer", json!({"vmName": "db-2"}), reasons::NO_SPACE).await?;
    assert!(message.contains("db-2"), "{message}");
    await_event(&world, "db-2", "SpaceLow").await?;
    std::fs::remove_file(filler)?;
    assert_eq!(files(&image_disk.0)?, ["vda.qcow2", "vdb.qcow2"]);
    guest.await_records(20, SOON).await?;
    ready(&world, "room-again", json!({"vmName": "db-2"})).await?;
    world.guest()?.await_records(20, SOON).await?;
    drop(guest);
    Ok(())
}

/// Waits for a warning about a target, which `kubectl describe` shows.
async fn await_event(world: &World, vm: &str, reason: &str) -> Result<()> {
    let events: Api<Event> = Api::namespaced(world.client.clone(), &world.namespace);
    let about = |event: &Event| {
        let regarding = event.regarding.as_ref();
        let is_target = regarding.is_some_and(|object| {
            object.kind.as_deref() == Some("VMTarget") && object.name.as_deref() == Some(vm) && object.uid.is_some()
        });
        is_target && event.reason.as_deref() == Some(reason) && event.type_.as_deref() == Some("Warning")
    };
    let seen = await_condition(&format!("the event {reason}"), SOON, async || {
        Ok(events.list(&ListParams::default()).await?.items.iter().any(about).then_some(()))
    })
    .await;
    seen.map_err(|error| world.with_logs(error))
}

/// Waits until a target's run state, `None` while there is no target, is as it should be.
async fn await_target(world: &World, vm: &str, as_it_should_be: impl Fn(Option<RunState>) -> bool) -> Result<()> {
    let targets: Api<VMTarget> = Api::namespaced(world.client.clone(), &world.namespace);
    let mut last = None;
    let seen = await_condition(&format!("the target {vm}"), SOON, async || {
        last = targets.get_opt(vm).await?;
        let state = last.as_ref().and_then(|target| Some(target.status.as_ref()?.run_state));
        Ok(as_it_should_be(state).then_some(()))
    })
    .await;
    seen.map_err(|error| world.with_logs(error.context(format!("{vm} is {last:#?}"))))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_directory_is_reported_and_keeps_nobody_waiting() -> Result<()> {
    let world = World::start(WorldConfig::default()).await?;
    let tenant = world.site.vm_root.join("shop");
    for vm in ["linked", "pipe", "plain"] {
        std::fs::create_dir(tenant.join(vm))?;
    }
    std::os::unix::fs::symlink(tenant.join("db-1/qmp.sock"), tenant.join("linked/qmp.sock"))?;
    rustix::fs::mkfifoat(rustix::fs::CWD, tenant.join("pipe/qmp.sock"), rustix::fs::Mode::from_raw_mode(0o600))?;
    std::fs::write(tenant.join("plain/qmp.sock"), "")?;
    std::os::unix::fs::symlink(tenant.join("db-1"), tenant.join("alias"))?;

    let targets: Api<VMTarget> = Api::namespaced(world.client.clone(), "shop");
    for vm in ["linked", "pipe", "plain"] {
        await_target(&world, vm, |state| state == Some(RunState::Unknown)).await?;
        let status = targets.get(vm).await?.status.context("a status")?;
        assert!(status.message.is_some() && status.disks.is_empty(), "{status:?}");
        let brief = json!({"vmName": vm, "failureDeadline": "1s"});
        failed(&world, &format!("of-{vm}"), brief, reasons::DEADLINE_EXCEEDED).await?;
    }
    assert!(targets.get_opt("alias").await?.is_none(), "a linked directory is no VM");
    ready(&world, "unimpressed", json!({"vmName": "db-1"})).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_follows_its_vm_through_moves_and_restarts() -> Result<()> {
    let mut world = World::start(WorldConfig::default()).await?;
    let tenant = world.site.vm_root.join("shop");
    let agent = world.programs.agent.pid();
    let running = |state| state == Some(RunState::Running);
    await_target(&world, "db-1", running).await?;
    std::fs::rename(tenant.join("db-1"), tenant.join("db-9"))?;
    await_target(&world, "db-1", |state| state.is_none()).await?;
    await_target(&world, "db-9", running).await?;
    std::fs::rename(tenant.join("db-9"), tenant.join("db-1"))?;
    await_target(&world, "db-9", |state| state.is_none()).await?;
    await_target(&world, "db-1", running).await?;

    let stopped = world.guest.take().context("the guest")?.kill()?;
    await_target(&world, "db-1", |state| state == Some(RunState::Stopped)).await?;
    std::fs::remove_dir_all(tenant.join("db-1"))?;
    await_target(&world, "db-1", |state| state.is_none()).await?;
    std::fs::create_dir(tenant.join("db-1"))?;
    world.guest = Some(stopped.restart_same_command_line().await?);
    await_target(&world, "db-1", running).await?;
    ready(&world, "afterwards", json!({"vmName": "db-1"})).await?;
    assert_eq!((world.programs.agent.is_running()?, world.programs.agent.pid()), (true, agent));
    Ok(())
}
