//! The commands that the pages show for getting data back, run as they stand there. Needs `cargo xtask setup`.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use freezeframe_api::v1alpha1::{RestorePhase, VMRestore, VMRestoreContent};
use freezeframe_e2e::restores::restore_phase;
use freezeframe_e2e::snapshots::{checksums, images};
use freezeframe_e2e::{Cache, Disk, Format, World, WorldConfig, await_condition, await_object, run};
use kube::{Api, ResourceExt};

const SOON: Duration = Duration::from_secs(60);
const VM: &str = "db-1";
const RESTORE: &str = include_str!("../../docs/restore.md");
const SCHEDULES: &str = include_str!("../../docs/schedules.md");
const README: &str = include_str!("../../README.md");

/// The blocks of `language` below a heading, up to the next one.
fn blocks<'a>(page: &'a str, heading: &str, language: &str) -> Result<Vec<&'a str>> {
    let below = page.split(&format!("\n## {heading}")).nth(1).with_context(|| format!("no heading {heading}"))?;
    let below = below.split("\n## ").next().unwrap_or_default();
    let fence = format!("```{language}\n");
    Ok(below.split(&fence).skip(1).filter_map(|block| block.split("```").next()).collect())
}

/// Runs commands as a user does who has `kubectl` and is in the repository; they all must succeed.
fn shell(world: &World, commands: &str) -> Result<String> {
    let kubectl = Cache::locate()?.binary("kubectl")?;
    let script = format!(
        "set -eu; PATH={}:$PATH; export KUBECONFIG={}; cd {}/..\n{commands}",
        kubectl.parent().context("a directory")?.display(),
        world.control_plane.kubeconfig().display(),
        env!("CARGO_MANIFEST_DIR"),
    );
    run("bash", ["-c", &script]).map_err(|error| world.with_logs(error))
}

/// A manifest of a page, applied.
fn apply(world: &World, manifest: &str) -> Result<()> {
    shell(world, &format!("kubectl apply -f - <<'EOF'\n{manifest}\nEOF")).map(drop)
}

fn disks(world: &World) -> Result<Vec<u64>> {
    let disk = |name: &str| Disk::existing(world.image_directory(VM).join(name), Format::Qcow2);
    checksums(&["vda.qcow2", "vdb.qcow2"].map(disk))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_commands_that_get_data_back_do_so_as_they_are_shown() -> Result<()> {
    let mut world = World::start(WorldConfig::default()).await?;
    world.guest()?.await_records(20, SOON).await?;
    let snapshot = world.take_ready("before-upgrade", VM).await?;
    let then = checksums(&images(&snapshot)?)?;
    world.guest()?.await_records(20, SOON).await?;
    // Our guests don't listen to their power button, and two minutes are long.
    world.guest.take().context("a guest")?.quit()?;

    let [dry, real] = blocks(RESTORE, "In five minutes", "sh")?[..] else { anyhow::bail!("two blocks") };
    let now = disks(&world)?;
    let said = shell(&world, dry)?;
    ensure!(said.contains("vda: ") && said.contains("vdb: ") && said.contains(" bytes\n"), "{said}");
    ensure!(disks(&world)? == now && now != then, "a dry run did something");
    shell(&world, real)?;
    ensure!(disks(&world)? == then, "not the data of the snapshot");
    let undo = world.restores().get("undo-upgrade").await?.status.and_then(|status| status.pre_restore_snapshot_name);
    world.restore_in_place("undone", &world.read_snapshot(&undo.context("nothing was kept")?).await?).await?;
    ensure!(disks(&world)? == now, "not undone");

    shell(&world, "kubectl delete vmrestore undo-upgrade -n shop")?;
    let [readme] = blocks(README, "Getting data back", "sh")?[..] else { anyhow::bail!("one block") };
    shell(&world, readme)?;
    ensure!(disks(&world)? == then, "not the data of the snapshot");
    world.await_success("look-at-yesterday").await?;

    shell(&world, "kubectl get vmsnap -n shop --sort-by=.status.creationTime")?;
    apply(&world, blocks(README, "A first schedule", "yaml")?.first().context("a schedule")?)?;
    shell(&world, "kubectl wait --for=condition=Ready vmss/nightly -n shop --timeout=30s")?;
    let [plan] = blocks(SCHEDULES, "What is kept", "sh")?[..] else { anyhow::bail!("one block") };
    shell(&world, plan).map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_is_given_up_by_the_commands_that_are_shown_for_a_node_that_is_gone() -> Result<()> {
    let mut world = World::start(WorldConfig::default()).await?;
    world.guest()?.await_records(20, SOON).await?;
    let snapshot = world.take_ready("before-upgrade", VM).await?;
    world.programs.agent.kill_9()?;
    let spec = serde_json::json!({"confirm": snapshot.uid(), "stopVM": true});
    world.apply_restore("undo-upgrade", &snapshot, spec).await?;
    let is_stopping = |restore: &VMRestore| restore_phase(restore) == Some(RestorePhase::Stopping);
    let waits = await_object(&world.restores(), "undo-upgrade", "the work order", SOON, is_stopping).await;
    let waits = waits.map_err(|error| world.with_logs(error))?;
    let content = waits.status.and_then(|status| status.content_name).context("no content")?;
    let [give_up] = blocks(RESTORE, "The node is gone", "sh")?[..] else { anyhow::bail!("one block") };
    shell(&world, give_up)?;
    let contents: Api<VMRestoreContent> = Api::all(world.client.clone());
    await_condition("the restore to be gone", SOON, async || {
        let left = world.restores().get_opt("undo-upgrade").await?.is_some();
        Ok((!left && contents.get_opt(&content).await?.is_none()).then_some(()))
    })
    .await
    .map_err(|error| world.with_logs(error))?;
    world.guest()?.await_records(10, SOON).await.map(drop)
}
