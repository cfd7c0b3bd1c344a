//! The same by a VMSnapshot: times from its status, and from its creation to Ready as a watcher sees it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use freezeframe_api::conditions::{is_true, types};
use freezeframe_api::v1alpha1::{ConsistencyEvidence, VMTarget};
use freezeframe_e2e::{Guest, World, await_object};
use kube::Api;
use serde_json::json;

use super::bare::millis;
use super::cost;
use super::table::Sample;
use crate::watch::Watch;

/// The class of the layers that are measured.
pub const CLASS: &str = "bench";
const SOON: Duration = Duration::from_secs(60);

/// Takes so many snapshots, one after the other.
pub async fn rounds(world: &World, guest: &Guest, vm: &str, rounds: u32) -> Result<Vec<Sample>> {
    await_target(world, vm).await?;
    let mut samples = vec![];
    for number in 0..rounds {
        samples.push(round(world, guest, vm, number).await?);
    }
    Ok(samples)
}

/// Waits until the agent has published the VM with its guest agent.
async fn await_target(world: &World, vm: &str) -> Result<()> {
    let targets: Api<VMTarget> = Api::namespaced(world.client.clone(), &world.namespace);
    let connected = |target: &VMTarget| {
        let conditions = target.status.as_ref().map_or(&[][..], |status| &status.conditions);
        is_true(conditions, types::READY) && is_true(conditions, types::AGENT_CONNECTED)
    };
    await_object(&targets, vm, "the agent to publish the VM", SOON, connected).await.map(drop)
}

/// Takes a snapshot and deletes it.
async fn round(world: &World, guest: &Guest, vm: &str, number: u32) -> Result<Sample> {
    let name = format!("{vm}-{number}");
    let mut watch = Watch::start(world.snapshots(), &name).await?;
    let start = Instant::now();
    world.apply_snapshot(&name, json!({"vmName": vm, "className": CLASS})).await?;
    let (ready, snapshot) = watch.ready(SOON, |_, _| {}).await?;
    guest.await_records(10, SOON).await?;
    let gap = guest.heartbeat_gap(start);
    let evidence =
        snapshot.status.and_then(|status| status.consistency).context("a Ready snapshot without evidence")?;
    let writes = cost::writes(&world.control_plane, &name, &world.contents()).await?;
    world.delete(&name).await?;
    Ok(sample(&evidence, gap, ready - start, writes))
}

#[allow(clippy::cast_precision_loss, reason = "milliseconds and counts are small")]
fn sample(evidence: &ConsistencyEvidence, gap: Duration, ready: Duration, writes: usize) -> Sample {
    let millis_of = |value: Option<i64>| value.unwrap_or_default() as f64;
    Sample {
        freeze: millis_of(evidence.freeze_millis),
        hold: millis_of(evidence.hold_millis),
        skew: evidence.skew_micros as f64 / 1000.0,
        pause: evidence.pause_millis as f64,
        gap: millis(gap),
        ready: Some(millis(ready)),
        writes: Some(writes as f64),
    }
}
