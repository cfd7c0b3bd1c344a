//! The main job: a snapshot of a guest that keeps writing.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use freezeframe_api::conditions::{is_true, types};
use freezeframe_api::v1alpha1::{ConsistencyLevel, VMSnapshot, VMTarget};
use freezeframe_e2e::snapshots::images;
use freezeframe_e2e::{World, WorldConfig, await_object, witness};
use kube::Api;
use serde_json::json;

/// What the status proves of a guest with two file systems.
fn ensure_proved(snapshot: &VMSnapshot) -> Result<()> {
    let evidence = snapshot.status.as_ref().and_then(|status| status.consistency.clone());
    let Some(evidence) = evidence else { anyhow::bail!("no evidence") };
    ensure!(evidence.level == ConsistencyLevel::Filesystem, "{evidence:?}");
    ensure!((evidence.frozen_filesystems, evidence.thawed_filesystems) == (Some(2), Some(2)), "{evidence:?}");
    ensure!(evidence.pause_millis == 0, "a cut by QEMU needs no pause: {evidence:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_under_load_is_snapshotted_at_one_proved_instant() -> Result<()> {
    let world = World::start(WorldConfig::default()).await?;
    world.guest()?.await_records(20, Duration::from_secs(30)).await?;
    let snapshot = world.take_ready("one", "db-1").await?;
    ensure_proved(&snapshot)?;
    let report = witness::check(&images(&snapshot)?)?;
    report.ensure_one_instant()?;
    report.ensure_frozen()?;
    world.guest()?.await_records(20, Duration::from_secs(30)).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_is_booting_is_waited_for_as_long_as_the_snapshot_says() -> Result<()> {
    let mut world = World::start(WorldConfig::default()).await?;
    world.guest()?.await_records(5, Duration::from_secs(30)).await?;
    let stopped = world.guest.take().context("a guest")?.kill()?;
    let asked = async {
        let targets: Api<VMTarget> = Api::namespaced(world.client.clone(), &world.namespace);
        let boots = |target: &VMTarget| {
            let conditions = target.status.as_ref().map_or(&[][..], |status| &status.conditions);
            is_true(conditions, types::READY) && !is_true(conditions, types::AGENT_CONNECTED)
        };
        await_object(&targets, "db-1", "the VM to boot", Duration::from_secs(30), boots).await?;
        world.apply_snapshot("early", json!({"vmName": "db-1", "quiesce": {"agentTimeout": "1m"}})).await?;
        world.await_end("early").await
    };
    let (guest, ended) = tokio::join!(stopped.restart_same_command_line(), asked);
    let guest = guest?;
    ensure_proved(&ended?)?;
    guest.await_records(5, Duration::from_secs(30)).await.map(drop)
}
