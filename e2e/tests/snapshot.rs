//! The main job: a snapshot of a guest that keeps writing.

use std::time::Duration;

use anyhow::Result;
use freezeframe_api::v1alpha1::{ConsistencyLevel, Phase, VMSnapshot};
use freezeframe_e2e::{Disk, Format, World, WorldConfig, await_object, witness};
use kube::Api;
use serde_json::json;

fn snapshot(name: &str, spec: serde_json::Value) -> VMSnapshot {
    serde_json::from_value(json!({
        "apiVersion": "freezeframe.dev/v1alpha1", "kind": "VMSnapshot",
        "metadata": {"name": name}, "spec": spec,
    }))
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_under_load_is_snapshotted_at_one_proved_instant() -> Result<()> {
    let world = World::start(WorldConfig::default()).await?;
    let api: Api<VMSnapshot> = Api::namespaced(world.client.clone(), "shop");
    world.guest()?.await_records(20, Duration::from_secs(30)).await?;
    api.create(&Default::default(), &snapshot("one", json!({"vmName": "db-1"}))).await?;
    let ended = |s: &VMSnapshot| s.status.as_ref().is_some_and(|s| matches!(s.phase, Phase::Ready | Phase::Failed));
    let done = await_object(&api, "one", "the snapshot to end", Duration::from_secs(60), ended).await;
    if done.is_err() {
        println!("{}", world.programs.agent.log()?);
        println!("{}", world.programs.operator.log()?);
    }
    let done = done?;
    println!("{}", world.programs.agent.log()?);
    println!("{}", serde_yaml::to_string(&done.status)?);
    let status = done.status.unwrap();
    assert_eq!(status.phase, Phase::Ready);
    assert_eq!(status.consistency.as_ref().unwrap().level, ConsistencyLevel::Filesystem);
    let images: Vec<_> =
        status.disks.iter().map(|disk| Disk::existing(&disk.handle.as_ref().unwrap().0, Format::Qcow2)).collect();
    let report = witness::check(&images)?;
    println!("{report:#?}");
    report.ensure_one_instant()?;
    report.ensure_frozen()?;
    Ok(())
}
