//! The main job: a snapshot of a guest that keeps writing.

use std::time::Duration;

use anyhow::{Result, ensure};
use freezeframe_api::v1alpha1::{ConsistencyLevel, VMSnapshot};
use freezeframe_e2e::snapshots::images;
use freezeframe_e2e::{World, WorldConfig, witness};

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
