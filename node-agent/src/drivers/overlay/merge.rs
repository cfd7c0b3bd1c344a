//! Deleting a snapshot: the layer above its file is merged into the file.
//!
//! Snapshot K's view is its file over the files below. Everything above is read through K's file too, so its data must
//! stay; but nobody else needs the file *as it stands*. So the layer above is committed into it, and the file goes on
//! as that layer: as the disk itself when the layer was the active one, else as the next snapshot's image. No data of
//! the layers below is touched, and at every instant each remaining view reads the same: what the file gets written is
//! hidden, for everybody but K, by the layer it comes from.
//!
//! One call takes one step; what has been done is found in the names, the graph, and [`Merging`]:
//!
//! ```text
//!  no file ──────────────────────────────────────────────► Done
//!  file is still the new layer (no cut) ── close, unlink ─► Done
//!  the layer above is the active one ── commit, Switch ───► Done
//!  the layer above is a snapshot's ── commit, Moved, unlink it ─► Done
//!  the file can't be written by its node, or the merge starves ── stream it up, unlink it ─► Done
//! ```
//!
//! What is different for a file that keeps its name is in [`follow_merge`], and for a layer on a device in [`device_merge`].

use freezeframe_qemu::{BlockGraph, Node};
use serde_json::{Value, json};

use super::needs::{dependents, kept_for, refuse_others};
use super::place::{Place, name_of};
use super::prepare::{close_unfinished, forget_node, header, pin, replace_base};
use super::state::{Merging, State};
use super::stream::stream_up;
use super::{DiskTask, at_rest, device_merge, follow_merge, offline_merge, starving, unseen, upwards};
use crate::drivers::jobs::{self, Wanted};
use crate::drivers::{DriverError, Env, Removal, Result, Switch, qemu};
use crate::hypervisor::graph::take_back_unused;
use crate::hypervisor::image::{FileId, ImageDirectory};
use crate::hypervisor::{QMP_TIMEOUT, Vm};

/// Takes one step of removing a disk's layer.
pub async fn remove(env: &Env<'_>, task: &mut DiskTask) -> Result<Removal> {
    let mut state: State = task.state()?;
    state.completed = task.artifact.is_some();
    if state.is_on_device() {
        let step = device_merge::remove(env, task, &mut state).await;
        task.set_state(&state)?;
        return step;
    }
    let directory = match env.vm {
        // Whatever has become of the name: QEMU has the images open.
        Some(_) => env.roots.directory(&state.directory)?,
        None => match env.roots.existing_directory(&state.directory)? {
            // A merge that was begun may have left it empty.
            Some(directory) if state.completed && !state.begun => directory.mounted()?,
            Some(directory) => directory,
            None => return Ok(Removal::Done),
        },
    };
    state.recognize(&directory);
    if let Some(merging) = state.merging.clone().filter(|merging| merging.done) {
        return hand_on(env, &directory, &state, &merging).await;
    }
    directory.unlink(&state.unfinished())?;
    if state.keeps_name() {
        let step = follow_merge::remove(env, &directory, &mut state).await;
        task.set_state(&state)?;
        return step;
    }
    if state.overlay.is_none() {
        state.overlay = unrecorded_layer(&directory, &state)?;
    }
    let step = match directory.id(&state.layer)? {
        None => close_leftovers(env, &state).await,
        Some(id) if Some(id) == state.overlay => give_up_layer(env, &directory, &state).await,
        Some(id) if id == state.base => match env.vm {
            Some(vm) => merge_live(env, vm, &directory, &mut state).await,
            None => offline_merge::merge(env, &directory, &mut state).await,
        },
        // Nothing was made, because somebody else's file has the name.
        Some(_) if state.overlay.is_none() => close_leftovers(env, &state).await,
        Some(_) => Err(DriverError::NotNow(format!("{} is another file", directory.join(&state.layer).display()))),
    };
    state.made_way += u32::from(matches!(step, Err(DriverError::MadeWay)));
    task.set_state(&state)?;
    step
}

/// The layer of a `prepare` that ended before its record was written. Only a layer before its cut backs onto its own
/// name.
fn unrecorded_layer(directory: &ImageDirectory, state: &State) -> Result<Option<FileId>> {
    let ours = match directory.id(&state.layer)? {
        Some(id) if id != state.base => Some(id),
        _ => return Ok(None),
    };
    // A file that isn't a qcow2 image isn't ours.
    let Ok(found) = header(directory, &state.layer) else { return Ok(None) };
    Ok(ours.filter(|_| found.backing.as_deref() == Some(&state.layer)))
}

/// The name is free: nothing was made, or the file went on under another name. Only nodes and a job can be left.
pub async fn close_leftovers(env: &Env<'_>, state: &State) -> Result<Removal> {
    if let Some(vm) = env.vm {
        // The job of a merge that ended with a switch is the proof that it did, until here.
        jobs::dismiss_if_concluded(vm.qmp(), &state.job()).await?;
        close_unused(vm, state).await?;
    }
    Ok(Removal::Done)
}

/// The names were never exchanged. If QEMU runs on the layer all the same, the exchange is finished, not taken back:
/// the guest may have been told that writes in the layer are durable.
async fn give_up_layer(env: &Env<'_>, directory: &ImageDirectory, state: &State) -> Result<Removal> {
    if let Some(vm) = env.vm {
        let graph = vm.graph().await.map_err(qemu("read the block graph"))?;
        if graph.disks().iter().any(|disk| disk.top.as_deref() == Some(&state.layer_node())) {
            exchange_names(state)?;
            return Ok(Removal::Again);
        }
        close_unused(vm, state).await?;
    } else {
        // A QEMU whose monitor is out of reach still has its image locked.
        crate::drivers::qemu_img(&["info", "-f", "qcow2"], &directory.join(&state.layer), None).await?;
    }
    directory.unlink(&state.layer)?;
    Ok(Removal::Done)
}

fn exchange_names(state: &State) -> Result<()> {
    let swap = state.swap().map_or(Ok(()), |swap| swap.apply().map(drop));
    swap.map_err(|error| DriverError::NotNow(error.to_string()))
}

/// Closes nodes that a merge or a cut that never was left without a user, and takes the descriptors back that no node
/// holds any more. QEMU refuses to close one that is in use.
pub async fn close_unused(vm: &Vm, state: &State) -> Result<()> {
    let ours = [
        state.keeping_node(),
        state.layer_node(),
        state.layer_file_node(),
        state.base_node_by_descriptor(),
        state.base_file_node(),
    ];
    let graph = vm.graph().await.map_err(qemu("read the block graph"))?;
    for node in state.closing.iter().chain(&ours).filter(|node| graph.node(node).is_some()) {
        forget_node(vm, Some(node)).await;
    }
    let graph = vm.graph().await.map_err(qemu("read the block graph"))?;
    take_back_unused(vm.qmp(), &graph).await.map_err(qemu("take back descriptors that no node uses"))
}

/// The data of the snapshot above is in this file now: its record follows, then its old file goes.
async fn hand_on(env: &Env<'_>, directory: &ImageDirectory, state: &State, merging: &Merging) -> Result<Removal> {
    let (from, to) = (directory.join(&merging.above), directory.join(&state.layer));
    if env.siblings.iter().any(|sibling| sibling.handle == from) {
        return Ok(Removal::Moved { from, to, format: state.format.clone() });
    }
    if directory.holds(&merging.above, merging.above_id)? {
        sync_images(directory, state)?;
        if state.keeps_name() {
            directory.touch(&state.disk_file)?;
        }
        directory.unlink(&merging.above)?;
    }
    close_leftovers(env, state).await
}

/// Makes durable what a merge wrote, headers above all, before a file goes that they named until a moment ago.
fn sync_images(directory: &ImageDirectory, state: &State) -> Result<()> {
    for name in dependents(directory, state.base)?.iter().chain([&state.layer]) {
        directory.sync_file(name)?;
    }
    Ok(())
}

pub async fn merge_live(env: &Env<'_>, vm: &Vm, directory: &ImageDirectory, state: &mut State) -> Result<Removal> {
    let graph = close_unfinished(vm, state).await?;
    let place = Place::find(env, vm, &graph, state).await?;
    if let Some(mut merging) = state.merging.clone() {
        let above = merging.above_id;
        let place = place.as_ref().filter(|place| place.at > 0);
        let still_there = place.is_some_and(|place| place.id(directory, place.at - 1) == Some(above));
        if !still_there {
            if let Some(place) = place {
                at_rest::restore(vm, place, &state.job()).await?;
            }
            unseen::prove(directory, state, &merging, false).await?;
            merging.check_done(directory, state.base)?;
            state.merging = Some(merging);
            return Ok(Removal::Again);
        }
    }
    let Some(place) = place else { return unlink_unused(env, directory, state).await };
    if place.at == 0 {
        return finish_active(vm, directory, state, &place).await;
    }
    state.left = false;
    if let Some(kept) = refuse_foreign_dependents(env, directory, state, &place)? {
        return Ok(kept);
    }
    if pin_if_stale(env, vm, &place, state).await? || at_rest::restore(vm, &place, &state.job()).await? {
        return Ok(Removal::Again);
    }
    if state.keeps_name() && follow_merge::begin(directory, state, &place)? {
        return Ok(Removal::Again);
    }
    place.renew(env, vm).await?;
    match (place.may_become_writable(place.at), place.at) {
        (true, 1) if starving::is_better_upwards(env, directory, state, &place) => {
            stream_up(env, vm, directory, state, &place, 1).await
        }
        (true, 1) => commit_active(env, vm, directory, state, &graph, &place).await,
        (true, at) => commit_middle(env, vm, directory, state, &place, at).await,
        // It isn't ours to unlink.
        (false, _) if state.keeps_name() => Err(follow_merge::only_stopped(directory, state)),
        (false, at) => stream_up(env, vm, directory, state, &place, at).await,
    }
}

/// No image of the running VM is this file. If no other image needs it either, it goes.
async fn unlink_unused(env: &Env<'_>, directory: &ImageDirectory, state: &State) -> Result<Removal> {
    let needed_by = dependents(directory, state.base)?;
    if let Some(name) = needed_by.first() {
        let file = directory.join(&state.layer);
        return Err(DriverError::NotNow(format!("{} needs {}, which its VM doesn't have open", name, file.display())));
    }
    upwards::sync(directory, state)?;
    if !state.keeps_name() {
        directory.unlink(&state.layer)?;
    }
    close_leftovers(env, state).await
}

/// The file is what the VM runs on. After our own switch only the name and the job's record are left to do; otherwise
/// the VM was started from the snapshot itself, and it isn't ours to take away.
async fn finish_active(vm: &Vm, directory: &ImageDirectory, state: &mut State, place: &Place<'_>) -> Result<Removal> {
    let job = jobs::find(vm.qmp(), &state.job()).await?;
    if job.is_none() && state.keeps_name() {
        return follow_merge::leave(vm, directory, state).await;
    }
    if job.is_none() {
        return Err(DriverError::NotNow(format!("the VM runs on {}", directory.join(&state.layer).display())));
    }
    switch(directory, state, None, place)
}

/// Somebody else's image on top of the snapshot's file needs it as it stands.
fn refuse_foreign_dependents(
    env: &Env<'_>,
    directory: &ImageDirectory,
    state: &State,
    place: &Place<'_>,
) -> Result<Option<Removal>> {
    let Some(above) = place.id(directory, place.at - 1) else {
        // A disk that QEMU named itself, after a merge into it.
        let file = directory.join(&state.layer);
        let why =
            format!("QEMU has the layer above {} by an old name: delete it while the VM is stopped", file.display());
        return Err(DriverError::NotNow(why));
    };
    refuse_others(env, directory, &state.layer, state.base, Some(above))
}

/// Holds the base of our own cut by descriptor, where a crash came between the cut and that.
async fn pin_if_stale(env: &Env<'_>, vm: &Vm, place: &Place<'_>, state: &State) -> Result<bool> {
    let node = place.chain[place.at];
    if place.may_become_writable(place.at) || node.auto_named {
        return Ok(false);
    }
    pin(vm, env.roots, node, state).await?;
    Ok(true)
}

/// Merges the active layer; the last step is the window's.
async fn commit_active(
    env: &Env<'_>,
    vm: &Vm,
    directory: &ImageDirectory,
    state: &mut State,
    graph: &BlockGraph,
    place: &Place<'_>,
) -> Result<Removal> {
    if hold_base_by_descriptor(env, vm, graph, state, place).await? {
        return Ok(Removal::Again);
    }
    state.closing = nodes_of(place.chain[0]);
    let arguments = json!({
        "job-id": state.job(),
        "device": place.root,
        // Without it, a filter above the layer would be merged away with it.
        "top-node": place.chain[0].name,
        "base-node": place.chain[place.at].name,
        "auto-dismiss": false,
    });
    start(env, vm, state, "block-commit", arguments).await?;
    if at_rest::may_be_reopened(place.chain[place.at]) {
        env.pace.wait(vm.qmp(), &state.job(), Wanted::Ready).await?;
    } else {
        jobs::wait(vm.qmp(), &state.job(), Wanted::Ready).await?;
    }
    // What the guest wrote meanwhile is merged while its virtual CPUs stand still.
    jobs::hurry(vm.qmp(), &state.job()).await;
    switch(directory, state, Some(state.job()), place)
}

/// A base that QEMU opened by itself would become the disk under a name that is about to go, and could never be cut
/// again: a node of ours takes its place first. Where that can't be, the merge is sound all the same.
async fn hold_base_by_descriptor(
    env: &Env<'_>,
    vm: &Vm,
    graph: &BlockGraph,
    state: &State,
    place: &Place<'_>,
) -> Result<bool> {
    let (top, base) = (place.chain[0], place.chain[place.at]);
    let started = jobs::find(vm.qmp(), &state.job()).await?.is_some();
    if started || !base.auto_named || top.auto_named || graph.node(&state.base_node_by_descriptor()).is_some() {
        return Ok(false);
    }
    match replace_base(vm, env.roots, top, base, state).await {
        Ok(()) => Ok(true),
        Err(error) => {
            tracing::warn!(error = crate::causes::chain(&error), "the base stays held by its name");
            Ok(false)
        }
    }
}

/// The nodes to close once a layer is merged.
pub fn nodes_of(layer: &Node) -> Vec<String> {
    std::iter::once(layer.name.clone()).chain(layer.file_child.clone()).collect()
}

fn switch(directory: &ImageDirectory, state: &State, job: Option<String>, place: &Place<'_>) -> Result<Removal> {
    let exchange = state.replace(directory, &place.chain[place.at].name)?;
    Ok(Removal::Switch(Switch { merged: directory.join(&state.layer), job, exchange }))
}

/// Merges a layer that is itself a snapshot's file, and gives this file to that snapshot.
async fn commit_middle(
    env: &Env<'_>,
    vm: &Vm,
    directory: &ImageDirectory,
    state: &mut State,
    place: &Place<'_>,
    at: usize,
) -> Result<Removal> {
    let (above, over) = (place.chain[at - 1], at - 2);
    let above_id = place.id(directory, at - 1);
    let above_name = name_of(directory, above_id)?;
    if let Some(kept) = kept_for(env, directory, &above_name) {
        return Ok(kept);
    }
    if !place.may_become_writable(over) || starving::is_better_upwards(env, directory, state, place) {
        // A merge was begun, which then made way: nothing of it counts.
        if state.merging.take().is_some() {
            state.closing = nodes_of(place.chain[at]);
            return Ok(Removal::Again);
        }
        if state.keeps_name() {
            return Err(follow_merge::only_stopped(directory, state));
        }
        return stream_up(env, vm, directory, state, place, at).await;
    }
    if state.merging.is_none() {
        let above_id = above_id.ok_or_else(|| DriverError::NotNow("the layer above isn't a file".into()))?;
        if let Some(kept) = refuse_others(env, directory, &above_name, above_id, place.id(directory, over))? {
            return Ok(kept);
        }
        state.merging = Some(Merging { above: above_name, above_id, seen: false, done: false });
        state.closing = nodes_of(above);
        return Ok(Removal::Again);
    }
    let arguments = json!({
        "job-id": state.job(),
        "device": place.root,
        "top-node": above.name,
        "base-node": place.chain[at].name,
        "backing-file": state.layer,
        "auto-dismiss": false,
    });
    at_rest::refuse_left_writable(vm, place.chain[at], &state.job()).await?;
    start(env, vm, state, "block-commit", arguments).await?;
    env.pace.wait(vm.qmp(), &state.job(), Wanted::Concluded).await?;
    let written_out = at_rest::is_read_only(vm, place.chain[at]).await?;
    if let Some(merging) = state.merging.as_mut().filter(|_| written_out) {
        merging.check_done(directory, state.base)?;
    }
    Ok(Removal::Again)
}

pub async fn start(env: &Env<'_>, vm: &Vm, state: &State, command: &str, mut arguments: Value) -> Result<()> {
    let found = jobs::find(vm.qmp(), &state.job()).await?;
    if found.as_ref().is_some_and(|job| job.kind == "stream") {
        // An agent that died copied upwards, and waited with the last step, which isn't wanted any more.
        jobs::cancel(vm.qmp(), &state.job()).await?;
    } else if let Some(job) = found {
        // It rested when the agent that had it rest ended.
        if ["paused", "standby"].contains(&job.status.as_str()) {
            let resumed = vm.qmp().execute::<Value>("job-resume", json!({"id": job.id}), QMP_TIMEOUT).await;
            resumed.map_err(qemu("let a merge go on"))?;
        }
        return Ok(());
    }
    arguments["speed"] = env.pace.speed.into();
    let doing = format!("start {command} for {}", state.layer);
    vm.qmp().execute::<Value>(command, arguments, QMP_TIMEOUT).await.map(drop).map_err(qemu(doing))
}
