//! Images below a disk's own are read-only while no job works on them.
//!
//! QEMU leaves the base of a cancelled or failed active commit writable (seen on 7.2). A later commit into it would find
//! it so, leave it so, and with it what it wrote to the image's tables in memory: nothing flushes those, since a guest's
//! flush goes to its own layer alone. The file above would be unlinked while its data is nowhere else on disk.

use freezeframe_qemu::{Node, Qmp};
use serde_json::{Value, json};

use super::place::Place;
use super::prepare::{cache_options, with_backing};
use crate::drivers::{DriverError, Result, jobs, qemu};
use crate::hypervisor::{QMP_TIMEOUT, Vm};

/// Makes the images below the disk's own read-only again, which writes out their tables; whether one wasn't.
pub async fn restore(vm: &Vm, place: &Place<'_>, own_job: &str) -> Result<bool> {
    let left = || (1..place.chain.len()).filter(|at| !place.chain[*at].read_only && may_be_reopened(place, *at));
    if left().next().is_none() {
        return Ok(false);
    }
    let jobs = vm.qmp().query_jobs(QMP_TIMEOUT).await.map_err(qemu("list the block jobs"))?;
    // Another job than the merge's own is no leave to merge into an image that is writable: where it uses the image, QEMU
    // refuses.
    if jobs.iter().any(|job| job.id == own_job && job.status != "concluded") {
        return Ok(false);
    }
    let mut restored = false;
    for node in left().map(|at| place.chain[at]) {
        restored |= make_read_only(vm, node).await?;
    }
    Ok(restored)
}

/// Whether it came to be. One that QEMU named itself may stay as it is, since it only may not be merged into then.
async fn make_read_only(vm: &Vm, node: &Node) -> Result<bool> {
    if !node.auto_named {
        reopen(vm.qmp(), node, true).await?;
        return Ok(true);
    }
    // QMP's own command takes no such name, and the human monitor's answers in words only: what has come of it is seen
    // in the graph.
    let line = json!({"command-line": format!("qemu-io {} \"reopen -r\"", node.name)});
    let said = vm.qmp().execute::<Value>("human-monitor-command", line, QMP_TIMEOUT).await;
    if is_read_only(vm, node).await? {
        return Ok(true);
    }
    tracing::warn!(file = node.file, ?said, "an image that a merge left writable stays so");
    Ok(false)
}

/// Writes out what a writable node has in memory, its tables among it, and says whether that worked: alone of QEMU's ways
/// to flush, reopening does, and also while a job has the node. Nothing about the node changes.
pub async fn flush(qmp: &Qmp, node: &Node) -> Result<()> {
    if node.auto_named { flush_auto_named(qmp, node).await } else { reopen(qmp, node, false).await }
}

/// QMP's own command takes no node that QEMU named itself. The human monitor's does, and only says something if it failed.
async fn flush_auto_named(qmp: &Qmp, node: &Node) -> Result<()> {
    let line = json!({"command-line": format!("qemu-io {} \"reopen -w\"", node.name)});
    let said = qmp.execute::<String>("human-monitor-command", line, QMP_TIMEOUT).await;
    match said.map_err(qemu(format!("have {} written out", node.file)))?.trim() {
        "" => Ok(()),
        why => Err(DriverError::NotNow(format!("{} can't be written out: {why}", node.file))),
    }
}

async fn reopen(qmp: &Qmp, node: &Node, read_only: bool) -> Result<()> {
    let options = with_backing(
        node,
        json!({
            "driver": node.driver,
            "node-name": node.name,
            "file": node.file_child,
            "read-only": read_only,
            "cache": cache_options(node),
            "detect-zeroes": node.detect_zeroes,
            "discard": "unmap",
        }),
    );
    let reopened = qmp.blockdev_reopen(&[options], QMP_TIMEOUT).await;
    reopened.map_err(qemu(format!("have {} written out", node.name)))
}

/// Fails for an image that is writable, and stays so, before a commit into it is begun.
pub async fn refuse_left_writable(vm: &Vm, base: &Node, own_job: &str) -> Result<()> {
    if base.read_only || jobs::find(vm.qmp(), own_job).await?.is_some() {
        return Ok(());
    }
    let why = "was left writable by a merge that was cut off: it can be merged once the VM is stopped or started anew";
    Err(DriverError::NotNow(format!("{} {why}", base.file)))
}

/// Whether an image is read-only, after a commit into it. QEMU writes out its tables as it makes it so again, and if that
/// fails, it leaves it writable and doesn't say a word.
pub async fn is_read_only(vm: &Vm, base: &Node) -> Result<bool> {
    let graph = vm.graph().await.map_err(qemu("read the block graph"))?;
    Ok(graph.node(&base.name).is_some_and(|node| node.read_only))
}

/// Whether a node can be made read-only without QEMU's opening another file by its name.
fn may_be_reopened(place: &Place<'_>, at: usize) -> bool {
    !place.chain[at].auto_named || place.may_become_writable(at)
}
