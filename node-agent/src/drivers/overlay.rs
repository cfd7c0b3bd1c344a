//! `overlay`: a new qcow2 layer takes the disk's own name, and the layer below it is the snapshot.
//!
//! A VM that is restarted with its old command line must open its newest data. So the new layer and the old file
//! exchange names at the cut, the layers find each other by the names they have *after* it, and QEMU holds every file
//! whose name changes hands by descriptor.
//!
//! ```text
//!  before:  disk.qcow2 (base)                          QEMU ─► base, by name
//!  prepare: disk.qcow2 (base)   …vmsnap-ID (layer)     QEMU ─► base;  layer open, by descriptor
//!  cut:     disk.qcow2 (layer) ─► …vmsnap-ID (base)    QEMU ─► layer ─► base
//!  after:                                              base reopened by descriptor: no node depends on a name
//! ```
//!
//! The snapshot's image is `…vmsnap-ID`. Deleting it merges the layer above it *into* it, since nothing but the
//! deleted snapshot needed it as it stands ([`merge`]). Images in between that no snapshot needs are left out of the chain
//! where a class wants it short ([`shorten`]).

mod at_rest;
mod device_merge;
pub(crate) mod follow;
mod follow_merge;
pub(crate) mod followed;
pub(crate) mod left_running;
mod lent;
mod merge;
mod needs;
mod offline_merge;
mod on_device;
mod parameters;
mod place;
mod prepare;
pub(crate) mod resting;
mod runs;
pub(crate) mod shorten;
mod starving;
mod state;
mod stream;
mod unseen;
mod upwards;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use freezeframe_guard::Exchange;
use freezeframe_qemu::BlockGraph;
use serde_json::{Value, json};

use super::{Cut, DiskFacts, DiskTask, Env, Layer, Need, Removal, Result, SnapshotDriver, Verdict, Writers};
use crate::hypervisor::Vm;
use crate::hypervisor::image::{ImageError, ImageRoots};
use follow::Untouched;
pub(crate) use needs::dependents;
use parameters::Parameters;
use state::State;

/// Drivers of QEMU that give a device of the host as it is, with no image format.
const PASSED_THROUGH: [&str; 3] = ["host_device", "host_cdrom", "nvme"];

/// The driver.
pub struct Overlay;

#[async_trait]
impl SnapshotDriver for Overlay {
    fn name(&self) -> &'static str {
        "overlay"
    }

    fn check_parameters(&self, parameters: &BTreeMap<String, String>) -> Result<()> {
        Parameters::parse(parameters).map(drop)
    }

    fn can_take(&self, disk: &DiskFacts, parameters: &BTreeMap<String, String>) -> Verdict {
        let parameters = Parameters::parse(parameters).unwrap_or_default();
        let raw = disk.format == "raw" && disk.device.is_ok();
        let device = raw || (disk.format == "qcow2" && disk.on_device.is_some());
        let refusal = match &disk.path {
            _ if disk.writers == Writers::Nobody => {
                Some("the guest can't write to it, so there would be nothing in a layer on top".into())
            }
            _ if disk.writers == Writers::Others => Some(
                "others may write to the image too (share-rw=on), and they would go on writing below a layer on top"
                    .into(),
            ),
            _ if PASSED_THROUGH.contains(&disk.format.as_str()) => {
                Some("it is a device of the host that is passed through: there is no image to put a layer on".into())
            }
            _ if disk.not_followed.is_some() => disk.not_followed.clone(),
            _ if !fits(disk, parameters.follow) => Some(wrong_format(&disk.format)),
            _ if disk.encrypted => Some("the image is encrypted, and a layer on top would not be".into()),
            _ if disk.has_bitmaps => {
                Some("the image has dirty bitmaps, which a layer on top would leave behind".into())
            }
            Err(_) if device && !parameters.follow => Some(format!(
                "the image is on a block device, whose name can't become a layer's; a class with parameter `{}` takes it, where \
                 the owner starts the VM with the layer",
                parameters::FOLLOW
            )),
            Err(_) if device && parameters.has_a_place_for_layers() => None,
            Err(_) if device => Some(format!(
                "it is a block device, and parameter `{}` must say where layers on those go",
                parameters::DIRECTORY
            )),
            Err(why) => Some(why.clone()),
            Ok(_) => None,
        };
        let what = if disk.path.is_ok() { "file" } else { "device" };
        let usable = if disk.format == "qcow2" && disk.path.is_ok() {
            "qcow2 file: a new layer at once, no copy".into()
        } else {
            format!("{} {what}: a new layer at once, which the VM must be started with next (startWith)", disk.format)
        };
        refusal.map_or(Verdict::Usable(usable), Verdict::Unusable)
    }

    fn plan(&self, task: &mut DiskTask, graph: &BlockGraph, roots: &ImageRoots) -> Result<()> {
        let state = State::plan(task, graph, roots)?;
        let now = Layer { path: state.directory.join(&state.disk_file), format: "qcow2".into() };
        task.start_with = state.apart.then_some(now);
        task.set_state(&state)
    }

    async fn prepare(&self, vm: &Vm, roots: &ImageRoots, task: &mut DiskTask) -> Result<()> {
        let mut state: State = task.state()?;
        prepare::make_layer(roots, task, &mut state).await?;
        task.set_state(&state)?;
        prepare::open_layer(vm, roots, task, &state).await?;
        if state.lent {
            lent::refuse_unless_empty(&roots.directory(&state.directory)?, &state).await?;
        }
        Ok(())
    }

    fn why_no_target(&self, disk: &DiskFacts, parameters: &BTreeMap<String, String>) -> Option<String> {
        lent::refuse(disk, Parameters::parse(parameters).is_ok_and(|parameters| parameters.follow))
    }

    fn cut(&self, group: &[&DiskTask], _: &ImageRoots) -> Result<Cut> {
        let mut cut = Cut::default();
        for task in group {
            let (action, exchange) = layer_cut(&task.state()?);
            cut.actions.push(action);
            cut.exchanges.extend(exchange);
        }
        Ok(cut)
    }

    async fn complete(&self, vm: &Vm, roots: &ImageRoots, task: &mut DiskTask) -> Result<()> {
        let mut state: State = task.state()?;
        prepare::pin_base(vm, roots, &state).await?;
        prepare::verify(vm, roots, task, &state).await?;
        if state.keeps_name() && state.untouched.is_none() {
            let directory = roots.directory(&state.directory)?;
            follow_merge::refuse_if_left(vm, roots, &directory, &state).await?;
            if !state.is_on_device() {
                directory.touch(&state.disk_file)?;
            }
            state.stamp(&directory)?;
            task.set_state(&state)?;
        }
        let handle = state.directory.join(&state.layer);
        task.artifact = Some(super::Artifact { handle, format: state.format.clone() });
        Ok(())
    }

    async fn remove(&self, env: &Env<'_>, task: &mut DiskTask) -> Result<Removal> {
        if task.state.is_null() {
            return Ok(Removal::Done);
        }
        merge::remove(env, task).await
    }

    fn disk_after_cut(&self, task: &DiskTask) -> Option<PathBuf> {
        let state: State = task.state().ok()?;
        Some(state.directory.join(state.disk_file))
    }

    fn overwritten(&self, task: &DiskTask, roots: &ImageRoots) -> Option<String> {
        let state: State = task.state().ok()?;
        let before = state.untouched.filter(|_| !state.begun)?;
        // One that can't be looked at isn't called overwritten.
        let now = Untouched::look(&roots.directory(&state.directory).ok()?, &state.layer).ok()?;
        (now != before).then(|| follow::overwritten(&state.directory.join(&state.layer)))
    }

    fn lies_on(&self, task: &DiskTask, roots: &ImageRoots) -> Option<PathBuf> {
        let state: State = task.state().ok().filter(|state: &State| !state.keeps_name())?;
        followed::image_at_bottom(&roots.directory(&state.directory).ok()?, &state)
    }

    fn place(&self, task: &DiskTask) -> Option<PathBuf> {
        let state: State = task.state().ok()?;
        Some(state.directory.join(state.layer))
    }

    fn needs(&self, task: &DiskTask) -> Option<Need> {
        let state: State = task.state().ok().filter(|state: &State| !state.is_on_device())?;
        Some(Need { directory: state.directory, bytes: prepare::LAYER_METADATA })
    }

    fn is_half_removed(&self, task: &DiskTask) -> bool {
        // Whether it is done or not: the note of that comes later than the fact.
        task.state::<State>().is_ok_and(|state| state.merging.is_some())
    }

    fn merges(&self) -> bool {
        true
    }

    fn follow(&self, task: &mut DiskTask, to: &Path, format: &str, roots: &ImageRoots) -> Result<()> {
        let mut state: State = task.state()?;
        let directory = roots.directory(&state.directory)?;
        let is_here = to.parent() == Some(directory.path());
        // A device, or an image that the layers were made elsewhere on.
        let name = if is_here { to.file_name().and_then(std::ffi::OsStr::to_str) } else { to.to_str() };
        let name = name.ok_or_else(|| ImageError::NotAFilePath(to.to_owned()))?.to_owned();
        state.base = directory.id(&name)?.ok_or_else(|| ImageError::NotRegular(to.to_owned()))?;
        state.layer = name;
        format.clone_into(&mut state.format);
        if state.keeps_name() {
            state.stamp(&directory)?;
        }
        task.set_state(&state)?;
        if let Some(artifact) = &mut task.artifact {
            to.clone_into(&mut artifact.handle);
            format.clone_into(&mut artifact.format);
        }
        Ok(())
    }
}

/// Whether a layer of ours can be the disk.
fn fits(disk: &DiskFacts, follow: bool) -> bool {
    disk.format == "qcow2" || (follow && follow::FORMATS.contains(&disk.format.as_str()))
}

fn wrong_format(format: &str) -> String {
    let why = format!(
        "the image is {format}, and a VM restarted with its old command line would read a qcow2 layer as {format}"
    );
    if follow::FORMATS.contains(&format) {
        format!(
            "{why}; a class with parameter `{}` takes it, where the owner starts the VM with the layer",
            parameters::FOLLOW
        )
    } else {
        why
    }
}

fn layer_cut(state: &State) -> (Value, Option<Exchange>) {
    let action = json!({
        "type": "blockdev-snapshot",
        "data": {"node": state.base_node, "overlay": state.layer_node()},
    });
    (action, state.swap())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(change: impl FnOnce(&mut DiskFacts)) -> String {
        let mut facts = DiskFacts {
            format: "qcow2".into(),
            source: "/images/a".into(),
            path: Ok("/images/a".into()),
            device: Err("not a device".into()),
            on_device: None,
            filesystem: None,
            chain: Err("not looked at".into()),
            encrypted: false,
            has_bitmaps: false,
            writers: Writers::Guest,
            not_followed: None,
        };
        change(&mut facts);
        match Overlay.can_take(&facts, &BTreeMap::new()) {
            Verdict::Usable(_) => String::new(),
            Verdict::Unusable(why) => why,
        }
    }

    #[test]
    fn what_a_layer_would_harm_is_refused_in_words() {
        assert_eq!(refusal(|_| {}), "");
        assert!(refusal(|disk| disk.format = "raw".into()).contains("old command line"));
        assert!(refusal(|disk| disk.format = "host_device".into()).contains("passed through"));
        assert!(refusal(|disk| disk.encrypted = true).contains("encrypted"));
        assert!(refusal(|disk| disk.has_bitmaps = true).contains("dirty bitmaps"));
        assert!(refusal(|disk| disk.writers = Writers::Others).contains("share-rw"));
        assert!(refusal(|disk| disk.writers = Writers::Nobody).contains("can't write"));
        assert!(refusal(|disk| disk.path = Err("outside".into())).contains("outside"));
    }
}
