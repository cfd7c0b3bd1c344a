//! The block graph: which disks a VM has and which image layers are behind each.

mod answers;
mod links;

use std::collections::HashMap;
use std::time::Duration;

use serde_json::Value;

use crate::error::Result;
use crate::qmp::Qmp;

/// Drivers that pass data through: an overlay goes below them, or they would act on the base only.
const FILTERS: [&str; 12] = [
    "throttle",
    "copy-on-read",
    "copy-before-write",
    "compress",
    "preallocate",
    "blkdebug",
    "blklogwrites",
    "blkverify",
    "blkreplay",
    "replication",
    "mirror_top",
    "commit_top",
];

/// Far above any honest graph; they bound the work that a liar's graph, also one with cycles, can cause.
const MAX_LAYERS: usize = 1024;
const MAX_FILTERS: usize = 64;

/// Disks and nodes of one VM at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct BlockGraph {
    disks: Vec<Disk>,
    nodes: HashMap<String, Node>,
}

/// A device, or a named drive without a device, and what is inserted in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of QEMU's own, independent of the others")]
pub struct Disk {
    /// The device's id or object path; empty if no device uses the drive.
    pub qdev: String,
    /// The `-drive` id; empty for disks made by `-blockdev`.
    pub device: String,
    /// The node that is inserted; none if the drive is empty.
    pub root: Option<String>,
    /// The first node at or below `root` that is not a filter: what a snapshot acts on.
    pub top: Option<String>,
    /// Whether nothing is inserted.
    pub empty: bool,
    /// Whether the inserted node is read-only.
    pub read_only: bool,
    /// Whether the guest can eject it.
    pub removable: bool,
    /// Whether the data is encrypted by QEMU.
    pub encrypted: bool,
    /// Such as `ok`, `failed` or `nospace`; none where QEMU does not keep it.
    pub io_status: Option<String>,
}

/// A node of the graph.
#[derive(Debug, Clone, Default, PartialEq)]
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of QEMU's own, independent of the others")]
pub struct Node {
    /// Unique in this VM.
    pub name: String,
    /// Such as `qcow2`, `raw`, `file` or `throttle`.
    pub driver: String,
    /// QEMU's "file" string: a name, or `json:{...}` where no name says it.
    pub file: String,
    /// Whether it is open read-only now.
    pub read_only: bool,
    /// What the guest sees, in bytes.
    pub virtual_size: u64,
    /// What the image takes on its file system, in bytes; 0 where QEMU doesn't say.
    pub actual_size: u64,
    /// The node of the backing image.
    pub backing: Option<String>,
    /// Whether the data is in another file than the image, so that `file_child` is not the image's own.
    pub external_data: bool,
    /// The node that data comes from: the protocol node of a format, the child of a filter.
    pub file_child: Option<String>,
    /// Whether it decrypts.
    pub encrypted: bool,
    /// How it is cached.
    pub cache: Cache,
    /// `off`, `on` or `unmap`.
    pub detect_zeroes: String,
    /// Its dirty bitmaps, as QEMU describes them.
    pub dirty_bitmaps: Vec<Value>,
    /// Whether QEMU made the name up (`#block123`): it changes at every start, and the node can't be reopened.
    pub auto_named: bool,
    /// How many backing images are below it, filters left out.
    pub backing_depth: u64,
}

/// A node's cache mode.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Cache {
    /// Whether writes are acknowledged before they are on the medium.
    pub writeback: bool,
    /// Whether the host's page cache is bypassed.
    pub direct: bool,
    /// Whether flushes are ignored.
    pub no_flush: bool,
}

impl BlockGraph {
    /// Reads the graph; each of the three to five questions may take `timeout`.
    ///
    /// The answers are not of one instant: read it while nobody changes the graph.
    pub async fn read(qmp: &Qmp, timeout: Duration) -> Result<Self> {
        let drives = answers::drives(qmp, timeout).await?;
        let mut nodes = answers::nodes(qmp, timeout).await?;
        links::join(&mut nodes, qmp, timeout).await?;
        let mut graph = Self { disks: Vec::new(), nodes };
        graph.disks = drives.into_iter().map(|disk| graph.with_top(disk)).collect();
        graph.count_layers();
        Ok(graph)
    }

    /// QEMU's own count is 0 for all nodes in a flat listing (seen on 7.2).
    fn count_layers(&mut self) {
        let depths = self.nodes.keys().map(|name| (name.clone(), self.chain(name).len().saturating_sub(1) as u64));
        for (name, depth) in depths.collect::<Vec<_>>() {
            if let Some(node) = self.nodes.get_mut(&name) {
                node.backing_depth = depth;
            }
        }
    }

    fn with_top(&self, mut disk: Disk) -> Disk {
        disk.top = disk.root.as_deref().and_then(|root| self.below_filters(root)).map(|node| node.name.clone());
        disk
    }

    /// All disks, in QEMU's order; also empty and read-only ones, and drives without a device.
    #[must_use]
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// A node by its name.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    /// All nodes, in no order.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// The image layers from this node down: each with the next one as its backing image, filters left out;
    /// at most 1024.
    #[must_use]
    pub fn chain(&self, node: &str) -> Vec<&Node> {
        let mut layers: Vec<&Node> = Vec::new();
        let mut next = self.below_filters(node);
        while let Some(layer) = next {
            if layers.len() == MAX_LAYERS {
                break;
            }
            layers.push(layer);
            next = layer.backing.as_deref().and_then(|backing| self.below_filters(backing));
        }
        layers
    }

    /// This node, or the first one below it that is not a filter.
    fn below_filters(&self, name: &str) -> Option<&Node> {
        let mut node = self.node(name)?;
        for _ in 0..MAX_FILTERS {
            if !node.is_filter() {
                return Some(node);
            }
            node = self.node(node.file_child.as_deref()?)?;
        }
        None
    }
}

impl Node {
    /// Whether it passes data through instead of holding any.
    #[must_use]
    pub fn is_filter(&self) -> bool {
        FILTERS.contains(&self.driver.as_str())
    }
}

impl Disk {
    /// What users call it: the `-device` id, else the `-drive` id, else the last useful part of the device's path,
    /// else the node's name.
    #[must_use]
    pub fn name(&self) -> String {
        let named = self.device_id().or_else(|| Some(self.device.as_str()).filter(|name| !name.is_empty()));
        let named = named.or_else(|| self.last_path_part()).or(self.root.as_deref());
        named.unwrap_or_default().to_owned()
    }

    fn device_id(&self) -> Option<&str> {
        match self.qdev.strip_prefix("/machine/peripheral/") {
            Some(rest) => rest.split('/').next(),
            None => Some(self.qdev.as_str()).filter(|id| !id.starts_with('/')),
        }
        .filter(|id| !id.is_empty())
    }

    fn last_path_part(&self) -> Option<&str> {
        // virtio devices hang their backend below themselves, under the same name for all of them.
        self.qdev.rsplit('/').find(|part| !part.is_empty() && *part != "virtio-backend")
    }
}

#[cfg(test)]
mod tests;
