//! A chain deeper than its class wants is shortened by itself while the guest writes. Needs `cargo xtask setup`.
//!
//! Every shape of a command line and a crash at every await are in the agent's own tests, on a QEMU without a guest.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::{Phase, VMTarget};
use freezeframe_e2e::snapshots::{checksums, images, phase};
use freezeframe_e2e::{Disk, Format, World, WorldConfig, await_condition, await_object, verify_by_booting, witness};
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::json;

const SOON: Duration = Duration::from_secs(60);
/// A snapshot that has to wait for nobody takes a second, on a busy machine two or three.
const PROMPTLY: Duration = Duration::from_secs(10);
const VM: &str = "db-1";
/// What the agent calls the job that shortens a chain.
const JOB: &str = "ff-shorten";

/// What each snapshot's images held when it was taken.
type Known = BTreeMap<&'static str, (Vec<Disk>, Vec<u64>)>;

async fn take(world: &World, known: &mut Known, name: &'static str) -> Result<()> {
    world.guest()?.await_records(10, SOON).await?;
    let taken = world.take(name, json!({"vmName": VM, "className": "shallow"})).await?;
    ensure!(phase(&taken) == Some(Phase::Ready), "{name}: {:#?}", taken.status);
    let images = images(&taken)?;
    let sums = checksums(&images)?;
    known.insert(name, (images, sums));
    Ok(())
}

/// Deletes a snapshot, and then what lists its images: they stay, and nobody needs them any more.
async fn retain(world: &World, name: &str) -> Result<()> {
    let content =
        world.read_snapshot(name).await?.status.and_then(|status| status.content_name).context("a content")?;
    let policy = Patch::Merge(json!({"spec": {"deletionPolicy": "Retain"}}));
    world.snapshots().patch(name, &PatchParams::default(), &policy).await?;
    world.start_deleting(name).await?;
    let (snapshots, contents) = (world.snapshots(), world.contents());
    let gone = async || Ok(snapshots.get_opt(name).await?.is_none().then_some(()));
    await_condition("the retained snapshot to be gone", SOON, gone).await.map_err(|error| world.with_logs(error))?;
    contents.delete(&content, &DeleteParams::default()).await?;
    let gone = async || Ok(contents.get_opt(&content).await?.is_none().then_some(()));
    await_condition("its content to be gone", SOON, gone).await.map_err(|error| world.with_logs(error))
}

/// Waits until the VMTarget says of its chains this, for this reason, and these depths.
async fn await_chains(world: &World, is: &str, reason: &str, depths: [i32; 2]) -> Result<()> {
    let targets: Api<VMTarget> = Api::namespaced(world.client.clone(), &world.namespace);
    let told = |target: &VMTarget| {
        target.status.as_ref().is_some_and(|status| {
            let found = find(&status.conditions, types::CHAIN_TOO_DEEP);
            let depth = status.disks.iter().map(|disk| disk.chain_depth);
            found.is_some_and(|found| found.status == is && found.reason == reason) && depth.eq(depths)
        })
    };
    let what = format!("ChainTooDeep={is}, {reason}, at depth {depths:?}");
    let found = await_object(&targets, VM, &what, SOON, told).await;
    found.map(drop).map_err(|error| world.with_logs(error))
}

async fn is_shortened(world: &World) -> Result<bool> {
    let jobs = world.guest()?.monitor().execute("query-jobs", json!({})).await?;
    Ok(jobs.as_array().into_iter().flatten().any(|job| job["id"] == JOB))
}

/// An image takes its neighbour's place when that one goes: the status says where it is.
async fn follow(world: &World, known: &mut Known) -> Result<()> {
    let (moved, sums) = known.get_mut("four").context("four was taken")?;
    let settled = await_condition("four to read as before", SOON, async || {
        let now = images(&world.read_snapshot("four").await?)?;
        Ok((checksums(&now)? == *sums).then_some(now))
    });
    *moved = settled.await.map_err(|error| world.with_logs(error))?;
    Ok(())
}

fn check(known: &Known) -> Result<()> {
    for (name, (images, sums)) in known {
        ensure!(checksums(images)? == *sums, "{name} reads differently: {images:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_that_is_too_deep_is_shortened_while_the_guest_writes_and_a_snapshot_goes_first() -> Result<()> {
    let mut world = World::start(WorldConfig::default()).await?;
    world.apply_limited_class("shallow", &json!({"maxChainDepth": 2, "mergeSpeed": "1Mi"}))?;
    let mut known = Known::new();
    for name in ["one", "two", "three"] {
        take(&world, &mut known, name).await?;
    }
    await_chains(&world, "True", reasons::NEEDED_BY_SNAPSHOTS, [3, 3]).await?;

    retain(&world, "two").await?;
    let running = async || Ok(is_shortened(&world).await?.then_some(()));
    await_condition("the chain to be shortened", SOON, running).await.map_err(|error| world.with_logs(error))?;
    let asked = Instant::now();
    let snapshot = json!({"vmName": VM, "className": "shallow"});
    let taken = world.take("four", snapshot).await?;
    ensure!(phase(&taken) == Some(Phase::Ready), "{:#?}", taken.status);
    ensure!(asked.elapsed() < PROMPTLY, "it waited {:?} for the shortening of the chain", asked.elapsed());
    ensure!(world.programs.agent.log()?.contains("makes way for a snapshot"), "nothing had to make way");
    let images = images(&taken)?;
    witness::check(&images)?.ensure_frozen()?;
    known.insert("four", (images.clone(), checksums(&images)?));

    await_chains(&world, "True", reasons::NEEDED_BY_SNAPSHOTS, [3, 3]).await?;
    check(&known)?;
    let metrics = world.programs.agent.metrics().await?;
    let depth = metrics.lines().find(|line| line.contains("chain_depth{") && line.contains("\"vda\""));
    ensure!(depth.is_some_and(|line| line.ends_with(" 3")), "{depth:?}");

    world.delete("three").await?;
    known.remove("three");
    follow(&world, &mut known).await?;
    await_chains(&world, "False", reasons::SHORT_ENOUGH, [2, 2]).await?;
    world.guest()?.await_records(10, SOON).await?;
    check(&known)?;
    restart_and_verify(&mut world).await?;
    check(&known)
}

/// The VM is killed, starts with its old command line, and its disks are whole.
async fn restart_and_verify(world: &mut World) -> Result<()> {
    let stopped = world.guest.take().context("a guest")?.kill()?;
    let written = stopped.records_written();
    let guest = stopped.restart_same_command_line().await?;
    let first = guest.heartbeat().beats().first().map_or(0, |beat| beat.record);
    ensure!(first > written, "records up to {written} were durable, but the guest goes on with {first}");
    let stopped = guest.quiesce_and_quit().await?;
    let disks: Vec<_> = stopped.images().into_iter().map(|path| Disk::existing(path, Format::Qcow2)).collect();
    for disk in verify_by_booting(&disks, &world.directory().join("verify"))? {
        ensure!(disk.clean && disk.bad == 0 && disk.records >= stopped.records_written(), "{disk:?}");
    }
    Ok(())
}
