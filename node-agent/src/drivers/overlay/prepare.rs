//! Before and after the cut: the new layer, made and opened; the base, held by descriptor and verified.

use freezeframe_qemu::{BlockGraph, Node};
use rustix::fs::OFlags;
use serde_json::{Value, json};
use std::fs::File;
use std::path::Path;

use super::follow;
use super::lent;
use super::state::State;
use crate::drivers::{DiskTask, DriverError, Result, qemu};
use crate::hypervisor::device::number_of;
use crate::hypervisor::graph::{hand_over, is_by_descriptor, renew, take_back_unused};
use crate::hypervisor::image::{ImageDirectory, ImageRoots};
use crate::hypervisor::qcow2::{Header, read_header};
use crate::hypervisor::{QMP_TIMEOUT, Vm};

/// Bytes that a new layer may need before its first cluster of data.
pub const LAYER_METADATA: u64 = 4 << 20;

/// Makes the new layer's file, unless it is there.
pub async fn make_layer(roots: &ImageRoots, task: &DiskTask, state: &mut State) -> Result<()> {
    let directory = roots.directory(&state.directory)?;
    if state.overlay.is_some() && state.overlay == directory.id(state.new_file())? {
        return Ok(());
    }
    let free = directory.free_bytes()?;
    if free < LAYER_METADATA && !state.is_on_device() {
        return Err(DriverError::NoSpace { path: directory.join(state.new_file()), needed: LAYER_METADATA, free });
    }
    if state.lent {
        return lent::lend(task, &directory, state).await;
    }
    let unfinished = state.unfinished();
    directory.unlink(&unfinished)?;
    // Where names change hands, it backs onto its own name: after the exchange that is the base's. qemu-img refuses an image that names itself,
    // so it is made under another name first; `-u` keeps it from opening what isn't there yet.
    let path = directory.join(&unfinished);
    let size = task.size.to_string();
    let arguments = ["create", "-q", "-f", "qcow2", "-u", "-F", &state.format, "-b", &state.layer];
    crate::drivers::qemu_img(&arguments, &path, Some(&size)).await.map_err(|error| error.or_no_space(&directory))?;
    let like = if state.keeps_name() { follow::real_name(&state.layer)? } else { state.disk_file.clone() };
    directory.copy_ownership(&unfinished, &directory, &like)?;
    directory.sync_file(&unfinished)?;
    directory.rename_new(&unfinished, state.new_file())?;
    state.overlay = directory.id(state.new_file())?;
    Ok(())
}

/// Opens the new layer in QEMU, with no backing node yet: the transaction gives it one.
pub async fn open_layer(vm: &Vm, roots: &ImageRoots, task: &DiskTask, state: &State) -> Result<()> {
    let graph = vm.graph().await.map_err(qemu("read the block graph"))?;
    if graph.node(&state.layer_node()).is_some() {
        return Ok(());
    }
    let base = graph.node(&state.base_node);
    let base = base.ok_or_else(|| DriverError::Verify(format!("node {} is gone", state.base_node)))?;
    if base.virtual_size != task.size {
        return Err(DriverError::NotNow(format!("disk {} is being resized", task.disk)));
    }
    let directory = roots.directory(&state.directory)?;
    // A device by its name, which is its for good, and by which QEMU must be able to open it at its next start.
    let file = if state.is_on_device() {
        state.disk_file.clone()
    } else {
        hand_over(vm.qmp(), &directory, state.new_file()).await?
    };
    let file_node = file_options(&state.layer_file_node(), &file, base, false);
    vm.qmp().blockdev_add(&file_node, QMP_TIMEOUT).await.map_err(qemu("open the new layer's file"))?;
    let layer = json!({
        "driver": "qcow2",
        "node-name": state.layer_node(),
        "file": state.layer_file_node(),
        "backing": null,
        "cache": cache_options(base),
        "detect-zeroes": base.detect_zeroes,
        "discard": "unmap",
    });
    vm.qmp().blockdev_add(&layer, QMP_TIMEOUT).await.map_err(qemu("open the new layer"))
}

fn file_options(node: &str, file: &str, like: &Node, auto_read_only: bool) -> Value {
    json!({
        "driver": if number_of(Path::new(file)).is_ok() { "host_device" } else { "file" },
        "node-name": node,
        "filename": file,
        "cache": cache_options(like),
        "auto-read-only": auto_read_only,
        "discard": "unmap",
    })
}

/// Options of a node with the backing node that it has; some formats don't know any.
pub fn with_backing(node: &Node, mut options: Value) -> Value {
    if node.driver != "raw" {
        options["backing"] = json!(node.backing);
    }
    options
}

pub fn cache_options(like: &Node) -> Value {
    json!({"direct": like.cache.direct, "no-flush": like.cache.no_flush})
}

/// Points the base's format node at the base's file by descriptor, so that it doesn't matter any more that its name
/// belongs to the new layer now. A node that QEMU named itself can't be repointed; it is left, and merging knows. A base
/// that keeps its name needs none of this.
pub async fn pin_base(vm: &Vm, roots: &ImageRoots, state: &State) -> Result<()> {
    if state.keeps_name() {
        return Ok(());
    }
    let graph = vm.graph().await.map_err(qemu("read the block graph"))?;
    // After a restart of the VM the same name may be another node's, and that node the disk.
    let layer = graph.node(&state.layer_node());
    let below_layer = layer.and_then(|layer| layer.backing.as_ref()).filter(|below| **below == state.base_node);
    let Some(base) = below_layer.and_then(|below| graph.node(below)) else { return Ok(()) };
    let file = base.file_child.as_ref().and_then(|file| graph.node(file));
    if file.is_some_and(is_by_descriptor) {
        // Pinned just now, or by an earlier snapshot that is gone.
        renew(vm.qmp(), &roots.directory(&state.directory)?, &state.layer).await?;
        return Ok(());
    }
    if base.auto_named {
        return Ok(());
    }
    close_unfinished(vm, state).await?;
    pin(vm, roots, base, state).await
}

/// Closes what an interrupted [`pin`] or [`replace_base`] left without a user, and returns the graph without it.
pub async fn close_unfinished(vm: &Vm, state: &State) -> Result<BlockGraph> {
    let graph = vm.graph().await.map_err(qemu("read the block graph"))?;
    for node in [state.keeping_node(), state.base_node_by_descriptor(), state.base_file_node()] {
        if graph.node(&node).is_some() {
            forget_node(vm, Some(&node)).await;
        }
    }
    let graph = vm.graph().await.map_err(qemu("read the block graph"))?;
    take_back_unused(vm.qmp(), &graph).await.map_err(qemu("take back descriptors that no node uses"))?;
    Ok(graph)
}

/// Reopens the base's format node, read-only, on the snapshot's file by descriptor.
pub async fn pin(vm: &Vm, roots: &ImageRoots, node: &Node, state: &State) -> Result<()> {
    open_base_file(vm, roots, node, state).await?;
    let options = with_backing(
        node,
        json!({
            "driver": node.driver,
            "node-name": node.name,
            "file": state.base_file_node(),
            "read-only": true,
            "cache": cache_options(node),
            "detect-zeroes": node.detect_zeroes,
        }),
    );
    reopen(vm, state, options, node.file_child.as_deref()).await
}

async fn open_base_file(vm: &Vm, roots: &ImageRoots, like: &Node, state: &State) -> Result<()> {
    let directory = roots.directory(&state.directory)?;
    let file = if state.keeps_name() {
        // Of a set, QEMU would find a raw image locked by the descriptor that it used before, and abort.
        directory.join(&state.layer).display().to_string()
    } else {
        hand_over(vm.qmp(), &directory, &state.layer).await?
    };
    let options = file_options(&state.base_file_node(), &file, like, true);
    vm.qmp().blockdev_add(&options, QMP_TIMEOUT).await.map_err(qemu("open the base by descriptor"))
}

/// Puts a node of ours in the place of a base that QEMU opened by itself below `top`.
pub async fn replace_base(vm: &Vm, roots: &ImageRoots, top: &Node, base: &Node, state: &State) -> Result<()> {
    open_base_file(vm, roots, base, state).await?;
    let node = with_backing(
        base,
        json!({
            "driver": base.driver,
            "node-name": state.base_node_by_descriptor(),
            "file": state.base_file_node(),
            "read-only": true,
            "cache": cache_options(base),
            "detect-zeroes": top.detect_zeroes,
            "discard": "unmap",
        }),
    );
    vm.qmp().blockdev_add(&node, QMP_TIMEOUT).await.map_err(qemu("open the base by descriptor"))?;
    let options = json!({
        "driver": top.driver,
        "node-name": top.name,
        "file": top.file_child,
        "backing": state.base_node_by_descriptor(),
        "read-only": top.read_only,
        "cache": cache_options(top),
        "detect-zeroes": top.detect_zeroes,
        "discard": "unmap",
    });
    reopen(vm, state, options, Some(&base.name)).await
}

/// Reopens a node that thereby lets go of `old`.
///
/// If the reopening were to free a node on an iothread, QEMU 7.2 would unlock what it hadn't locked, and abort: so
/// another node keeps it until it is closed the ordinary way.
async fn reopen(vm: &Vm, state: &State, options: Value, old: Option<&str>) -> Result<()> {
    let keep = json!({"driver": "raw", "node-name": state.keeping_node(), "file": old, "read-only": true});
    if old.is_some() {
        vm.qmp().blockdev_add(&keep, QMP_TIMEOUT).await.map_err(qemu("keep the base's old node"))?;
    }
    let reopened = vm.qmp().blockdev_reopen(&[options], QMP_TIMEOUT).await;
    if old.is_some() {
        forget_node(vm, Some(&state.keeping_node())).await;
    }
    reopened.map_err(qemu("hold the base by descriptor"))?;
    forget_node(vm, old).await;
    Ok(())
}

/// Closes a node that nothing uses any more. One that QEMU opened itself is gone already, and one that is still used
/// stays: neither is an error.
pub async fn forget_node(vm: &Vm, node: Option<&str>) {
    let Some(node) = node else { return };
    if let Err(error) = vm.qmp().blockdev_del(node, QMP_TIMEOUT).await {
        tracing::debug!(node, %error, "node was not closed");
    }
}

/// Checks what the cut left behind: names, headers and the graph all say the same.
pub async fn verify(vm: &Vm, roots: &ImageRoots, task: &DiskTask, state: &State) -> Result<()> {
    let directory = roots.directory(&state.directory)?;
    let wrong = |what: &str| Err(DriverError::Verify(format!("disk {}: {what}", task.disk)));
    if state.overlay.is_none() || directory.id(&state.disk_file)? != state.overlay {
        return wrong("the new layer doesn't have the disk's name");
    }
    if !directory.holds(&state.layer, state.base)? {
        return wrong("the snapshot's name doesn't lead to the former disk");
    }
    let header = header(&directory, &state.disk_file)?;
    if header.backing.as_deref() != Some(state.layer.as_str()) || header.virtual_size != task.size {
        return wrong("the new layer's header doesn't name the snapshot");
    }
    let graph = vm.graph().await.map_err(qemu("read the block graph"))?;
    match graph.node(&state.layer_node()) {
        // The VM was restarted since the cut: names and headers are all that it went by.
        None => Ok(()),
        Some(layer) if layer.backing.as_ref() == Some(&state.base_node) => Ok(()),
        Some(_) => wrong("QEMU doesn't have the new layer on top of the snapshot"),
    }
}

/// The header of an image in `directory`.
pub fn header(directory: &ImageDirectory, name: &str) -> Result<Header> {
    let mut file = File::from(directory.open(name, OFlags::RDONLY)?);
    read_header(&mut file).map_err(|source| DriverError::Header { path: directory.join(name), source })
}
