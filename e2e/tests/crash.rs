//! Programs die, hang, or are told to end in the middle of a window: the guest always comes back, and nothing is left.
//! Needs `cargo xtask setup`.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::{Phase, VMSnapshot};
use freezeframe_e2e::snapshots::{files, images, phase};
use freezeframe_e2e::{
    DiskSpec, Filesystem, Format, Guest, Program, Trouble, World, WorldConfig, await_condition, witness,
};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
/// What taking back may take: what can't be taken back at once is tried again after some seconds.
const TAKEN_BACK: Duration = Duration::from_secs(60);
/// The default `maxHold` and two seconds: no guest is held for longer, whatever dies.
const LONGEST_HOLD: Duration = Duration::from_secs(7);

fn spec() -> Value {
    json!({"vmName": "db-1"})
}

/// The reason of condition `Ready`.
fn reason(snapshot: &VMSnapshot) -> &str {
    let conditions = snapshot.status.as_ref().map_or(&[][..], |status| &status.conditions);
    find(conditions, types::READY).map_or("", |condition| &condition.reason)
}

fn ensure_failed(snapshot: &VMSnapshot, expected: &[&str]) -> Result<()> {
    let failed = phase(snapshot) == Some(Phase::Failed) && expected.contains(&reason(snapshot));
    ensure!(failed, "not Failed with one of {expected:?}: {:#?}", snapshot.status);
    Ok(())
}

/// Waits until `program` has written `words` once more than `before` times.
async fn await_words(program: &Program, words: &str, before: usize) -> Result<()> {
    let what = format!("`{words}` in a log");
    await_condition(&what, SOON, async || Ok((count(program, words)? > before).then_some(()))).await
}

fn count(program: &Program, words: &str) -> Result<usize> {
    Ok(program.log()?.matches(words).count())
}

async fn await_crash_point(world: &World, before: usize) -> Result<()> {
    await_words(&world.programs.agent, "crash point reached", before).await.map_err(|error| world.with_logs(error))
}

/// Starts the agent anew, to run into `point` as `variable` says, and a snapshot that leads it there.
async fn run_into(world: &mut World, variable: &str, point: &str, name: &str) -> Result<()> {
    let before = count(&world.programs.agent, "crash point reached")?;
    world.programs.agent.restart_with(variable, point)?;
    world.programs.agent.await_ready().await?;
    world.apply_snapshot(name, spec()).await?;
    await_crash_point(world, before).await
}

/// What the guard has on disk.
fn guard_records(world: &World) -> Result<Vec<String>> {
    let mut names = files(&world.site.directory.join("guard"))?;
    names.retain(|name| Path::new(name).extension().is_some_and(|extension| extension == "json"));
    Ok(names)
}

/// Waits until nothing of a snapshot is left: no file, no layer in QEMU, no file descriptor, no record of the guard.
async fn await_nothing_left(world: &World, vm: &str, guest: &Guest) -> Result<()> {
    let clean = await_condition("nothing to be left", TAKEN_BACK, async || {
        let disks = guest.config().disks.len();
        let in_directory = files(&world.image_directory(vm))?;
        let nodes = guest.monitor().execute("query-named-block-nodes", json!({"flat": true})).await?;
        let layers = nodes.as_array().map_or(0, |nodes| nodes.iter().filter(|node| node["drv"] == "qcow2").count());
        let jobs = guest.monitor().execute("query-block-jobs", json!({})).await?;
        let records = guard_records(world)?;
        ensure!(in_directory.len() == disks, "files are left: {in_directory:?}");
        ensure!(layers == disks, "layers are left in QEMU: {nodes}");
        ensure!(jobs == json!([]), "jobs are left: {jobs}");
        ensure!(records.is_empty(), "the guard still has {records:?}");
        Ok(Some(()))
    });
    clean.await.map_err(|error| world.with_logs(error))
}

/// The guest stood still for no longer than it may since `since`, and writes again.
async fn ensure_writes_again(world: &World, since: Instant, longest: Duration) -> Result<()> {
    let guest = world.guest()?;
    guest.await_records(20, SOON).await.map_err(|error| world.with_logs(error))?;
    let gap = guest.heartbeat_gap(since);
    ensure!(gap < longest, "{}", world.with_logs(anyhow::anyhow!("the guest stood still for {gap:?}")));
    println!("the guest stood still for {gap:?}");
    Ok(())
}

/// A snapshot taken now is one good instant.
async fn ensure_works_again(world: &World, name: &str) -> Result<()> {
    let taken = world.take_ready(name, "db-1").await?;
    witness::check(&images(&taken)?)?.ensure_frozen()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_killed_anywhere_in_the_window_leaves_a_guest_that_writes_and_nothing_else() -> Result<()> {
    let mut world = World::start(WorldConfig::default()).await?;
    for point in ["transaction", "armed", "frozen", "cut", "thawed"] {
        let since = Instant::now();
        run_into(&mut world, "FREEZEFRAME_CRASH_AT", point, &format!("at-{point}")).await?;
        ensure_writes_again(&world, since, LONGEST_HOLD).await.context(point)?;
        world.programs.agent.restart()?;
        world.programs.agent.await_ready().await?;
        let ended = world.await_end(&format!("at-{point}")).await?;
        ensure_failed(&ended, &[reasons::AGENT_RESTARTED])?;
        await_nothing_left(&world, "db-1", world.guest()?).await.context(point)?;
    }
    ensure_works_again(&world, "afterwards").await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_stopped_in_the_window_loses_the_guest_to_the_guard() -> Result<()> {
    let mut world = World::start(WorldConfig::default()).await?;
    for point in ["frozen", "transaction"] {
        let thawed = count(&world.programs.guard, "settled")?;
        let since = Instant::now();
        run_into(&mut world, "FREEZEFRAME_STOP_AT", point, &format!("at-{point}")).await?;
        // Silence for 1.5 s makes the guard act, and it has two seconds for that.
        ensure_writes_again(&world, since, Duration::from_millis(3500)).await.context(point)?;
        await_words(&world.programs.guard, "settled", thawed).await.map_err(|error| world.with_logs(error))?;
        world.programs.agent.cont()?;
        let ended = world.await_end(&format!("at-{point}")).await?;
        ensure_failed(
            &ended,
            &[reasons::GUARD_UNAVAILABLE, reasons::CUT_FAILED, reasons::WINDOW_BROKEN, reasons::THAW_OWED],
        )?;
        await_nothing_left(&world, "db-1", world.guest()?).await.context(point)?;
    }
    world.programs.agent.restart()?;
    ensure_works_again(&world, "afterwards").await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_hangs_with_its_heart_beating_loses_the_guest_to_the_guard() -> Result<()> {
    let mut world = World::start(WorldConfig::default()).await?;
    let (released, since) = (world.directory().join("released"), Instant::now());
    run_into(&mut world, "FREEZEFRAME_HANG_AT", &format!("frozen:{}", released.display()), "hung").await?;
    ensure_writes_again(&world, since, LONGEST_HOLD).await?;
    std::fs::write(released, "")?;
    ensure_failed(
        &world.await_end("hung").await?,
        &[reasons::GUARD_UNAVAILABLE, reasons::CUT_FAILED, reasons::WINDOW_BROKEN],
    )?;
    await_nothing_left(&world, "db-1", world.guest()?).await?;
    world.programs.agent.restart()?;
    ensure_works_again(&world, "afterwards").await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_killed_between_cut_and_rename_costs_no_acknowledged_record() -> Result<()> {
    let mut world = World::start(WorldConfig::default()).await?;
    run_into(&mut world, "FREEZEFRAME_CRASH_AT", "transaction", "killed").await?;
    world.guest()?.await_records(50, SOON).await.map_err(|error| world.with_logs(error))?;
    let guard = world.programs.guard.log()?;
    let (renamed, thawed) = (guard.find("names exchanged"), guard.find("thawed"));
    assert!(renamed.is_some() && renamed < thawed, "names change hands before the guest goes on:\n{guard}");

    let guest = world.guest.take().context("the guest")?;
    let disks = guest.config().disks.clone();
    let stopped = guest.kill()?;
    let written = stopped.records_written();
    let found = witness::check(&disks)?;
    found.ensure_one_instant()?;
    assert!(found.disks.iter().all(|disk| disk.records.whole >= written), "acknowledged {written}: {found:?}");

    let guest = stopped.restart_same_command_line().await?;
    assert!(guest.records_written() > written, "it goes on where it was");
    world.guest = Some(guest);
    world.programs.agent.restart()?;
    ensure_failed(&world.await_end("killed").await?, &[reasons::AGENT_RESTARTED])?;
    await_nothing_left(&world, "db-1", world.guest()?).await?;
    ensure_works_again(&world, "afterwards").await
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_guard_the_agent_thaws_at_once_and_opens_no_window_until_one_is_back() -> Result<()> {
    let mut world = World::start(WorldConfig::default()).await?;
    let released = world.directory().join("released");
    run_into(&mut world, "FREEZEFRAME_HANG_AT", &format!("frozen:{}", released.display()), "lost").await?;
    world.programs.guard.kill_9()?;
    std::fs::write(released, "")?;
    world.guest()?.await_records(10, Duration::from_secs(3)).await.map_err(|error| world.with_logs(error))?;
    ensure_failed(&world.await_end("lost").await?, &[reasons::GUARD_UNAVAILABLE])?;

    ensure_failed(&world.take("alone", spec()).await?, &[reasons::GUARD_UNAVAILABLE])?;
    let settled = count(&world.programs.guard, "settled")?;
    world.programs.guard.restart()?;
    await_words(&world.programs.guard, "settled", settled).await.context("the record that it found")?;
    await_nothing_left(&world, "db-1", world.guest()?).await?;
    ensure_works_again(&world, "together").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_freeze_that_comes_late_is_thawed_by_the_guard_or_without_one_by_the_agent() -> Result<()> {
    let config = WorldConfig { trouble: Trouble::SlowFreeze, ..WorldConfig::default() };
    let mut world = World::start(config.clone()).await?;
    let hasty = |vm: &str, timeout: &str| json!({"vmName": vm, "quiesce": {"freezeTimeout": timeout}});
    ensure_failed(&world.take("late", hasty("db-1", "1s")).await?, &[reasons::FREEZE_TIMED_OUT])?;
    let owed = world.take("owed", spec()).await?;
    ensure_failed(&owed, &[reasons::THAW_OWED]).map_err(|error| world.with_logs(error))?;
    let since = Instant::now();
    world.guest()?.release_freeze().await?;
    await_words(&world.programs.guard, "settled", 0).await?;
    assert!(
        world.programs.guard.log()?.contains("thawed"),
        "the late freeze did come:\n{}",
        world.programs.guard.log()?
    );
    ensure_writes_again(&world, since, LONGEST_HOLD).await?;
    await_nothing_left(&world, "db-1", world.guest()?).await?;
    ensure_works_again(&world, "on-time").await?;

    let other = world.boot(&WorldConfig { vm: "db-2".into(), ..config }).await?;
    world.apply_snapshot("alone", hasty("db-2", "20s")).await?;
    await_condition("the window to be armed", SOON, async || Ok((!guard_records(&world)?.is_empty()).then_some(())))
        .await?;
    world.programs.guard.kill_9()?;
    other.release_freeze().await?;
    ensure_failed(&world.await_end("alone").await?, &[reasons::GUARD_UNAVAILABLE])?;
    other.await_records(10, Duration::from_secs(3)).await.map_err(|error| world.with_logs(error))?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_api_away_a_session_ends_safely_and_reports_later() -> Result<()> {
    let mut world = World::start(WorldConfig::default()).await?;
    let released = world.directory().join("released");
    let since = Instant::now();
    run_into(&mut world, "FREEZEFRAME_HANG_AT", &format!("frozen:{}", released.display()), "unheard").await?;
    world.control_plane.stop_apiserver()?;
    std::fs::write(released, "")?;
    ensure_writes_again(&world, since, LONGEST_HOLD).await?;
    let journal = world.site.directory.join("agent/contents");
    await_condition("the session to end", SOON, async || {
        let records = files(&journal)?.into_iter().map(|name| std::fs::read_to_string(journal.join(name)));
        Ok(records.flatten().any(|record| record.contains(r#""stage": "Complete""#)).then_some(()))
    })
    .await?;
    come_back(&mut world).await?;
    assert_eq!(phase(&world.await_end("unheard").await?), Some(Phase::Ready));

    run_into(&mut world, "FREEZEFRAME_CRASH_AT", "transaction", "interrupted").await?;
    let images = files(&world.image_directory("db-1"))?.len();
    world.control_plane.stop_apiserver()?;
    world.programs.agent.restart()?;
    await_condition("the files to be taken back with no API", TAKEN_BACK, async || {
        Ok((files(&world.image_directory("db-1"))?.len() == images - 2).then_some(()))
    })
    .await
    .map_err(|error| world.with_logs(error))?;
    come_back(&mut world).await?;
    ensure_failed(&world.await_end("interrupted").await?, &[reasons::AGENT_RESTARTED])?;
    world.delete("unheard").await?;
    await_nothing_left(&world, "db-1", world.guest()?).await
}

/// The API comes back, and with it an operator, which ends when it has lost its lease.
async fn come_back(world: &mut World) -> Result<()> {
    world.control_plane.start_apiserver().await?;
    if !world.programs.operator.is_running()? {
        world.programs.operator.restart()?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_lost_its_state_directory_leaves_what_it_reported_as_it_is() -> Result<()> {
    let mut world = World::start(WorldConfig::default()).await?;
    let taken = world.take_ready("taken", "db-1").await?;
    world.programs.agent.kill_9()?;
    std::fs::remove_dir_all(world.site.directory.join("agent"))?;
    world.programs.agent.restart()?;
    await_words(&world.programs.agent, "no record of what its node reported", 0).await?;
    assert_eq!(world.read_snapshot("taken").await?.status, taken.status);
    let next = world.take_ready("next", "db-1").await?;
    let kept = images(&taken)?;
    world.delete("taken").await?;
    witness::check(&kept)?.ensure_frozen()?;
    witness::check(&images(&next)?)?.ensure_frozen()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_told_to_end_closes_its_window_first() -> Result<()> {
    let mut world = World::start(WorldConfig::default()).await?;
    let released = world.directory().join("released");
    let since = Instant::now();
    run_into(&mut world, "FREEZEFRAME_HANG_AT", &format!("frozen:{}", released.display()), "orderly").await?;
    world.programs.agent.ask_to_end()?;
    std::fs::write(released, "")?;
    world.programs.agent.await_success().await?;
    assert!(!world.programs.guard.log()?.contains("takes over"), "nothing was left to the guard");
    ensure_writes_again(&world, since, LONGEST_HOLD).await?;
    world.programs.agent.restart()?;
    assert_eq!(phase(&world.await_end("orderly").await?), Some(Phase::Ready));
    witness::check(&images(&world.read_snapshot("orderly").await?)?)?.ensure_frozen()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_window_that_the_guest_itself_broke_proves_nothing() -> Result<()> {
    let disk = |filesystem| DiskSpec { format: Format::Qcow2, filesystem, mib: 512 };
    let disks = vec![disk(Filesystem::Ext4), disk(Filesystem::Xfs)];
    let mut world = World::start(WorldConfig { trouble: Trouble::Thawer, disks, ..WorldConfig::default() }).await?;
    for (name, fallback) in [("strict", "Fail"), ("degraded", "Degrade")] {
        let before = count(&world.programs.agent, "crash point reached")?;
        let released = world.directory().join(name);
        world.programs.agent.restart_with("FREEZEFRAME_HANG_AT", format!("frozen:{}", released.display()))?;
        let consistency = json!({"required": "Filesystem", "fallback": fallback});
        world.apply_snapshot(name, json!({"vmName": "db-1", "consistency": consistency})).await?;
        await_crash_point(&world, before).await?;
        await_early_thaw(&world, name).await?;
        std::fs::write(released, "")?;
        world.await_end(name).await?;
    }
    ensure_failed(&world.await_end("strict").await?, &[reasons::WINDOW_BROKEN])?;
    let degraded = world.await_end("degraded").await?.status.context("a status")?;
    assert_eq!(degraded.phase, Phase::Ready);
    let evidence = degraded.consistency.context("evidence")?;
    assert_eq!((evidence.frozen_filesystems, evidence.thawed_filesystems), (Some(2), Some(1)));
    assert_eq!(evidence.level, freezeframe_api::v1alpha1::ConsistencyLevel::Crash);
    Ok(())
}

/// Waits until the guest's own thawer says that it thawed.
async fn await_early_thaw(world: &World, name: &str) -> Result<()> {
    let wanted = if name == "strict" { 1 } else { 2 };
    await_condition("the guest's early thaw", SOON, async || {
        Ok((world.guest()?.console()?.matches("thawed early").count() >= wanted).then_some(()))
    })
    .await
    .map_err(|error| world.with_logs(error.context(world.guest().and_then(Guest::console).unwrap_or_default())))
}
