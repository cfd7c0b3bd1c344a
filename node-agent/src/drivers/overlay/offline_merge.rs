//! The same merge while the VM is stopped: the chain is read from the images' headers.

use freezeframe_qemu::BlockGraph;
use serde_json::json;

use super::finalize::finalize;
use super::needs::{dependents, kept_for, refuse_others};
use super::prepare::header;
use super::state::{Merging, State};
use super::{unseen, upwards};
use crate::drivers::jobs::{self, Wanted};
use crate::drivers::{DriverError, Env, Removal, Result, qemu};
use crate::hypervisor::QMP_TIMEOUT;
use crate::hypervisor::image::ImageDirectory;
use crate::hypervisor::offline::{OfflineError, StorageDaemon};
use crate::hypervisor::qcow2::HeaderError;

/// The chain is never deeper than this; a longer one is a loop.
const DEEPEST: usize = 1024;

/// Takes one step of merging the layer above a snapshot's file into it.
pub async fn merge(env: &Env<'_>, directory: &ImageDirectory, state: &mut State) -> Result<Removal> {
    let chain = chain(directory, state)?;
    if let Some(mut merging) = state.merging.clone().filter(|merging| !chain.contains(&merging.above)) {
        if is_of_no_use(directory, state, &merging)? {
            state.merging = None;
            return Ok(Removal::Again);
        }
        unseen::prove(env, directory, state, &merging).await?;
        merging.check_done(directory, state.base)?;
        state.merging = Some(merging);
        return Ok(Removal::Again);
    }
    let at = chain.iter().position(|name| *name == state.layer);
    let users = dependents(directory, state.base)?;
    match at {
        None if users.is_empty() => {
            upwards::sync(directory, state)?;
            directory.unlink(&state.layer)?;
            Ok(Removal::Done)
        }
        Some(at) if at > 0 && users.contains(&chain[at - 1]) => {
            let above = directory.id(&chain[at - 1])?;
            match refuse_others(env, directory, &state.layer, state.base, above)? {
                Some(kept) => Ok(kept),
                None => merge_above(env, directory, state, &chain, at).await,
            }
        }
        _ => Err(DriverError::NotNow(format!(
            "{} is needed by {}",
            directory.join(&state.layer).display(),
            users.join(", ")
        ))),
    }
}

/// Whether a merge that was begun is for nothing, since the disk's owner deleted it, and nothing but the file that was to
/// be merged reads through the snapshot's. That one still reads as it did: whose it is may be deleted, and then this.
pub fn is_of_no_use(directory: &ImageDirectory, state: &State, merging: &Merging) -> Result<bool> {
    if state.keeps_name() || directory.id(&state.disk_file)?.is_some() {
        return Ok(false);
    }
    Ok(dependents(directory, state.base)?.iter().all(|name| *name == merging.above))
}

/// Names of the images of a disk, top first, as far as they are in its own directory.
fn chain(directory: &ImageDirectory, state: &State) -> Result<Vec<String>> {
    if !state.keeps_name() && directory.id(&state.disk_file)?.is_none() {
        // Its owner deleted the disk: nothing but another image can need the snapshot's file.
        return Ok(vec![]);
    }
    let mut names = vec![state.disk_file.clone()];
    while let Some(backing) = header(directory, &names[names.len() - 1])?.backing {
        // Only what lies beside is looked at, and the snapshot's own device.
        let elsewhere = backing.contains('/') && backing != state.layer;
        if elsewhere || directory.id(&backing)?.is_none() || names.len() > DEEPEST {
            break;
        }
        names.push(backing);
        // What a guest wrote to the beginning of a raw image is no header.
        if state.keeps_name() && names[names.len() - 1] == state.layer {
            break;
        }
        match header(directory, &names[names.len() - 1]) {
            // A raw image is the end of a chain. A file that couldn't be read is not: what is below it is unknown.
            Err(DriverError::Header { source: HeaderError::NotQcow2, .. }) => break,
            header => header.map(drop)?,
        }
    }
    Ok(names)
}

async fn merge_above(
    env: &Env<'_>,
    directory: &ImageDirectory,
    state: &mut State,
    chain: &[String],
    at: usize,
) -> Result<Removal> {
    let above = &chain[at - 1];
    if at > 1 {
        if let Some(kept) = kept_for(env, directory, above) {
            return Ok(kept);
        }
        if state.merging.is_none() {
            let above_id = directory.id(above)?;
            let above_id = above_id.ok_or_else(|| DriverError::NotNow(format!("{above} is gone")))?;
            if let Some(kept) = refuse_others(env, directory, above, above_id, directory.id(&chain[at - 2])?)? {
                return Ok(kept);
            }
            state.merging = Some(Merging { above: above.clone(), above_id, seen: false, done: false });
            return Ok(Removal::Again);
        }
    }
    let daemon = StorageDaemon::start().await.map_err(|error| offline(&error))?;
    daemon.open("base", &state.format, &directory.join(&state.layer), None).await.map_err(|error| offline(&error))?;
    daemon.open("above", "qcow2", &directory.join(above), Some("base")).await.map_err(|error| offline(&error))?;
    let over = (at > 1).then(|| &chain[at - 2]);
    if let Some(over) = over {
        daemon.open("over", "qcow2", &directory.join(over), Some("above")).await.map_err(|error| offline(&error))?;
    }
    daemon.hold(if over.is_some() { "over" } else { "above" }).await.map_err(|error| offline(&error))?;
    let merged = match over {
        Some(_) => commit_middle(env, &daemon, directory, state).await,
        None => commit_disk(env, &daemon, directory, state).await,
    };
    // Also where it made way: its locks must be gone before the images are opened for the snapshot.
    daemon.stop().await.map_err(|error| offline(&error))?;
    merged?;
    if let Some(merging) = &mut state.merging {
        merging.seen = true;
    }
    Ok(Removal::Again)
}

async fn commit_middle(env: &Env<'_>, daemon: &StorageDaemon, directory: &ImageDirectory, state: &State) -> Result<()> {
    let arguments = json!({
        "job-id": state.job(), "device": "over", "top-node": "above", "base-node": "base",
        "backing-file": state.layer, "auto-finalize": false, "auto-dismiss": false,
    });
    let graph = BlockGraph::read(daemon.qmp(), QMP_TIMEOUT).await.map_err(qemu("read what the daemon has open"))?;
    let base = graph.node("base").ok_or_else(|| DriverError::NotNow("the daemon doesn't have its image".into()))?;
    daemon.qmp().block_commit(&arguments, QMP_TIMEOUT).await.map_err(qemu("start the merge"))?;
    env.pace.wait(daemon.qmp(), &state.job(), Wanted::Pending).await?;
    finalize(daemon.qmp(), directory, state, base).await?;
    // Until then it has the nodes.
    jobs::dismiss_if_concluded(daemon.qmp(), &state.job()).await
}

/// Merges the disk's own layer; the name changes hands while the daemon still holds the locks.
async fn commit_disk(env: &Env<'_>, daemon: &StorageDaemon, directory: &ImageDirectory, state: &State) -> Result<()> {
    let arguments = json!({"job-id": state.job(), "device": "above", "base-node": "base", "auto-dismiss": false});
    daemon.qmp().block_commit(&arguments, QMP_TIMEOUT).await.map_err(qemu("start the merge"))?;
    env.pace.wait(daemon.qmp(), &state.job(), Wanted::Ready).await?;
    daemon.qmp().job_complete(&state.job(), QMP_TIMEOUT).await.map_err(qemu("complete the merge"))?;
    jobs::wait(daemon.qmp(), &state.job(), Wanted::Concluded).await?;
    directory.sync_file(&state.layer)?;
    state.replace(directory, "base")?.apply().map(drop).map_err(|error| DriverError::NotNow(error.to_string()))
}

fn offline(error: &OfflineError) -> DriverError {
    use std::error::Error as _;
    let cause = error.source().map(ToString::to_string).unwrap_or_default();
    DriverError::NotNow(format!("{error}: {cause}"))
}
