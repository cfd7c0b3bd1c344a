//! A schedule every few seconds on a guest that keeps writing: snapshots come, and those that no rule keeps go for real.
//! Needs `cargo xtask setup`.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use freezeframe_api::SCHEDULE_UID_LABEL;
use freezeframe_api::v1alpha1::{Phase, VMSnapshot, VMSnapshotSchedule};
use freezeframe_e2e::snapshots::{files, images, phase};
use freezeframe_e2e::{Controllers, World, WorldConfig, await_condition, await_object, witness};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(120);

/// Writes the schedule as a file, and applies it as a user does.
fn apply(world: &World, name: &str, spec: &Value) -> Result<()> {
    let path = world.directory().join(format!("{name}.yaml"));
    let metadata = json!({"name": name, "namespace": world.namespace});
    let object = json!({"apiVersion": "freezeframe.dev/v1alpha1", "kind": "VMSnapshotSchedule", "metadata": metadata,
        "spec": spec});
    std::fs::write(&path, object.to_string())?;
    world.control_plane.kubectl(&["apply", "--server-side", "-f", &path.display().to_string()]).map(drop)
}

fn schedules(world: &World) -> Api<VMSnapshotSchedule> {
    Api::namespaced(world.client.clone(), &world.namespace)
}

async fn made_by(world: &World, schedule: &VMSnapshotSchedule) -> Result<Vec<VMSnapshot>> {
    let uid = schedule.uid().context("a UID")?;
    let params = ListParams::default().labels(&format!("{SCHEDULE_UID_LABEL}={uid}"));
    Ok(world.snapshots().list(&params).await?.items)
}

async fn patch(world: &World, schedule: &str, spec: Value) -> Result<()> {
    let patch = Patch::Merge(json!({"spec": spec}));
    schedules(world).patch(schedule, &PatchParams::default(), &patch).await.map(drop)?;
    Ok(())
}

/// Waits until so many snapshots of the schedule have been seen Ready, gone ones included.
async fn await_ready(world: &World, schedule: &VMSnapshotSchedule, count: usize) -> Result<BTreeSet<String>> {
    let mut seen = BTreeSet::new();
    await_condition(&format!("{count} snapshots of the schedule"), SOON, async || {
        for snapshot in made_by(world, schedule).await? {
            ensure!(phase(&snapshot) != Some(Phase::Failed), "{snapshot:#?}");
            if phase(&snapshot) == Some(Phase::Ready) {
                seen.insert(snapshot.name_any());
            }
        }
        Ok((seen.len() >= count).then_some(()))
    })
    .await
    .map_err(|error| world.with_logs(error))?;
    Ok(seen)
}

/// Waits until just these many are left, and none of them is being taken or deleted.
async fn await_left(world: &World, schedule: &VMSnapshotSchedule, count: usize) -> Result<Vec<VMSnapshot>> {
    await_condition(&format!("{count} snapshots to be left"), SOON, async || {
        let left = made_by(world, schedule).await?;
        let at_rest = left.iter().all(|snapshot| phase(snapshot) == Some(Phase::Ready));
        Ok((at_rest && left.len() == count).then_some(left))
    })
    .await
    .map_err(|error| world.with_logs(error))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_takes_snapshots_and_keeps_the_last_two_and_the_held_one() -> Result<()> {
    let world = World::start(WorldConfig::default()).await?;
    let before = files(&world.image_directory("db-1"))?;
    apply(
        &world,
        "often",
        &json!({"schedule": "*/4 * * * * *", "keep": {"last": 2}, "selector": {"vmNames": ["db-1"]}}),
    )?;
    world.control_plane.kubectl(&[
        "wait",
        "--for=condition=Ready",
        "--timeout=30s",
        "--namespace=shop",
        "vmss/often",
    ])?;
    let schedule = schedules(&world).get("often").await?;
    let first = await_ready(&world, &schedule, 1).await?.pop_first().context("a first one")?;
    let held = Patch::Merge(json!({"spec": {"hold": true}}));
    world.snapshots().patch(&first, &PatchParams::default(), &held).await?;
    let seen = await_ready(&world, &schedule, 6).await?;
    world.control_plane.kubectl(&[
        "wait",
        "--for=condition=Protected",
        "--timeout=30s",
        "--namespace=shop",
        "vmss/often",
    ])?;

    patch(&world, "often", json!({"keep": {"last": 1}})).await?;
    let expected = await_object(&schedules(&world), "often", "the plan to say what stays", SOON, |schedule| {
        let plan = schedule.status.as_ref().and_then(|status| status.plan.first());
        plan.is_some_and(|plan| plan.keep.len() == 2 && plan.next.len() == 1)
    })
    .await
    .map_err(|error| world.with_logs(error))?;
    let metrics = world.programs.operator.metrics().await?;
    let age = r#"freezeframe_schedule_recovery_point_age_seconds{namespace="shop",schedule="often",vm="db-1"}"#;
    assert!(metrics.contains(age), "{metrics}");
    assert!(expected.status.is_some_and(|status| status.last_successful_time.is_some()));

    // A schedule that is deleted leaves its snapshots, whole.
    schedules(&world).delete("often", &DeleteParams::default()).await?;
    await_condition("the snapshots under way to end", SOON, async || {
        let left = made_by(&world, &schedule).await?;
        Ok(left.iter().all(|snapshot| phase(snapshot) == Some(Phase::Ready)).then_some(()))
    })
    .await
    .map_err(|error| world.with_logs(error))?;
    let left = made_by(&world, &schedule).await?;
    assert!((2..=4).contains(&left.len()), "{left:#?}");
    assert!(left.iter().any(|snapshot| snapshot.name_any() == first), "the held one is there: {left:#?}");
    assert!(seen.iter().any(|name| !left.iter().any(|snapshot| snapshot.name_any() == *name)), "some are gone");
    for snapshot in &left {
        witness::check(&images(snapshot)?)?.ensure_frozen()?;
    }
    world.snapshots().patch(&first, &PatchParams::default(), &Patch::Merge(json!({"spec": {"hold": false}}))).await?;
    for snapshot in &left {
        world.delete(&snapshot.name_any()).await?;
    }
    assert_eq!(files(&world.image_directory("db-1"))?, before, "each layer that was made is gone");
    world.guest()?.await_records(20, Duration::from_secs(30)).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_suspended_or_paused_is_neither_taken_nor_removed() -> Result<()> {
    let world = World::start(WorldConfig::default()).await?;
    apply(&world, "often", &json!({"schedule": "*/3 * * * * *", "keep": {"last": 2}}))?;
    let schedule = await_object(&schedules(&world), "often", "to be there", SOON, |_| true).await?;
    await_ready(&world, &schedule, 3).await?;
    // An emergency: one command stops everything.
    world.control_plane.kubectl(&["annotate", "vmsc", "--all", "freezeframe.dev/paused=true"])?;
    await_reason(&world, "Paused").await?;
    await_condition("the snapshots under way to end", SOON, async || {
        let left = made_by(&world, &schedule).await?;
        Ok(left.iter().all(|left| phase(left).is_some_and(|phase| phase != Phase::Deleting)).then_some(()))
    })
    .await?;
    let names = |left: &[VMSnapshot]| left.iter().map(ResourceExt::name_any).collect::<BTreeSet<_>>();
    let left = names(&made_by(&world, &schedule).await?);
    patch(&world, "often", json!({"keep": {"last": 1}})).await?;
    let seen = schedules(&world).get("often").await?.metadata.generation;
    await_object(&schedules(&world), "often", "the change to be seen", SOON, |schedule| {
        schedule.status.as_ref().is_some_and(|status| status.observed_generation >= seen)
    })
    .await?;
    assert_eq!(names(&made_by(&world, &schedule).await?), left);
    // By hand, what is paused waits.
    world.apply_snapshot("by-hand", json!({"vmName": "db-1"})).await?;
    await_object(&world.snapshots(), "by-hand", "to wait", SOON, |snapshot| {
        snapshot.status.as_ref().and_then(|status| status.message.as_ref()).is_some_and(|said| said.contains("paused"))
    })
    .await?;
    patch(&world, "often", json!({"suspend": true})).await?;
    world.control_plane.kubectl(&["annotate", "vmsc", "--all", "freezeframe.dev/paused-"])?;
    world.await_end("by-hand").await?;
    await_reason(&world, "Suspended").await?;
    patch(&world, "often", json!({"suspend": false})).await?;
    await_ready(&world, &schedule, left.len()).await?;
    patch(&world, "often", json!({"schedule": "0 0 1 1 *"})).await?;
    await_left(&world, &schedule, 1).await.map(drop)
}

async fn await_reason(world: &World, reason: &str) -> Result<()> {
    let says = |schedule: &VMSnapshotSchedule| {
        let conditions = schedule.status.as_ref().map_or(&[][..], |status| &status.conditions);
        conditions.iter().any(|condition| condition.type_ == "Ready" && condition.reason == reason)
    };
    let what = format!("to say {reason}");
    await_object(&schedules(world), "often", &what, SOON, says).await.map(drop).map_err(|error| world.with_logs(error))
}

/// The schedule owns its snapshots, and Kubernetes' own garbage collector deletes what it owned.
#[tokio::test(flavor = "multi_thread")]
async fn the_snapshots_of_a_schedule_that_is_to_take_them_with_it_go_and_the_held_one_stays() -> Result<()> {
    let world = World::start(WorldConfig { controllers: Controllers::Manager, ..WorldConfig::default() }).await?;
    let before = files(&world.image_directory("db-1"))?;
    apply(&world, "often", &json!({"schedule": "*/4 * * * * *", "deletionPolicy": "Delete"}))?;
    let schedule = await_object(&schedules(&world), "often", "to be there", SOON, |_| true).await?;
    let held = await_ready(&world, &schedule, 3).await?.pop_first().context("a first one")?;
    patch(&world, "often", json!({"suspend": true})).await?;
    let set_hold = |on: bool| Patch::Merge(json!({"spec": {"hold": on}}));
    world.snapshots().patch(&held, &PatchParams::default(), &set_hold(true)).await?;
    let at_rest = |left: &[VMSnapshot]| left.iter().all(|left| phase(left) == Some(Phase::Ready));
    await_condition("the snapshots under way to end", SOON, async || {
        Ok(at_rest(&made_by(&world, &schedule).await?).then_some(()))
    })
    .await?;
    await_object(&world.snapshots(), &held, "to be nobody's", SOON, |held| held.owner_references().is_empty()).await?;
    schedules(&world).delete("often", &DeleteParams::default()).await?;
    let left = await_condition("the held snapshot alone to be left", SOON, async || {
        let left = made_by(&world, &schedule).await?;
        Ok((left.len() == 1).then_some(left))
    })
    .await
    .map_err(|error| world.with_logs(error))?;
    assert_eq!(left[0].name_any(), held);
    witness::check(&images(&left[0])?)?.ensure_frozen()?;
    assert_eq!(left[0].metadata.deletion_timestamp, None, "it outlives its schedule");
    world.snapshots().patch(&held, &PatchParams::default(), &set_hold(false)).await?;
    world.delete(&held).await?;
    assert_eq!(files(&world.image_directory("db-1"))?, before, "each layer that was made is gone");
    world.guest()?.await_records(20, Duration::from_secs(30)).await.map(drop)
}
