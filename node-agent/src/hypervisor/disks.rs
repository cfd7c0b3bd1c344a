//! The disks of a running VM, as drivers and users want to know them.

use std::fs::File;
use std::path::PathBuf;

use freezeframe_qemu::{BlockGraph, Disk, Error as QemuError, Node};
use rustix::fs::OFlags;
use serde::Deserialize;
use serde_json::json;

use super::backing::backing_of;
use super::device::BlockDevice;
use super::filesystem::Filesystem;
use super::graph::{NodeFile, NodeFiles, node_files};
use super::image::ImageRoots;
use super::qcow2::read_header;
use super::{QMP_TIMEOUT, Vm};
use crate::drivers::overlay::{follow, followed};
use crate::drivers::{ChainImage, DiskFacts, Layer, Writers};

/// One disk of a running VM.
#[derive(Clone, Debug)]
pub struct FoundDisk {
    /// What users call it.
    pub name: String,
    /// The node that a cut acts on.
    pub node: String,
    /// Virtual size, in bytes.
    pub size: u64,
    /// Images below the top one.
    pub chain_depth: usize,
    /// What the images above the lowest take on their file system, in bytes.
    pub overlay_bytes: u64,
    /// Whether the VM's command line leads to another image.
    pub apart: bool,
    /// Why not all of its images are where they may be, if they aren't.
    pub strays: Result<(), String>,
    /// What drivers may look at.
    pub facts: DiskFacts,
}

impl FoundDisk {
    /// Whether the guest can't write to it.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.facts.writers == Writers::Nobody
    }
}

/// The disks of a VM, and what can't be a disk of a snapshot at all.
pub struct Disks {
    /// Disks that QEMU's block layer has.
    pub found: Vec<FoundDisk>,
    /// Devices that store data past QEMU's block layer, by id: no driver can reach them.
    pub out_of_reach: Vec<String>,
    /// The graph that this was read from.
    pub graph: BlockGraph,
}

/// Reads the disks of a VM.
pub async fn disks(vm: &Vm, roots: &ImageRoots) -> Result<Disks, QemuError> {
    let graph = vm.graph().await?;
    let files = node_files(vm.qmp(), &graph, roots, vm.qmp_identity().peer_pid).await?;
    let out_of_reach = out_of_reach(vm).await?;
    // That of a stopped VM's disks never begins to.
    let runs = vm.run_state().await?.status != "prelaunch";
    let mut found = vec![];
    for disk in graph.disks().iter().filter(|disk| !out_of_reach.contains(&disk.name())) {
        let Some(node) = disk.top.as_deref().and_then(|top| graph.node(top)) else { continue };
        let device = || BlockDevice::of(node, &graph, vm.qmp_identity().peer_pid);
        let device = only_file(node).and_then(|()| device());
        let writers = writers(vm, disk, &graph).await?;
        let mut disk = found_disk(disk, node, device, writers, &files, &graph, roots);
        let path = disk.facts.path.as_ref().ok();
        disk.facts.not_followed = path.and_then(|path| followed::not_followed(path, &node.driver, runs, roots));
        found.push(disk);
    }
    Ok(Disks { found, out_of_reach, graph })
}

fn found_disk(
    disk: &Disk,
    node: &Node,
    device: Result<BlockDevice, String>,
    writers: Writers,
    files: &NodeFiles,
    graph: &BlockGraph,
    roots: &ImageRoots,
) -> FoundDisk {
    let path = image_path(node, files, roots);
    let chain = graph.chain(&node.name);
    let above_lowest = chain.len().saturating_sub(1);
    FoundDisk {
        name: disk.name(),
        node: node.name.clone(),
        size: node.virtual_size,
        chain_depth: above_lowest,
        overlay_bytes: chain.iter().take(above_lowest).map(|layer| layer.actual_size).sum(),
        apart: follow::is_apart(node),
        strays: strays(&chain, files, roots),
        facts: DiskFacts {
            format: node.driver.clone(),
            source: path.as_ref().map_or_else(|_| node.file.clone(), |path| path.display().to_string()),
            device,
            on_device: device_below(node, files),
            filesystem: path.as_ref().ok().and_then(|path| Filesystem::of(path, roots)),
            chain: chain_of(node, graph, files, roots),
            path,
            encrypted: node.encrypted || disk.encrypted,
            has_bitmaps: !node.dirty_bitmaps.is_empty(),
            writers,
            not_followed: None,
        },
    }
}

/// QEMU tells the file with the data, not the one with the image: whoever worked on that one would destroy it.
fn only_file(node: &Node) -> Result<(), String> {
    if node.external_data { Err("the image has its data in another file".into()) } else { Ok(()) }
}

fn device_below(node: &Node, files: &NodeFiles) -> Option<PathBuf> {
    only_file(node).ok()?;
    match files.of(node)? {
        NodeFile::Device { path, .. } => Some(path.clone()),
        _ => None,
    }
}

fn image_path(node: &Node, files: &NodeFiles, roots: &ImageRoots) -> Result<PathBuf, String> {
    only_file(node)?;
    path_of(files.of(node), roots)
}

/// Each image is a file or a device beneath an image root.
fn strays(chain: &[&Node], files: &NodeFiles, roots: &ImageRoots) -> Result<(), String> {
    let stray = |node: &&&Node| match files.of(node) {
        Some(NodeFile::Device { path, .. }) => !roots.names(path),
        _ => image_path(node, files, roots).is_err(),
    };
    chain.iter().find(stray).map_or(Ok(()), |node| Err(format!("image {} isn't beneath an image root", node.file)))
}

/// The images of a disk, top first, if each is a file that we may touch.
fn chain_of(top: &Node, graph: &BlockGraph, files: &NodeFiles, roots: &ImageRoots) -> Result<Vec<ChainImage>, String> {
    let image = |node: &Node| {
        let path = image_path(node, files, roots).map_err(|why| format!("image {}: {why}", node.file))?;
        chain_image(path, &node.driver, roots)
    };
    graph.chain(&top.name).into_iter().map(image).collect()
}

fn chain_image(path: PathBuf, format: &str, roots: &ImageRoots) -> Result<ChainImage, String> {
    let (directory, name) = roots.directory_of(&path).map_err(|error| error.to_string())?;
    let open = || directory.open(&name, OFlags::RDONLY).map(File::from).map_err(|error| error.to_string());
    let unreadable = |error| format!("{}: {error}", path.display());
    let (backing, encrypted) = match format {
        "qcow2" => {
            let header = read_header(&mut open()?).map_err(unreadable)?;
            (header.backing, header.encrypted)
        }
        "qed" => (backing_of(&mut open()?).map_err(unreadable)?, false),
        _ => (None, false),
    };
    let filesystem = Filesystem::of(&path, roots);
    let layer = Layer { path, format: format.to_owned() };
    Ok(ChainImage { layer, filesystem, backing, encrypted, writable: directory.is_writable() })
}

/// The path under which the file is found now; a pinned one is looked up by what it is.
pub fn path_of(file: Option<&NodeFile>, roots: &ImageRoots) -> Result<PathBuf, String> {
    match file {
        Some(NodeFile::Named { path, .. }) => Ok(path.clone()),
        Some(NodeFile::Pinned { id, directory }) => {
            let open = roots.directory(directory).map_err(|error| error.to_string())?;
            let names = open.names().map_err(|error| error.to_string())?;
            let name = names.into_iter().find(|name| open.holds(name, *id).unwrap_or(false));
            name.map(|name| open.join(&name)).ok_or_else(|| "the image's file has no name any more".into())
        }
        Some(NodeFile::Device { path, .. }) => Err(format!("{} is a block device, and no file", path.display())),
        Some(NodeFile::Stale) => Err("QEMU's name for the image leads to another file".into()),
        Some(NodeFile::Foreign { why }) => Err(why.clone()),
        None => Err("the image isn't a file".into()),
    }
}

#[derive(Deserialize)]
struct Property {
    name: String,
    #[serde(rename = "type")]
    kind: String,
}

async fn writers(vm: &Vm, disk: &Disk, graph: &BlockGraph) -> Result<Writers, QemuError> {
    if disk.read_only {
        return Ok(Writers::Nobody);
    }
    let shared = is_twice(disk, graph) || may_be_shared(vm, disk).await?;
    Ok(if shared { Writers::Others } else { Writers::Guest })
}

/// Whether another device of this VM has the same image.
fn is_twice(disk: &Disk, graph: &BlockGraph) -> bool {
    graph.disks().iter().filter(|other| other.top == disk.top).count() > 1
}

/// Whether its device lets others write to the image (`share-rw=on`), as disks of a cluster do.
async fn may_be_shared(vm: &Vm, disk: &Disk) -> Result<bool, QemuError> {
    let path = match disk.qdev.as_str() {
        "" => return Ok(false),
        path if path.starts_with('/') => path.to_owned(),
        id => format!("/machine/peripheral/{id}"),
    };
    let property = json!({"path": path, "property": "share-rw"});
    match vm.qmp().execute::<bool>("qom-get", property, QMP_TIMEOUT).await {
        // A device without the property shares nothing.
        Err(QemuError::Command { .. }) => Ok(false),
        told => told,
    }
}

/// Devices whose data never passes QEMU's block layer.
async fn out_of_reach(vm: &Vm) -> Result<Vec<String>, QemuError> {
    let path = json!({"path": "/machine/peripheral"});
    let devices: Vec<Property> = vm.qmp().execute("qom-list", path, QMP_TIMEOUT).await?;
    Ok(devices.into_iter().filter(|device| passes_by(&device.kind)).map(|device| device.name).collect())
}

/// Of `scsi-block` and `scsi-generic` the guest's commands go to the device as they are.
fn passes_by(kind: &str) -> bool {
    const KINDS: [&str; 6] =
        ["vhost-user-blk", "vhost-user-scsi", "vhost-scsi", "vhost-vdpa-device", "scsi-block", "scsi-generic"];
    KINDS.iter().any(|known| kind.contains(known))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_that_are_passed_through_are_out_of_reach_and_others_are_not() {
        for kind in ["child<scsi-block>", "child<scsi-generic>", "child<vhost-user-blk-pci>"] {
            assert!(passes_by(kind), "{kind}");
        }
        for kind in ["child<scsi-hd>", "child<scsi-cd>", "child<virtio-blk-pci>", "child<virtio-scsi-pci>"] {
            assert!(!passes_by(kind), "{kind}");
        }
    }
}
