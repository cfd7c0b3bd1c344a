//! The disks of a running VM, as drivers and users want to know them.

use std::fs::File;
use std::path::{Path, PathBuf};

use freezeframe_qemu::{BlockGraph, Disk, Error as QemuError, Node};
use rustix::fs::OFlags;
use serde::Deserialize;
use serde_json::json;

use super::device::BlockDevice;
use super::filesystem::Filesystem;
use super::graph::{NodeFile, NodeFiles, node_files};
use super::image::ImageRoots;
use super::qcow2::{Header, read_header};
use super::{QMP_TIMEOUT, Vm};
use crate::drivers::{ChainImage, DiskFacts, Layer};

/// One disk of a running VM.
#[derive(Clone, Debug)]
pub struct FoundDisk {
    /// What users call it.
    pub name: String,
    /// The node that a cut acts on.
    pub node: String,
    /// Virtual size, in bytes.
    pub size: u64,
    /// Whether the guest can't write to it.
    pub read_only: bool,
    /// Images below the top one.
    pub chain_depth: usize,
    /// What drivers may look at.
    pub facts: DiskFacts,
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
    let found = graph.disks().iter().filter_map(|disk| {
        let node = graph.node(disk.top.as_deref()?)?;
        let device = || BlockDevice::of(node, &graph, vm.qmp_identity().peer_pid);
        let device = only_file(node).and_then(|()| device());
        Some(found_disk(disk, node, device, &files, &graph, roots))
    });
    Ok(Disks { found: found.collect(), out_of_reach: out_of_reach(vm).await?, graph })
}

fn found_disk(
    disk: &Disk,
    node: &Node,
    device: Result<BlockDevice, String>,
    files: &NodeFiles,
    graph: &BlockGraph,
    roots: &ImageRoots,
) -> FoundDisk {
    let path = image_path(node, files, roots);
    FoundDisk {
        name: disk.name(),
        node: node.name.clone(),
        size: node.virtual_size,
        read_only: disk.read_only,
        chain_depth: graph.chain(&node.name).len().saturating_sub(1),
        facts: DiskFacts {
            format: node.driver.clone(),
            source: path.as_ref().map_or_else(|_| node.file.clone(), |path| path.display().to_string()),
            device,
            filesystem: path.as_ref().ok().and_then(|path| Filesystem::of(path, roots)),
            chain: chain_of(node, graph, files, roots),
            path,
            encrypted: node.encrypted || disk.encrypted,
            has_bitmaps: !node.dirty_bitmaps.is_empty(),
        },
    }
}

/// QEMU tells the file with the data, not the one with the image: whoever worked on that one would destroy it.
fn only_file(node: &Node) -> Result<(), String> {
    if node.external_data { Err("the image has its data in another file".into()) } else { Ok(()) }
}

fn image_path(node: &Node, files: &NodeFiles, roots: &ImageRoots) -> Result<PathBuf, String> {
    only_file(node)?;
    path_of(files.of(node), roots)
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
    let header = match format {
        "qcow2" => Some(header_of(&path, roots)?),
        _ => None,
    };
    Ok(ChainImage {
        filesystem: Filesystem::of(&path, roots),
        backing: header.and_then(|header| header.backing),
        layer: Layer { path, format: format.to_owned() },
    })
}

fn header_of(path: &Path, roots: &ImageRoots) -> Result<Header, String> {
    let file = roots.directory_of(path).and_then(|(directory, name)| directory.open(&name, OFlags::RDONLY));
    let file = file.map_err(|error| error.to_string())?;
    read_header(&mut File::from(file)).map_err(|error| format!("{}: {error}", path.display()))
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

/// Devices whose data never passes QEMU's block layer.
async fn out_of_reach(vm: &Vm) -> Result<Vec<String>, QemuError> {
    const KINDS: [&str; 4] = ["vhost-user-blk", "vhost-user-scsi", "vhost-scsi", "vhost-vdpa-device"];
    let path = json!({"path": "/machine/peripheral"});
    let devices: Vec<Property> = vm.qmp().execute("qom-list", path, QMP_TIMEOUT).await?;
    let past = |device: &Property| KINDS.iter().any(|kind| device.kind.contains(kind));
    Ok(devices.into_iter().filter(past).map(|device| device.name).collect())
}
