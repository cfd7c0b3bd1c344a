//! What the images hold, seen from outside and by a guest that boots from them.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use freezeframe_api::v1alpha1::VMSnapshot;
use freezeframe_e2e::snapshots::images;
use freezeframe_e2e::{Disk, verify_by_booting, witness};

use super::stage::Stage;
use crate::progress::say;

/// Records found on the two disks of one cut.
#[derive(Clone, Copy)]
pub struct Proved {
    pub a: u64,
    pub b: u64,
    pub a_minus_b: i64,
}

/// Checks a snapshot's images offline, then boots a second guest from them. `acknowledged` is the last record that the
/// first guest was told is durable before the snapshot was asked for.
pub fn prove(snapshot: &VMSnapshot, acknowledged: u64, scratch: &Path) -> Result<Proved> {
    let images = images(snapshot)?;
    say("proof 1: the images alone, read offline without replaying a journal");
    let proved = witness_of(&images)?;
    ensure!(proved.b >= acknowledged, "record {acknowledged} was durable before the snapshot and is not in it");
    say("proof 2: a second guest boots from them, and its kernel and fsck look");
    for disk in verify_by_booting(&images, scratch)? {
        say(format_args!(
            "  {}: {} records, {} torn, {} wrong, file system {}",
            disk.disk,
            disk.records,
            disk.torn,
            disk.bad,
            if disk.clean { "clean" } else { "damaged" }
        ));
        ensure!(disk.clean && disk.torn == 0 && disk.bad == 0, "the second guest found damage on {}", disk.disk);
        ensure!([proved.a, proved.b].contains(&disk.records), "the second guest found another number of records");
    }
    Ok(proved)
}

/// Shuts the VM down and looks at its own disks; starts it again if it is to be kept.
pub async fn own_disks(stage: &mut Stage, keep: bool) -> Result<Proved> {
    say("proof 3: the first VM is shut down, and its own disks are read");
    let guest = stage.guest.take().context("the guest does not run")?;
    let disks = guest.config().disks.clone();
    let stopped = guest.quiesce_and_quit().await?;
    let proved = witness_of(&disks)?;
    let told = stopped.records_written();
    ensure!(proved.b >= told, "record {told} was durable and is lost");
    if keep {
        stage.guest = Some(stopped.restart_same_command_line().await?);
    }
    Ok(proved)
}

fn witness_of(images: &[Disk]) -> Result<Proved> {
    let report = witness::check(images)?;
    report.ensure_frozen()?;
    let [a, b, ..] = report.disks.as_slice() else { anyhow::bail!("fewer than two disks") };
    let proved = Proved { a: a.records.whole, b: b.records.whole, a_minus_b: report.a_minus_b()? };
    say(format_args!(
        "  A {} records, B {}, A-B = {}; journals empty, file systems clean",
        proved.a, proved.b, proved.a_minus_b
    ));
    Ok(proved)
}
