//! Deleting a snapshot whose image keeps its name: the same merges, but for how they begin and end.
//!
//! The image is the VM owner's, so nothing here unlinks it. And nothing but the owner's good will keeps a VM from being
//! started with it while the newest data is in the layer above: that is looked for before anything is written.

use super::follow::{self, Top, Untouched};
use super::lent;
use super::merge::{close_leftovers, close_unused, merge_live};
use super::needs::{dependents, refuse_those_beside};
use super::offline_merge;
use super::place::Place;
use super::state::State;
use crate::drivers::{DriverError, Env, Removal, Result, qemu};
use crate::hypervisor::Vm;
use crate::hypervisor::disks::{Disks, FoundDisk, disks};
use crate::hypervisor::image::{ImageDirectory, ImageRoots};

/// Takes one step of removing a disk's layer.
pub async fn remove(env: &Env<'_>, directory: &ImageDirectory, state: &mut State) -> Result<Removal> {
    let (top, is_there) = (Top::look(directory, state)?, directory.holds(&state.layer, state.base)?);
    let needed = is_there && !dependents(directory, state.base)?.is_empty();
    if env.vm.is_none() && is_there && top == Top::Nothing {
        refuse_if_lost(directory, state)?;
    }
    if !needed && (top != Top::Image || is_there) {
        follow::clear(directory, state)?;
        return close_leftovers(env, state).await;
    }
    if !is_there {
        let (image, layer) = (directory.join(&state.layer), directory.join(&state.disk_file));
        let why = format!("{} is another file now, or gone: {} can't be merged", image.display(), layer.display());
        return Err(DriverError::NotNow(why));
    }
    if state.is_elsewhere() {
        refuse_those_beside(env, directory, &state.layer, state.base)?;
    }
    match env.vm {
        Some(vm) if was_never_cut(vm, directory, state).await? => {
            close_unused(vm, state).await?;
            give_up(directory, state).await
        }
        Some(vm) => {
            let step = merge_live(env, vm, directory, state).await;
            stay_newest(directory, state)?;
            step
        }
        // Once a merge is begun, its image's times don't tell that somebody else wrote to it.
        None if state.left => Err(follow::left_behind(directory, state)),
        None if state.lent && !state.completed && !state.begun && is_all_and_empty(directory, state).await? => {
            give_up(directory, state).await
        }
        None => {
            if !state.begun {
                follow::refuse_if_touched(directory, state).await?;
                state.begun = true;
                return Ok(Removal::Again);
            }
            let step = offline_merge::merge(env, directory, state).await;
            stay_newest(directory, state)?;
            step
        }
    }
}

/// Fails if a layer on an image elsewhere, which may be the disk, isn't there, with nothing that says why: its file system
/// may not be either. One beside its image is gone, and so is one whose VM went on without it.
fn refuse_if_lost(directory: &ImageDirectory, state: &State) -> Result<()> {
    let is_apart = state.is_device() || state.is_elsewhere();
    if !is_apart || !state.completed || state.begun || state.left {
        return Ok(());
    }
    if let Some(before) = state.untouched
        && Untouched::look(directory, &state.layer)? != before
    {
        return Ok(());
    }
    let (image, layer) = (directory.join(&state.layer), directory.join(&state.disk_file));
    Err(DriverError::NotNow(format!(
        "{} isn't there, which is the disk since the snapshot: bring it back, or start the VM with {} to go on without it",
        layer.display(),
        image.display()
    )))
}

/// Makes the layer newer than what a merge wrote to the image below it, since it tells by that whether the VM ran on it.
fn stay_newest(directory: &ImageDirectory, state: &State) -> Result<()> {
    if state.begun && !state.left && Top::look(directory, state)? == Top::Image {
        directory.touch(&state.disk_file)?;
    }
    Ok(())
}

/// Whether QEMU has the new layer as it was made. The cut gives it a backing node for good: one with that and no disk on
/// it may be merged, but its disk may as well have been unplugged.
pub async fn was_never_cut(vm: &Vm, directory: &ImageDirectory, state: &State) -> Result<bool> {
    let graph = vm.graph().await.map_err(qemu("read the block graph"))?;
    let mut tops = graph.disks().iter().filter_map(|disk| disk.top.as_deref());
    let used = tops.any(|top| graph.chain(top).iter().any(|node| node.name == state.layer_node()));
    let is_bare = graph.node(&state.layer_node()).is_some_and(|node| node.backing.is_none());
    Ok(is_bare && !used && follow::is_empty(directory, &state.disk_file).await?)
}

/// Takes note that the image is about to be written to, unless that is done.
pub fn begin(directory: &ImageDirectory, state: &mut State, place: &Place<'_>) -> Result<bool> {
    if place.legacy {
        return Err(only_stopped(directory, state));
    }
    Ok(!std::mem::replace(&mut state.begun, true))
}

/// A VM that runs on the snapshot's image, with no merge of ours that would have brought it there: it was cut off before
/// the cut, or was started with its old command line.
pub async fn leave(vm: &Vm, directory: &ImageDirectory, state: &mut State) -> Result<Removal> {
    if state.begun || !is_all_and_empty(directory, state).await? {
        state.left = true;
        return Err(follow::left_behind(directory, state));
    }
    // Descriptors that were handed over, and never used.
    close_unused(vm, state).await?;
    give_up(directory, state).await
}

/// Whether the layer is all that there is on the image, and has no data. A further layer in between has data when the
/// uppermost has none.
async fn is_all_and_empty(directory: &ImageDirectory, state: &State) -> Result<bool> {
    let is_all = dependents(directory, state.base)? == [state.disk_file.as_str()];
    Ok(is_all && follow::is_empty(directory, &state.disk_file).await?)
}

/// Lets go of a layer that has no data: a file of the user's is the user's again. But one that the owner was told to
/// start the VM with goes: under that name an empty disk must not be found.
async fn give_up(directory: &ImageDirectory, state: &mut State) -> Result<Removal> {
    if state.lent && !state.completed {
        return lent::give_back(directory, state).await;
    }
    // Told next time from a layer whose file system isn't there.
    state.begun = true;
    directory.unlink(&state.disk_file)?;
    Ok(Removal::Again)
}

/// Fails if the VM was restarted since the cut, and not with the layer.
pub async fn refuse_if_left(vm: &Vm, roots: &ImageRoots, directory: &ImageDirectory, state: &State) -> Result<()> {
    let Disks { found, graph, .. } = disks(vm, roots).await.map_err(qemu("read the disks"))?;
    if graph.node(&state.layer_node()).is_some() {
        return Ok(());
    }
    if state.is_on_device() {
        // The times of a device don't tell whether the VM ran on what is below it.
        let why = format!("the VM was restarted before its snapshot with {} was complete", state.disk_file);
        return Err(DriverError::Verify(why));
    }
    let image = directory.join(&state.layer);
    let is_on =
        |disk: &FoundDisk| [disk.facts.path.as_ref().ok(), disk.facts.on_device.as_ref()].contains(&Some(&image));
    if found.iter().any(is_on) {
        return Err(DriverError::Verify(follow::left_behind(directory, state).to_string()));
    }
    follow::refuse_if_touched(directory, state).await
}

/// What to say of a disk whose nodes QEMU named itself.
pub fn only_stopped(directory: &ImageDirectory, state: &State) -> DriverError {
    let image = directory.join(&state.layer);
    DriverError::NotNow(format!("{} can only be merged into while the VM is stopped", image.display()))
}
