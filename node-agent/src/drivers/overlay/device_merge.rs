//! Deleting a snapshot whose layer is on a block device: what is below is copied *up* into the device.
//!
//! Merged down, the device would have to lose its name at the very instant at which QEMU turns to the merged image, or a
//! VM started with it would read what is old. A file's name can go so; a device's can't. Copied up, the device stays
//! the disk, under the name that the owner was told, and every point at which it may be cut off is safe: until its header
//! changes it is a layer that hides more and more of what is below, and from then on it stands alone. It always fits, since
//! a device has room for the whole disk. The former disk is its owner's, and is only read.

use std::fs::File;
use std::path::Path;

use freezeframe_qemu::BlockGraph;
use rustix::fs::OFlags;

use super::at_rest;
use super::follow;
use super::follow_merge::{only_stopped, was_never_cut};
use super::lent;
use super::merge::{close_leftovers, close_unused, nodes_of};
use super::needs::refuse_those_beside;
use super::on_device;
use super::place::Place;
use super::prepare::header;
use super::state::State;
use super::upwards::{Upwards, may_take_itself};
use crate::causes::chain;
use crate::drivers::{DiskTask, DriverError, Env, Removal, Result, qemu};
use crate::hypervisor::Vm;
use crate::hypervisor::graph::NodeFile;
use crate::hypervisor::image::{ImageDirectory, ImageRoots};
use crate::hypervisor::qcow2::{HeaderError, has_clusters};
use crate::hypervisor::still::Still;
use crate::hypervisor::target_file::KnownDisk;

/// What is on the device.
enum Found {
    /// There is no such device.
    Nothing,
    /// No image, and its beginning is clear.
    Cleared,
    /// No image, but something: its name may be another device's since the host was started anew.
    Something,
    /// An image on top of another.
    On(String),
    /// An image that stands alone.
    Alone,
}

impl Found {
    fn look(directory: &ImageDirectory, state: &State) -> Result<Self> {
        match header(directory, &state.disk_file) {
            Ok(found) => Ok(found.backing.map_or(Self::Alone, Self::On)),
            Err(DriverError::Header { source: HeaderError::NotQcow2, .. }) => {
                match on_device::begins_with_zeros(state.device_path()) {
                    Ok(None) => Ok(Self::Nothing),
                    Ok(Some(true)) => Ok(Self::Cleared),
                    Ok(Some(false)) => Ok(Self::Something),
                    Err(error) => Err(error.into()),
                }
            }
            Err(DriverError::Image(error)) if error.is_no_image() => Ok(Self::Nothing),
            Err(error) => Err(error),
        }
    }
}

/// Takes one step of removing a disk's layer.
pub async fn remove(env: &Env<'_>, task: &DiskTask, state: &mut State) -> Result<Removal> {
    let directory = match env.roots.directory(&state.directory) {
        Ok(directory) => directory,
        Err(error) if error.is_not_found() && state.overlay.is_none() => return close_leftovers(env, state).await,
        Err(error) => return Err(DriverError::NotNow(is_gone(state, &chain(&error)))),
    };
    state.recognize(&directory);
    let made = state.overlay.is_some();
    match Found::look(&directory, state)? {
        Found::On(below) if below == state.layer => remove_layer(env, task, &directory, state).await,
        Found::Nothing if made => Err(DriverError::NotNow(is_gone(state, "there is no such device"))),
        Found::Something if made => Err(DriverError::NotNow(is_gone(state, "something else is on the device"))),
        Found::On(below) if made => {
            let device = state.device_path().display();
            Err(DriverError::NotNow(format!("{device} has an image on top of {below}, and not of {}", state.layer)))
        }
        Found::Alone if made && (state.completed || has_data(&directory, state)?) => {
            on_device::disclaim(task, state).await?;
            close_leftovers(env, state).await?;
            Ok(Removal::Kept(format!(
                "{} was the disk before the snapshot and isn't needed any more: {} has all of it",
                state.layer, state.disk_file
            )))
        }
        Found::Nothing => close_leftovers(env, state).await,
        // Never made, given back, or cleared by its user to go on without it.
        Found::On(_) | Found::Alone | Found::Cleared | Found::Something => {
            on_device::disclaim(task, state).await?;
            close_leftovers(env, state).await
        }
    }
}

fn is_gone(state: &State, why: &str) -> String {
    format!(
        "{}, which is the disk since the snapshot, can't be found: {why}; bring it back, or a device of that name whose \
         beginning is cleared, to go on without it",
        state.disk_file
    )
}

fn has_data(directory: &ImageDirectory, state: &State) -> Result<bool> {
    let mut device = File::from(directory.open(&state.disk_file, OFlags::RDONLY)?);
    let failed = |source| DriverError::Header { path: state.device_path().to_owned(), source };
    has_clusters(&mut device).map_err(failed)
}

async fn remove_layer(
    env: &Env<'_>,
    task: &DiskTask,
    directory: &ImageDirectory,
    state: &mut State,
) -> Result<Removal> {
    match env.vm {
        Some(vm) if was_never_cut(vm, directory, state).await? => {
            close_unused(vm, state).await?;
            give_back(task, directory, state).await
        }
        Some(vm) => copy_up(env, vm, task, directory, state).await,
        None if state.left => Err(follow::left_behind(directory, state)),
        None if !state.completed && follow::is_empty(directory, &state.disk_file).await? => {
            give_back(task, directory, state).await
        }
        None => {
            if state.untouched.is_some() {
                follow::refuse_if_touched(directory, state).await?;
            }
            copy_up_at_rest(env, task, directory, state).await
        }
    }
}

async fn give_back(task: &DiskTask, directory: &ImageDirectory, state: &State) -> Result<Removal> {
    on_device::disclaim(task, state).await?;
    lent::give_back(directory, state).await
}

/// The same in a QEMU of ours, which has the device locked as the VM would.
async fn copy_up_at_rest(
    env: &Env<'_>,
    task: &DiskTask,
    directory: &ImageDirectory,
    state: &mut State,
) -> Result<Removal> {
    let path = state.device_path().to_owned();
    let disk = KnownDisk { name: "disk".into(), path, format: "qcow2".into(), read_only: false };
    let still = Still::start(&task.vm, &[disk], env.roots).await;
    let still = still.map_err(|error| DriverError::NotNow(chain(&error)))?;
    let with_ours = Env { vm: Some(still.vm()), ..*env };
    let step = copy_up(&with_ours, still.vm(), task, directory, state).await;
    still.stop().await;
    step
}

async fn copy_up(
    env: &Env<'_>,
    vm: &Vm,
    task: &DiskTask,
    directory: &ImageDirectory,
    state: &mut State,
) -> Result<Removal> {
    if state.is_elsewhere() {
        // Its owner is told that the former disk isn't needed any more.
        refuse_those_beside(env, directory, &state.layer, state.base)?;
    }
    let graph = vm.graph().await.map_err(qemu("read the block graph"))?;
    let Some(place) = Place::find(env, vm, &graph, state).await? else {
        let why = format!("{} needs {}, which its VM doesn't have open", state.disk_file, state.layer);
        return Err(DriverError::NotNow(why));
    };
    let Some(into) = place.at.checked_sub(1) else { return leave(vm, task, directory, state).await };
    if place.file(into).and_then(NodeFile::id) != directory.id(&state.disk_file)? {
        return Err(DriverError::NotNow(format!("QEMU has another image than {} on {}", state.disk_file, state.layer)));
    }
    state.left = false;
    if at_rest::restore(vm, &place, &state.job()).await? {
        return Ok(Removal::Again);
    }
    if !may_take_itself(&place, into) {
        return Err(only_stopped(directory, state));
    }
    // Those that QEMU named itself it closes itself.
    let below = place.chain[place.at..].iter().filter(|node| !node.auto_named).flat_map(|node| nodes_of(node));
    let below: Vec<_> = below.collect();
    if state.closing != below {
        state.closing = below;
        return Ok(Removal::Again);
    }
    Upwards { job: &state.job(), place: &place, into, base: None, directory }.copy(env, vm).await?;
    directory.sync_file(&state.disk_file)?;
    stands_alone(vm, &place, into, directory, state).await
}

async fn stands_alone(
    vm: &Vm,
    place: &Place<'_>,
    into: usize,
    directory: &ImageDirectory,
    state: &State,
) -> Result<Removal> {
    let graph: BlockGraph = vm.graph().await.map_err(qemu("read the block graph"))?;
    let depth = graph.chain(&place.chain[into].name).len();
    if depth == 1 && header(directory, &state.disk_file)?.backing.is_none() {
        return Ok(Removal::Again);
    }
    Err(DriverError::Job { job: state.job(), why: "QEMU ended it without saying why".into() })
}

/// A VM that runs on the snapshot's image: it was cut off before the cut, or was started with its old command line. A
/// device that the owner was told of must not be found as an empty disk.
async fn leave(vm: &Vm, task: &DiskTask, directory: &ImageDirectory, state: &mut State) -> Result<Removal> {
    if !follow::is_empty(directory, &state.disk_file).await? {
        state.left = true;
        return Err(follow::left_behind(directory, state));
    }
    close_unused(vm, state).await?;
    if !state.completed {
        return give_back(task, directory, state).await;
    }
    on_device::clear(state)?;
    Ok(Removal::Again)
}

/// Whether nobody can tell what became of a device: it isn't there, can't be read, or has something else on it.
pub fn is_unknown(device: &Path, roots: &ImageRoots) -> bool {
    let is_known = |directory: ImageDirectory| match header(&directory, &device.display().to_string()) {
        Ok(_) => true,
        Err(_) => matches!(on_device::begins_with_zeros(device), Ok(Some(true))),
    };
    !device.parent().and_then(|parent| roots.directory(parent).ok()).is_some_and(is_known)
}

/// Whether a device's image has data.
pub fn is_filled(directory: &ImageDirectory, device: &Path) -> bool {
    let open = device.to_str().and_then(|name| directory.open(name, OFlags::RDONLY).ok());
    open.is_some_and(|device| has_clusters(&mut File::from(device)).unwrap_or(false))
}
