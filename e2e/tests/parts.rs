//! The parts themselves: what every other topic stands on. Needs `cargo xtask setup`.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use freezeframe_e2e::{
    Agent, ControlPlane, Controllers, Disk, Filesystem, Format, Guest, GuestConfig, Load, Program, Site, Style, World,
    WorldConfig, await_condition, await_object, verify_by_booting, witness,
};
use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use kube::Api;

const SOON: Duration = Duration::from_secs(60);

fn guest_with_two_disks(directory: &Path) -> Result<GuestConfig> {
    let mut config = GuestConfig::new("shop", "db-1", &directory.join("vms"), &directory.join("guest"));
    config.disks = vec![
        Disk::create(directory.join("a.qcow2"), Format::Qcow2, Filesystem::Ext4, 512)?,
        Disk::create(directory.join("b.raw"), Format::Raw, Filesystem::Xfs, 512)?,
    ];
    Ok(config)
}

#[tokio::test]
async fn the_control_plane_answers_goes_away_and_comes_back() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut plane = ControlPlane::start(directory.path(), Controllers::Manager).await?;
    let namespaces = Api::<Namespace>::all(plane.client().await?);
    assert!(namespaces.get_opt("default").await?.is_some());
    assert!(plane.kubectl(&["version"])?.contains("Server Version: v1.36.4"), "the build stamps its version");

    let accounts = Api::<ServiceAccount>::namespaced(plane.client().await?, "default");
    await_object(&accounts, "default", "the controllers to work", SOON, |_| true).await?;

    plane.stop_apiserver()?;
    assert!(namespaces.get_opt("default").await.is_err());
    plane.start_apiserver().await?;
    assert!(namespaces.get_opt("default").await?.is_some());
    Ok(())
}

#[tokio::test]
async fn somebody_without_rights_is_refused() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let plane = ControlPlane::start(directory.path(), Controllers::None).await?;
    let nobody = plane.kubeconfig_of("nobody", "nobody", &["visitors"])?;
    let answer = plane.kubectl(&["--kubeconfig", &nobody.display().to_string(), "get", "namespaces"]);
    let refusal = format!("{:#}", answer.unwrap_err());
    assert!(refusal.contains(r#"User "nobody" cannot list resource "namespaces""#), "{refusal}");
    Ok(())
}

#[tokio::test]
async fn the_disks_of_a_guest_that_powered_off_are_clean() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let guest = Guest::boot(guest_with_two_disks(directory.path())?).await?;
    guest.await_records(50, SOON).await?;
    assert!(guest.config().socket_directory().join("qmp.sock").exists());
    let disks = guest.config().disks.clone();
    let stopped = guest.quiesce_and_quit().await?;

    let report = witness::check(&disks)?;
    report.ensure_frozen()?;
    assert!(report.disks[0].records.whole >= stopped.records_written(), "{report:?}");
    Ok(())
}

#[tokio::test]
async fn a_killed_guest_needs_replay_and_starts_again_with_its_command_line() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut config = guest_with_two_disks(directory.path())?;
    (config.load, config.style) = (Load::Heavy, Style::Drive);
    let guest = Guest::boot(config).await?;
    guest.await_records(100, SOON).await?;
    let (disks, command_line) = (guest.config().disks.clone(), guest.command_line());
    let stopped = guest.kill()?;
    let written = stopped.records_written();

    let report = witness::check(&disks)?;
    report.ensure_one_instant()?;
    assert!(report.ensure_frozen().is_err(), "an image of a running guest has a journal to replay: {report:?}");
    assert!(report.disks.iter().all(|disk| disk.records.whole >= written), "acknowledged {written}: {report:?}");
    let verified = verify_by_booting(&disks, &directory.path().join("verify"))?;
    assert!(verified.iter().all(|disk| disk.clean && disk.torn == 0 && disk.bad == 0), "{verified:?}");
    assert_eq!(verified[1].records, report.disks[1].records.whole);

    let guest = stopped.restart_same_command_line().await?;
    assert_eq!(guest.command_line(), command_line);
    assert!(guest.records_written() > written, "it goes on where it was");
    Ok(())
}

#[tokio::test]
async fn the_heartbeat_shows_a_pause_and_a_guest_without_agent_still_beats() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut config = guest_with_two_disks(directory.path())?;
    config.disks.push(Disk::create(directory.path().join("c.qcow2"), Format::Qcow2, Filesystem::Ext4, 64)?);
    config.agent = Agent::Off;
    let guest = Guest::boot(config).await?;
    assert!(!guest.monitor().port_is_open("qga").await?);

    let paused = Instant::now();
    guest.monitor().execute("stop", serde_json::json!({})).await?;
    let still = Duration::from_millis(1500);
    await_condition("a pause that shows", SOON, async || Ok((guest.heartbeat_gap(paused) > still).then_some(())))
        .await?;
    guest.monitor().execute("cont", serde_json::json!({})).await?;
    guest.await_records(20, SOON).await?;
    assert!(guest.heartbeat_gap(paused) > still);

    let disks = guest.config().disks.clone();
    guest.quiesce_and_quit().await?;
    let report = witness::check(&disks)?;
    report.ensure_frozen()?;
    assert!(report.disks[2].records.whole > 0, "the third disk has a writer of its own");
    Ok(())
}

#[tokio::test]
async fn a_program_is_killed_stopped_restarted_and_told_to_end() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let site = Site {
        node_name: "node-1".into(),
        vm_root: directory.path().join("vms"),
        image_roots: Vec::new(),
        directory: directory.path().to_owned(),
        kubeconfig: directory.path().join("none"),
    };
    let mut guard = Program::guard(&site)?;
    guard.stop()?;
    assert!(guard.is_running()?);
    guard.cont()?;
    guard.kill_9()?;
    assert!(!guard.is_running()?);
    assert!(guard.kill_9().is_err(), "it is gone, and its process id may be another's");

    guard.restart()?;
    await_condition("the guard to listen", SOON, async || Ok(guard.log()?.contains("guarding").then_some(()))).await?;
    guard.terminate()
}

#[tokio::test]
async fn a_world_starts_with_its_programs_ready_and_its_guest_writing() -> Result<()> {
    let world = World::start(WorldConfig::default()).await?;
    assert!(world.control_plane.kubectl(&["get", "vmtargets", "--all-namespaces"]).is_ok());
    assert!(world.programs.agent.metrics().await?.contains("# TYPE"));
    world.guest()?.await_records(10, SOON).await?;
    Ok(())
}
