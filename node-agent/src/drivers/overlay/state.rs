//! What the overlay driver remembers of one disk.

use std::path::{Path, PathBuf};

use freezeframe_guard::{Exchange, Kind};
use freezeframe_qemu::BlockGraph;
use k8s_openapi::jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::follow::{self, Untouched};
use super::lent;
use super::needs::dependents;
use super::on_device;
use super::parameters::{OUTPUT_TEMPLATE, Parameters};
use crate::drivers::lvm::volume::Volume;
use crate::drivers::{DiskTask, DriverError, Result};
use crate::hypervisor::image::{FileId, ImageDirectory, ImageError, ImageRoots};

/// The record of one disk's layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(clippy::struct_excessive_bools, reason = "a record of facts, each of its own")]
pub struct State {
    /// Directory of the disk's image and of all its layers.
    pub directory: PathBuf,
    /// Name of the disk's image once the cut is made, which the VM's command line has, or is to have; the path of a device.
    pub disk_file: String,
    /// Name of the snapshot after the cut. Where names change hands, that of the new layer before it.
    pub layer: String,
    /// The file that was the disk before the cut, and is the snapshot after it.
    pub base: FileId,
    /// Format of the snapshot's image. One that isn't qcow2 keeps its name, since a command line that has its format
    /// would open a layer wrongly, and so does a device.
    #[serde(default = "qcow2")]
    pub format: String,
    /// Whether the VM's command line, at the cut, leads to another image than the disk's.
    #[serde(default)]
    pub apart: bool,
    /// What the image was when it was complete, where nothing holds a VM off it: until a merge into it is begun.
    #[serde(default)]
    pub untouched: Option<Untouched>,
    /// Whether a merge into an image that keeps its name was begun.
    #[serde(default)]
    pub begun: bool,
    /// Whether the VM was seen to run on that image with its data in the layer: until it runs on the layer again.
    #[serde(default)]
    pub left: bool,
    /// Whether the new layer's file is one that the user made.
    #[serde(default)]
    pub lent: bool,
    /// The logical volume that the new layer is on.
    #[serde(default)]
    pub volume: Option<Volume>,
    /// Whether the snapshot was complete, by its task: its owner was told what to start the VM with.
    #[serde(skip)]
    pub completed: bool,
    /// The new layer's file, once made.
    pub overlay: Option<FileId>,
    /// Node of the disk before the cut.
    pub base_node: String,
    /// Prefix of the names of the nodes that we make.
    pub node_prefix: String,
    /// The merge that is under way, recorded before it starts.
    pub merging: Option<Merging>,
    /// Nodes that nothing uses once the layer above is merged.
    #[serde(default)]
    pub closing: Vec<String>,
    /// The file that this one's data is streamed into, recorded before that starts.
    #[serde(default)]
    pub streamed_into: Option<FileId>,
    /// How often a merge into this snapshot's file made way for a snapshot.
    #[serde(default)]
    pub made_way: u32,
}

/// A merge of the layer above into this snapshot's file, which then belongs to the layer's own snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Merging {
    /// Name of the file whose data moves.
    pub above: String,
    /// That file.
    pub above_id: FileId,
    /// Whether the job was seen to end in good order, with all that it wrote.
    #[serde(default)]
    pub seen: bool,
    /// Whether the job is known to be done: the file above is then garbage.
    pub done: bool,
}

impl Merging {
    /// Takes note that the merge is done, if the headers say so: the file above is unlinked after this, so it isn't
    /// enough that QEMU doesn't have it. A file that holds the data names this one as its backing file, or is this one.
    pub fn check_done(&mut self, directory: &ImageDirectory, base: FileId) -> Result<()> {
        let needing_above = dependents(directory, self.above_id)?;
        let needing_base = dependents(directory, base)?;
        let mut over = needing_base.iter().filter(|name| **name != self.above);
        if needing_above.is_empty() && over.next().is_some() {
            self.done = true;
            return Ok(());
        }
        let above = directory.join(&self.above);
        Err(DriverError::NotNow(format!("{} was to be merged, and it isn't clear whether it was", above.display())))
    }
}

fn qcow2() -> String {
    "qcow2".into()
}

/// What the disk is called once it is the snapshot's image.
fn name_of_snapshot(task: &DiskTask, directory: &ImageDirectory, disk: &str) -> Result<String> {
    let Some(template) = Parameters::parse(&task.parameters)?.template else {
        return Ok(format!("{disk}.vmsnap-{}", task.id));
    };
    let refused = |why: String| DriverError::Parameter { key: OUTPUT_TEMPLATE.into(), why };
    let (_, name) = template.fill(task, Timestamp::now()).map_err(refused)?;
    if directory.names()?.contains(&name) {
        return Err(refused(format!("{} is there already", directory.join(&name).display())));
    }
    Ok(name)
}

/// Copied up, what is below would leave the former layer with nothing that needs it, and its snapshot with no end.
fn refuse_above_layer(device: &on_device::Named, graph: &BlockGraph, task: &DiskTask) -> Result<()> {
    match graph.chain(&task.node).as_slice() {
        [top, _, ..] if task.format == "qcow2" => Err(DriverError::Target {
            path: device.path.clone(),
            why: format!("can't have the layer before {} is alone: delete the snapshots below it first", top.file),
        }),
        _ => Ok(()),
    }
}

impl State {
    /// Names what will be made for a disk.
    pub fn plan(task: &DiskTask, graph: &BlockGraph, roots: &ImageRoots) -> Result<Self> {
        let node = graph.node(&task.node);
        let node = node.ok_or_else(|| DriverError::Verify(format!("node {} is gone", task.node)))?;
        let device = on_device::named(task, roots)?;
        let (directory, name) = match (&task.target, task.path.as_deref()) {
            (Some(_), path) => {
                let image = path.map_or(node.file.clone(), |path| path.display().to_string());
                let directory = match device.as_ref().and_then(|device| device.path.parent()) {
                    Some(parent) => roots.directory(parent)?,
                    None => lent::directory_for(task, roots)?,
                };
                (directory, image)
            }
            (None, Some(path)) => roots.directory_of(path)?,
            (None, None) => (follow::directory_for(task, roots)?, node.file.clone()),
        };
        let base = directory.id(&name)?.ok_or_else(|| ImageError::NotRegular(directory.join(&name)))?;
        let (disk_file, layer) = if task.format == "qcow2" && task.path.is_some() {
            let layer = name_of_snapshot(task, &directory, &name)?;
            (name, layer)
        } else if let Some(device) = &device {
            follow::check_nameable(task, &directory, &name)?;
            refuse_above_layer(device, graph, task)?;
            (device.path.display().to_string(), name)
        } else {
            (follow::plan(task, &directory, &name)?, name)
        };
        Ok(Self {
            directory: directory.path().to_owned(),
            layer,
            disk_file,
            base,
            format: task.format.clone(),
            apart: follow::will_be_apart(node),
            untouched: None,
            begun: false,
            left: false,
            lent: task.target.is_some(),
            volume: device.and_then(|device| device.volume),
            completed: false,
            overlay: None,
            base_node: task.node.clone(),
            node_prefix: format!("ff-{}-{}", task.id, task.index),
            merging: None,
            closing: vec![],
            streamed_into: None,
            made_way: 0,
        })
    }

    /// Whether the snapshot's image has the name that it had as the disk, and the new layer another one.
    pub fn keeps_name(&self) -> bool {
        self.format != "qcow2" || self.is_device()
    }

    /// Says of the files on record on which file systems they are: two may have the same inode number.
    pub fn recognize(&mut self, directory: &ImageDirectory) {
        let found = |name: &str| directory.id(name).ok().flatten();
        let is_here = !self.is_device() && !self.is_elsewhere();
        let layer = found(&self.layer);
        // Not the directory's own number: on an overlay file system it may be another than its files'.
        let here = found(&self.disk_file).or(layer.filter(|_| is_here)).and_then(|id| id.device);
        let in_directory = |mut id: FileId| {
            id.device = here;
            id
        };
        match layer {
            _ if is_here => self.base = in_directory(self.base),
            // A device may have another number at each boot.
            Some(id) if self.is_device() || id == self.base => self.base = id,
            _ => {}
        }
        self.overlay = match self.overlay {
            Some(_) if self.is_on_device() => found(&self.disk_file),
            overlay => overlay.map(in_directory),
        };
        self.streamed_into = self.streamed_into.map(in_directory);
        if let Some(merging) = &mut self.merging {
            merging.above_id = in_directory(merging.above_id);
        }
    }

    /// Remembers what the image is, where the kernel would tell of a change.
    pub fn stamp(&mut self, directory: &ImageDirectory) -> Result<()> {
        if !self.is_device() {
            self.untouched = Some(Untouched::look(directory, &self.layer)?);
        }
        Ok(())
    }

    /// Whether the snapshot's image is a block device.
    pub fn is_device(&self) -> bool {
        self.layer.starts_with("/dev/")
    }

    /// Whether the snapshot's image is a file in another directory than the layers on it.
    pub fn is_elsewhere(&self) -> bool {
        self.layer.starts_with('/') && !self.is_device()
    }

    /// Whether the new layer is on a block device. Nothing is ever renamed, unlinked or made in its directory, and nothing
    /// there is opened but itself.
    pub fn is_on_device(&self) -> bool {
        self.disk_file.starts_with("/dev/")
    }

    /// The new layer's device.
    pub fn device_path(&self) -> &Path {
        Path::new(&self.disk_file)
    }

    /// The cut's change of names: the new layer becomes the disk, the disk the snapshot. None where each keeps its own.
    pub fn swap(&self) -> Option<Exchange> {
        let exchange = || self.exchange(self.base, &self.layer, self.layer_node(), Kind::Swap);
        (!self.keeps_name()).then(exchange)
    }

    /// The end of a merge of the disk's layer, once `merged` is the disk's node: the merged file becomes the disk. One
    /// that keeps its name leaves the layer's to a tombstone.
    pub fn replace(&self, directory: &ImageDirectory, merged: &str) -> Result<Exchange> {
        let active = directory.id(&self.disk_file)?;
        let active = active.ok_or_else(|| DriverError::NotNow(format!("{} is gone", self.disk_file)))?;
        let by = if self.keeps_name() { follow::make_tombstone(directory, self)? } else { self.layer.clone() };
        Ok(self.exchange(active, &by, merged.to_owned(), Kind::Replace))
    }

    fn exchange(&self, disk: FileId, b: &str, when_active: String, kind: Kind) -> Exchange {
        Exchange {
            directory: self.directory.clone(),
            a: self.disk_file.clone(),
            b: b.to_owned(),
            a_inode: disk.inode,
            when_active,
            kind,
        }
    }

    /// Name that the new layer is made under.
    pub fn new_file(&self) -> &str {
        if self.keeps_name() { &self.disk_file } else { &self.layer }
    }

    /// Name of the layer while it is being made.
    pub fn unfinished(&self) -> String {
        self.beside_new_file("new")
    }

    /// A name for what is made beside the layer, and none that a user may have given to something.
    pub fn beside_new_file(&self, end: &str) -> String {
        format!("{}.{}.{end}", self.new_file(), self.node_prefix)
    }

    /// Node of the new layer. It tells for as long as this QEMU lives whether its command line is right.
    pub fn layer_node(&self) -> String {
        let kind = if self.apart { follow::APART } else { "-o" };
        format!("{}{kind}", self.node_prefix)
    }

    /// Node of the new layer's file.
    pub fn layer_file_node(&self) -> String {
        format!("{}-of", self.node_prefix)
    }

    /// Node that takes the place of a base that QEMU opened by itself.
    pub fn base_node_by_descriptor(&self) -> String {
        format!("{}-b", self.node_prefix)
    }

    /// Node of the base's file once it is held by descriptor.
    pub fn base_file_node(&self) -> String {
        format!("{}-bf", self.node_prefix)
    }

    /// Node that keeps another one from being freed for a moment.
    pub fn keeping_node(&self) -> String {
        format!("{}-k", self.node_prefix)
    }

    /// The job that merges into this snapshot's file.
    pub fn job(&self) -> String {
        format!("{}-merge", self.node_prefix)
    }
}
