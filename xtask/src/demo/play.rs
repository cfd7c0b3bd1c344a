//! The demo's acts, in their order.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use freezeframe_api::v1alpha1::{ConsistencyEvidence, VMSnapshot};
use freezeframe_e2e::await_condition;
use freezeframe_e2e::snapshots::images;

use super::follow::Story;
use super::proof;
use super::stage::{NAMESPACE, Stage, VM};
use super::summary::{Restart, Summary, Taken};
use crate::progress::{root, say};
use crate::watch::Watch;

const SOON: Duration = Duration::from_secs(60);
/// How long the writer is watched for its usual gap before the snapshot.
const USUAL: Duration = Duration::from_secs(3);
const FIRST: &str = "before-upgrade";
const SECOND: &str = "after-upgrade";

/// All acts; with `keep` the guest runs at the end.
pub async fn play(stage: &mut Stage, keep: bool) -> Result<()> {
    open(stage).await?;
    let (taken, snapshot) = take(stage, "examples/vmsnapshot.yaml", FIRST).await?;
    let cluster = stage.cluster()?;
    cluster.show(&format!("get vmsnap,vmt,vmsnapc --namespace {NAMESPACE}"))?;
    cluster.show(&format!("describe vmsnap {FIRST} --namespace {NAMESPACE}"))?;
    let proved = proof::prove(&snapshot, taken.acknowledged, &stage.directory().join("first"))?;
    let restart = restart(stage).await?;
    let second = second_and_delete_first(stage).await?;
    let last = proof::own_disks(stage, keep).await?;
    Summary { taken, proved, restart, second, last }.print();
    Ok(())
}

async fn open(stage: &mut Stage) -> Result<()> {
    stage.start_cluster().await?;
    let cluster = stage.cluster()?;
    cluster.apply("crds/")?;
    cluster.ask(&["wait", "--for=condition=Established", "--timeout=30s", "-f", "crds/"])?;
    for manifest in ["namespace", "rbac-operator", "rbac-agent", "admission-node-policy", "vmsnapshotclass"] {
        cluster.apply(&format!("examples/{manifest}.yaml"))?;
    }
    stage.boot_guest().await?;
    stage.start_programs().await?;
    await_target(stage)
}

/// Waits until the agent has published the VM as one that can be snapshotted.
fn await_target(stage: &mut Stage) -> Result<()> {
    let cluster = stage.cluster()?;
    let target = format!("vmt/{VM}");
    let wait = |what: &str| ["wait", "--timeout=60s", "--namespace", NAMESPACE, what, &target].map(str::to_owned);
    for what in ["--for=create", "--for=condition=Ready", "--for=condition=AgentConnected"] {
        cluster.ask(&wait(what).iter().map(String::as_str).collect::<Vec<_>>())?;
    }
    cluster.show(&format!("get vmt --namespace {NAMESPACE}")).map(drop)
}

/// Applies a VMSnapshot and tells what happens to it until it is Ready.
async fn take(stage: &mut Stage, manifest: &str, name: &str) -> Result<(Taken, VMSnapshot)> {
    let mut watch = Watch::start(stage.snapshots().await?, name).await?;
    stage.guest()?.await_records(1, SOON).await?;
    tokio::time::sleep(USUAL).await;
    let guest = stage.guest()?;
    let usual_gap = guest.heartbeat_gap(Instant::now().checked_sub(USUAL).context("the clock is too young")?);
    let (acknowledged, applied) = (guest.records_written(), Instant::now());
    stage.cluster()?.apply(manifest)?;
    let (mut story, mut created) = (Story::default(), None);
    let each = |at: Instant, snapshot: &VMSnapshot| {
        let since = at - *created.get_or_insert(at);
        if let Some(news) = story.next(snapshot) {
            say(format_args!("  +{:4} ms  {news}", since.as_millis()));
        }
    };
    let (ready, snapshot) = watch.ready(SOON, each).await?;
    stage.guest()?.await_records(20, SOON).await?;
    let gap = stage.guest()?.heartbeat_gap(applied);
    let to_ready = ready - created.context("the snapshot was never seen")?;
    Ok((Taken { acknowledged, usual_gap, gap, to_ready, evidence: evidence(&snapshot)? }, snapshot))
}

fn evidence(snapshot: &VMSnapshot) -> Result<ConsistencyEvidence> {
    let status = snapshot.status.as_ref().context("a Ready snapshot without status")?;
    status.consistency.clone().context("a Ready snapshot without evidence")
}

/// Ends the VM without warning and starts it with its old command line.
async fn restart(stage: &mut Stage) -> Result<Restart> {
    let guest = stage.guest.take().context("the guest does not run")?;
    say("killing the first VM's QEMU and starting it with the very same command line");
    let stopped = guest.kill()?;
    let before = stopped.records_written();
    let guest = stopped.restart_same_command_line().await?;
    let first = guest.heartbeat().beats().first().map(|beat| beat.record).context("no beat after the restart")?;
    stage.guest = Some(guest);
    say(format_args!("  the last record it was told is durable was {before}; it went on with {first}"));
    ensure!(first > before, "records {first} to {before} are lost");
    Ok(Restart { before, first })
}

async fn second_and_delete_first(stage: &mut Stage) -> Result<Taken> {
    say("a second snapshot, then the first one is deleted: its layer is merged while the VM runs");
    await_target(stage)?;
    let manifest = stage.directory().join(format!("{SECOND}.yaml"));
    let example = std::fs::read_to_string(root().join("examples/vmsnapshot.yaml"))?;
    std::fs::write(&manifest, example.replace(FIRST, SECOND))?;
    let (taken, _) = take(stage, &manifest.to_string_lossy(), SECOND).await?;
    let asked = Instant::now();
    stage.cluster()?.show(&format!("delete vmsnap {FIRST} --namespace {NAMESPACE} --timeout=120s"))?;
    say(format_args!("  merged and gone after {:.1} s", asked.elapsed().as_secs_f64()));
    let snapshot = await_images(stage).await?;
    proof::prove(&snapshot, taken.acknowledged, &stage.directory().join("second"))?;
    ensure_no_file_of_the_first(stage, &snapshot)?;
    Ok(taken)
}

/// Deleting the first snapshot may have renamed the second one's files: waits until its status names those that are there.
async fn await_images(stage: &mut Stage) -> Result<VMSnapshot> {
    let snapshots = stage.snapshots().await?;
    await_condition("the second snapshot's status to follow its files", SOON, async || {
        let snapshot = snapshots.get(SECOND).await?;
        Ok(images(&snapshot)?.iter().all(|image| image.path.exists()).then_some(snapshot))
    })
    .await
}

/// Beside the disks' own files only the second snapshot's may be left.
fn ensure_no_file_of_the_first(stage: &Stage, second: &VMSnapshot) -> Result<()> {
    let expected: Vec<_> = images(second)?.into_iter().map(|image| image.path).collect();
    for entry in std::fs::read_dir(stage.images())? {
        let path = entry?.path();
        let is_disk = path.extension().is_some_and(|extension| extension == "qcow2");
        ensure!(is_disk || expected.contains(&path), "{} is left of the first snapshot", path.display());
    }
    Ok(())
}
