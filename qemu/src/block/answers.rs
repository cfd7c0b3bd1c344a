//! QEMU's own shape of disks and nodes, turned into ours.

use std::collections::HashMap;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Cache, Disk, Node};
use crate::error::{Error, Result};
use crate::qmp::Qmp;

/// Two hundred disks with twenty layers each; with the limit on a chain's length it bounds the work on a graph.
const MAX_NODES: usize = 8192;

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct RawDrive {
    #[serde(default)]
    device: String,
    #[serde(default)]
    qdev: Option<String>,
    #[serde(default)]
    removable: bool,
    #[serde(default)]
    io_status: Option<String>,
    #[serde(default)]
    inserted: Option<Inserted>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Inserted {
    #[serde(default)]
    node_name: Option<String>,
    #[serde(default)]
    ro: bool,
    #[serde(default)]
    encrypted: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct RawNode {
    #[serde(default)]
    node_name: Option<String>,
    #[serde(default)]
    drv: String,
    #[serde(default)]
    file: String,
    #[serde(default)]
    ro: bool,
    #[serde(default)]
    encrypted: bool,
    #[serde(default)]
    cache: Cache,
    #[serde(default, rename = "detect_zeroes")]
    detect_zeroes: String,
    #[serde(default)]
    image: Image,
    #[serde(default)]
    dirty_bitmaps: Vec<Value>,
    #[serde(default)]
    children: Vec<Child>,
}

#[derive(Default, Deserialize)]
struct Image {
    #[serde(default, rename = "virtual-size")]
    virtual_size: u64,
    #[serde(default, rename = "actual-size")]
    actual_size: u64,
    #[serde(default, rename = "format-specific")]
    format_specific: Value,
}

impl Image {
    fn has_external_data(&self) -> bool {
        self.format_specific.pointer("/data/data-file").is_some()
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Child {
    child: String,
    node_name: String,
}

pub(super) async fn drives(qmp: &Qmp, timeout: Duration) -> Result<Vec<Disk>> {
    let drives: Vec<RawDrive> = qmp.execute("query-block", (), timeout).await?;
    Ok(drives.into_iter().map(Disk::from).collect())
}

pub(super) async fn nodes(qmp: &Qmp, timeout: Duration) -> Result<HashMap<String, Node>> {
    let nodes: Vec<RawNode> = qmp.execute("query-named-block-nodes", json!({ "flat": true }), timeout).await?;
    if nodes.len() > MAX_NODES {
        return Err(Error::protocol(format!("its block graph has {} nodes, more than {MAX_NODES}", nodes.len())));
    }
    Ok(nodes.into_iter().filter_map(named).collect())
}

fn named(raw: RawNode) -> Option<(String, Node)> {
    let name = raw.node_name.clone()?;
    Some((name, raw.into()))
}

impl From<RawDrive> for Disk {
    fn from(raw: RawDrive) -> Self {
        let inserted = raw.inserted.as_ref();
        Self {
            qdev: raw.qdev.unwrap_or_default(),
            device: raw.device,
            empty: inserted.is_none(),
            read_only: inserted.is_some_and(|inserted| inserted.ro),
            encrypted: inserted.is_some_and(|inserted| inserted.encrypted),
            root: raw.inserted.and_then(|inserted| inserted.node_name),
            top: None,
            removable: raw.removable,
            io_status: raw.io_status,
        }
    }
}

impl From<RawNode> for Node {
    fn from(raw: RawNode) -> Self {
        let name = raw.node_name.unwrap_or_default();
        let mut node = Self {
            auto_named: name.starts_with('#'),
            name,
            driver: raw.drv,
            file: raw.file,
            read_only: raw.ro,
            virtual_size: raw.image.virtual_size,
            actual_size: raw.image.actual_size,
            external_data: raw.image.has_external_data(),
            backing: None,
            file_child: None,
            encrypted: raw.encrypted,
            cache: raw.cache,
            detect_zeroes: raw.detect_zeroes,
            dirty_bitmaps: raw.dirty_bitmaps,
            backing_depth: 0,
        };
        for child in raw.children {
            node.link(&child.child, child.node_name);
        }
        node
    }
}
