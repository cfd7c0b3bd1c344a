//! Where a snapshot's file is in a running VM.

use freezeframe_qemu::{BlockGraph, Disk, Node};

use super::prepare::header;
use super::state::State;
use crate::drivers::{DriverError, Env, Result, qemu};
use crate::hypervisor::Vm;
use crate::hypervisor::graph::{NodeFile, NodeFiles, node_files, renew};
use crate::hypervisor::image::{FileId, ImageDirectory};

/// The chain of the disk that holds the snapshot's file, top first, and where in it the file is.
pub struct Place<'a> {
    /// The node inserted in the device: a filter, or the first of the chain.
    pub root: String,
    /// The layers, top first.
    pub chain: Vec<&'a Node>,
    files: NodeFiles,
    /// Where in the chain the snapshot's file is.
    pub at: usize,
    /// Whether the disk was given by `-drive`.
    pub legacy: bool,
}

impl<'a> Place<'a> {
    /// Looks for the snapshot's file in all disks.
    pub async fn find(env: &Env<'_>, vm: &Vm, graph: &'a BlockGraph, state: &State) -> Result<Option<Place<'a>>> {
        let files = node_files(vm.qmp(), graph, env.roots, vm.qmp_identity().peer_pid).await;
        let files = files.map_err(qemu("read the descriptors that QEMU holds"))?;
        for disk in graph.disks() {
            let (Some(root), Some(top)) = (&disk.root, &disk.top) else { continue };
            let chain = graph.chain(top);
            let above = |at: usize| at.checked_sub(1).map(|above| chain[above]);
            let found = chain.iter().enumerate().position(|(at, node)| holds(node, above(at), &files, state));
            if let Some(at) = found {
                return Ok(Some(Place { root: root.clone(), chain, files, at, legacy: !disk.device.is_empty() }));
            }
        }
        Ok(None)
    }

    /// The chain of a disk from its image `top` down, for who looks at all of it.
    pub fn of_chain(graph: &'a BlockGraph, disk: &Disk, top: &str, files: &NodeFiles) -> Place<'a> {
        let legacy = !disk.device.is_empty();
        Place { root: top.to_owned(), chain: graph.chain(top), files: files.clone(), at: 0, legacy }
    }

    /// Gives QEMU fresh descriptors for all layers that it holds so: a job switches some to writable, and none may be locked
    /// by what QEMU did before.
    pub async fn renew(&self, env: &Env<'_>, vm: &Vm) -> Result<()> {
        for at in 0..self.chain.len() {
            let Some(NodeFile::Pinned { id, directory }) = self.file(at) else { continue };
            let directory = env.roots.directory(directory)?;
            renew(vm.qmp(), &directory, &name_of(&directory, Some(*id))?).await?;
        }
        Ok(())
    }

    /// What is known of a node's file.
    pub fn file(&self, at: usize) -> Option<&NodeFile> {
        self.files.of(self.chain.get(at)?)
    }

    /// Which file a node of the chain is. Where its own name doesn't lead to it any more, the header of the image above
    /// does: QEMU keeps it right.
    pub fn id(&self, directory: &ImageDirectory, at: usize) -> Option<FileId> {
        match self.file(at)? {
            NodeFile::Stale => {
                let above = self.id(directory, at.checked_sub(1)?);
                let backing = header(directory, &name_of(directory, above).ok()?).ok()?.backing?;
                directory.id(&backing).ok()?
            }
            file => file.id(),
        }
    }

    /// Whether QEMU can write to a node of the chain without opening another file by its name.
    pub fn may_become_writable(&self, at: usize) -> bool {
        self.file(at).is_some_and(NodeFile::may_become_writable)
    }
}

/// A stale node's file isn't certain by itself, but the node that was the disk at our own cut, and is right below our
/// own layer, holds our base. Its name alone says nothing: QEMU may make up the same one after a restart.
fn holds(node: &Node, above: Option<&Node>, files: &NodeFiles, state: &State) -> bool {
    let below_our_layer = above.is_some_and(|above| above.name == state.layer_node());
    match files.of(node) {
        Some(NodeFile::Stale) => below_our_layer && node.name == state.base_node,
        Some(file) => file.id() == Some(state.base),
        None => false,
    }
}

/// The name of a file in `directory`.
pub fn name_of(directory: &ImageDirectory, id: Option<FileId>) -> Result<String> {
    let unknown = || DriverError::NotNow("the layer above isn't a file of this directory".into());
    let id = id.ok_or_else(unknown)?;
    let mut names = directory.names()?.into_iter();
    names.find(|name| directory.holds(name, id).unwrap_or(false)).ok_or_else(unknown)
}
