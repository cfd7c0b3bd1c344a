//! The queue of a VM, the operator's deaths and successors, and what it all writes to the API. Needs `cargo xtask setup`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::{Phase, VMSnapshot};
use freezeframe_e2e::snapshots::{files, images, phase};
use freezeframe_e2e::{Program, Site, World, WorldConfig, await_condition, await_object, witness};
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const LEASE: &str = "freezeframe-operator";

fn spec() -> Value {
    json!({"vmName": "db-1"})
}

fn reason(snapshot: &VMSnapshot) -> &str {
    let conditions = snapshot.status.as_ref().map_or(&[][..], |status| &status.conditions);
    find(conditions, types::READY).map_or("", |condition| &condition.reason)
}

/// Starts the agent anew, so that each of its sessions stops at `point` until the file that is returned is made.
async fn hold_agent(world: &mut World, point: &str) -> Result<PathBuf> {
    let released = world.directory().join(format!("released-{point}"));
    world.programs.agent.restart_with("FREEZEFRAME_HANG_AT", format!("{point}:{}", released.display()))?;
    world.programs.agent.await_ready().await?;
    Ok(released)
}

async fn await_held(world: &World, times: usize) -> Result<()> {
    let what = format!("session {times} to be held");
    await_condition(&what, SOON, async || {
        Ok((world.programs.agent.log()?.matches("crash point reached").count() >= times).then_some(()))
    })
    .await
    .map_err(|error| world.with_logs(error))
}

async fn await_queued(world: &World, name: &str) -> Result<VMSnapshot> {
    await_object(&world.snapshots(), name, "to be queued", SOON, |snapshot| reason(snapshot) == reasons::QUEUED)
        .await
        .map_err(|error| world.with_logs(error))
}

async fn ensure_ready(world: &World, name: &str) -> Result<VMSnapshot> {
    let ended = world.await_end(name).await?;
    let is_ready = phase(&ended) == Some(Phase::Ready);
    ensure!(is_ready, "{}", world.with_logs(anyhow::anyhow!("{name} is not Ready: {:#?}", ended.status)));
    Ok(ended)
}

fn cut_at(snapshot: &VMSnapshot) -> Option<String> {
    Some(snapshot.status.as_ref()?.creation_time.as_ref()?.0.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_of_one_vm_wait_for_one_another_and_a_deleted_one_for_nobody() -> Result<()> {
    let mut world = World::start(WorldConfig::default()).await?;
    let released = hold_agent(&mut world, "prepared").await?;
    world.apply_snapshot("first", spec()).await?;
    await_held(&world, 1).await?;
    world.apply_snapshot("second", spec()).await?;
    await_queued(&world, "second").await?;
    world.apply_snapshot("dropped", spec()).await?;
    await_queued(&world, "dropped").await?;
    world.delete("dropped").await?;
    assert_eq!(world.contents().list(&ListParams::default()).await?.items.len(), 1, "only the first has a work order");
    std::fs::write(released, "")?;
    let (first, second) = (ensure_ready(&world, "first").await?, ensure_ready(&world, "second").await?);
    assert!(cut_at(&first).is_some() && cut_at(&first) < cut_at(&second), "{first:?} {second:?}");
    for taken in [first, second] {
        witness::check(&images(&taken)?)?.ensure_frozen()?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_deleted_while_it_is_taken_leaves_nothing_and_the_next_one_goes_on() -> Result<()> {
    let mut world = World::start(WorldConfig::default()).await?;
    for (times, point) in ["planned", "prepared"].into_iter().enumerate() {
        let (name, next) = (format!("at-{point}"), format!("after-{point}"));
        let before = files(&world.image_directory("db-1"))?;
        let released = hold_agent(&mut world, point).await?;
        world.apply_snapshot(&name, spec()).await?;
        // Each life of the agent is held once for the deleted snapshot and passes by for the next.
        await_held(&world, 2 * times + 1).await?;
        world.start_deleting(&name).await?;
        world.apply_snapshot(&next, spec()).await?;
        std::fs::write(released, "")?;
        world.await_gone(&name).await?;
        ensure_ready(&world, &next).await?;
        world.delete(&next).await?;
        assert_eq!(files(&world.image_directory("db-1"))?, before, "{point}");
    }
    world.guest()?.await_records(20, SOON).await.map(drop)
}

/// The lease of an operator that was killed would keep its successor waiting; that it runs out is another test's matter.
async fn succeed_at_once(world: &mut World) -> Result<()> {
    let leases: Api<Lease> = Api::all(world.client.clone());
    let held = leases.list(&ListParams::default()).await?.items.into_iter().find(|lease| lease.name_any() == LEASE);
    // One that was killed early held none.
    if let Some(held) = held {
        let of_namespace: Api<Lease> = Api::namespaced(world.client.clone(), &held.namespace().context("a namespace")?);
        of_namespace.delete(LEASE, &DeleteParams::default()).await?;
    }
    world.programs.operator.restart()
}

async fn await_content(world: &World, snapshot: &VMSnapshot) -> Result<()> {
    let name = format!("vmsnap-{}", snapshot.uid().context("a UID")?);
    await_object(&world.contents(), &name, "the work order", SOON, |_| true).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_killed_anywhere_is_replaced_by_one_that_goes_on() -> Result<()> {
    let mut world = World::start(WorldConfig::default()).await?;
    world.programs.operator.kill_9()?;
    world.apply_snapshot("unseen", spec()).await?;
    succeed_at_once(&mut world).await?;
    ensure_ready(&world, "unseen").await?;

    let released = hold_agent(&mut world, "planned").await?;
    let ordered = world.apply_snapshot("ordered", spec()).await?;
    await_held(&world, 1).await?;
    await_content(&world, &ordered).await?;
    world.programs.operator.kill_9()?;
    // As if it had died between giving the work order and saying so.
    let forgotten = Patch::Merge(json!({"status": null}));
    world.snapshots().patch_status("ordered", &PatchParams::default(), &forgotten).await?;
    succeed_at_once(&mut world).await?;
    await_object(&world.snapshots(), "ordered", "to be preparing again", SOON, |snapshot| {
        phase(snapshot) == Some(Phase::Preparing)
    })
    .await?;
    world.programs.operator.kill_9()?;
    std::fs::write(released, "")?;
    let name = format!("vmsnap-{}", ordered.uid().context("a UID")?);
    await_object(&world.contents(), &name, "the node's report", SOON, |content| {
        content.status.as_ref().is_some_and(|status| status.phase.is_some())
    })
    .await?;
    succeed_at_once(&mut world).await?;
    ensure_ready(&world, "ordered").await?;

    world.programs.operator.kill_9()?;
    world.start_deleting("ordered").await?;
    succeed_at_once(&mut world).await?;
    world.await_gone("ordered").await
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_operators_one_acts_and_when_it_falls_silent_the_other() -> Result<()> {
    let mut world = World::start(WorldConfig::default()).await?;
    let directory = world.directory().join("standby");
    std::fs::create_dir(&directory)?;
    let standby = Program::operator(&Site { directory, ..world.site.clone() })?;
    await_condition("the other to stand by", SOON, async || Ok(standby.log()?.contains("standing by").then_some(())))
        .await?;
    world.take_ready("by-the-first", "db-1").await?;
    assert!(!standby.log()?.contains("gave the work order"), "{}", standby.log()?);

    world.programs.operator.stop()?;
    let orders = world.programs.operator.log()?.matches("gave the work order").count();
    world.take_ready("by-the-second", "db-1").await?;
    assert!(standby.log()?.contains("gave the work order"), "{}", standby.log()?);
    world.programs.operator.cont()?;
    await_condition("the former leader to end", SOON, async || {
        Ok((!world.programs.operator.is_running()?).then_some(()))
    })
    .await?;
    let log = world.programs.operator.log()?;
    assert_eq!(log.matches("gave the work order").count(), orders, "it woke up as nobody:\n{log}");
    world.delete("by-the-first").await
}

/// The writes to objects of our group in the API's audit log, as `verb resource/subresource name`.
fn writes(world: &World) -> Result<Vec<String>> {
    let log = std::fs::read_to_string(world.control_plane.directory().join("audit.log"))?;
    // The last line may be half written.
    let entries = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let ours = entries.filter(|entry| {
        let wrote = ["create", "update", "patch", "delete"].contains(&entry["verb"].as_str().unwrap_or_default());
        wrote && entry["objectRef"]["apiGroup"] == "freezeframe.dev"
    });
    Ok(ours.map(|entry| describe(&entry)).collect())
}

fn describe(entry: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let object = &entry["objectRef"];
    let path = format!("{}/{}", text(&object["resource"]), text(&object["subresource"]));
    format!("{} {path} {} {}", text(&entry["verb"]), text(&object["name"]), entry["responseStatus"]["code"])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_costs_five_writes_and_a_restart_none() -> Result<()> {
    let mut world = World::start(WorldConfig::default()).await?;
    // The first one of a new cluster may have to wait for its VM to be found, and says so.
    world.take_ready("zeroth", "db-1").await?;
    let first = world.take_ready("first", "db-1").await?;
    let content = first.status.as_ref().and_then(|status| status.content_name.clone()).context("a content")?;
    let about = |written: Vec<String>| -> Vec<String> {
        written.into_iter().filter(|line| line.contains(" first ") || line.contains(&content)).collect()
    };
    let written = about(writes(&world)?);
    // One of them is the user's own.
    assert!(written.len() <= 1 + 5, "{written:#?}");
    assert!(written.len() > 1, "the audit log must tell: {:?}", writes(&world)?);

    let before = writes(&world)?.len();
    world.programs.operator.terminate()?;
    world.programs.operator.restart()?;
    world.programs.agent.terminate()?;
    world.programs.agent.restart()?;
    // By the time that this one is through, both have looked at everything.
    world.take_ready("second", "db-1").await?;
    let since: Vec<_> = writes(&world)?.split_off(before);
    let target: Vec<_> = since.iter().filter(|line| line.contains("vmtargets")).collect();
    assert!(target.len() <= 1, "only the depth of the chain is news: {since:#?}");
    assert_eq!(about(since.clone()), Vec::<String>::new(), "{since:#?}");
    Ok(())
}
