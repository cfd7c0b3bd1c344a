//! Deleting a snapshot whose file can't be merged into: its data is copied up instead, into the layer above.

use freezeframe_qemu::BlockGraph;

use super::merge::nodes_of;
use super::place::Place;
use super::state::State;
use super::upwards::{self, Upwards};
use crate::drivers::{DriverError, Env, Removal, Result, qemu};
use crate::hypervisor::Vm;
use crate::hypervisor::image::ImageDirectory;

/// Copies the snapshot's data up into the layer above, where the file's own node can't be made writable: QEMU would
/// reopen it by a name that leads to another file by now.
pub async fn stream_up(
    env: &Env<'_>,
    vm: &Vm,
    directory: &ImageDirectory,
    state: &mut State,
    place: &Place<'_>,
    at: usize,
) -> Result<Removal> {
    let streamed_into = place.id(directory, at - 1);
    if state.closing.is_empty() || state.streamed_into != streamed_into {
        state.closing = nodes_of(place.chain[at]);
        state.streamed_into = streamed_into;
        return Ok(Removal::Again);
    }
    if at > 1 && !place.may_become_writable(at - 1) {
        let file = directory.join(&state.layer);
        return Err(DriverError::NotNow(format!("{} can only be merged while the VM is stopped", file.display())));
    }
    let base = match place.chain.get(at + 1) {
        Some(_) => Some((at + 1, below_name(directory, state)?)),
        None => None,
    };
    Upwards { job: &state.job(), place, into: at - 1, base, directory }.copy(env, vm).await?;
    upwards::sync(directory, state)?;
    let graph = vm.graph().await.map_err(qemu("read the block graph"))?;
    if still_below(&graph, place, at) {
        let why = "QEMU ended it without saying why".to_owned();
        return Err(DriverError::Job { job: state.job(), why });
    }
    Ok(Removal::Again)
}

fn still_below(graph: &BlockGraph, place: &Place<'_>, at: usize) -> bool {
    graph.chain(&place.chain[0].name).iter().any(|node| node.name == place.chain[at].name)
}

/// What the snapshot's own header calls the file below it: the layer above must call it the same.
fn below_name(directory: &ImageDirectory, state: &State) -> Result<String> {
    let header = super::prepare::header(directory, &state.layer)?;
    header.backing.ok_or_else(|| DriverError::NotNow(format!("{} names no backing file", state.layer)))
}
