//! The file that a copy goes to: made with all its space reserved, opened in QEMU, closed, checked.

use std::fs::File;

use rustix::fs::{FallocateFlags, OFlags};
use serde_json::json;

use super::State;
use super::parameters::{Format, Parameters};
use crate::drivers::{DiskTask, DriverError, Result, qemu, qemu_img};
use crate::hypervisor::graph::{hand_over, take_back};
use crate::hypervisor::image::{FileId, ImageDirectory, ImageError};
use crate::hypervisor::qcow2::read_header;
use crate::hypervisor::{QMP_TIMEOUT, Vm};

/// What a full qcow2 image needs beyond its virtual size, as a divisor: one cluster of map for 8192 of data.
const METADATA_SHARE: u64 = 1000;
/// And for the smallest of images.
const LEAST_METADATA: u64 = 1 << 20;

/// Makes the file, unless it is there.
pub async fn make(task: &DiskTask, state: &mut State, directory: &ImageDirectory) -> Result<()> {
    let name = state.unfinished();
    if state.id.is_some() && state.id == directory.id(&name)? {
        return Ok(());
    }
    if directory.names()?.contains(&state.file) {
        return Err(DriverError::NotNow(format!("{} is there already", directory.join(&state.file).display())));
    }
    directory.unlink(&name)?;
    let (free, needed) = (directory.free_bytes()?, needed(state.format, task.size));
    if free < needed {
        return Err(DriverError::NoSpace { path: directory.join(&name), needed, free });
    }
    let compressed = Parameters::parse(&task.parameters)?.compressed;
    // QEMU can't compress into a cluster that is mapped already: there the space is set apart beyond the file's end.
    let preallocation = if compressed { "preallocation=off" } else { "preallocation=falloc" };
    let arguments = ["create", "-q", "-f", state.format.name(), "-o", preallocation];
    let size = task.size.to_string();
    qemu_img(&arguments, &directory.join(&name), Some(&size)).await.map_err(|error| error.or_no_space(directory))?;
    if compressed {
        reserve(directory, &name, needed)?;
    }
    state.id = directory.id(&name)?;
    Ok(())
}

/// Bytes that a copy may take at the most.
pub fn needed(format: Format, size: u64) -> u64 {
    match format {
        Format::Qcow2 => size + (size / METADATA_SHARE).max(LEAST_METADATA),
        Format::Raw => size,
    }
}

/// Sets space apart beyond what a file has, up to a number of bytes.
pub fn reserve(directory: &ImageDirectory, name: &str, bytes: u64) -> Result<()> {
    let file = directory.open(name, OFlags::RDWR)?;
    let reserved = rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 0, bytes);
    let io = |source: rustix::io::Errno| ImageError::Io {
        doing: "reserve space for",
        path: directory.join(name),
        source: source.into(),
    };
    Ok(reserved.map_err(io)?)
}

/// Opens the file in QEMU, unless it is open.
pub async fn open(vm: &Vm, directory: &ImageDirectory, state: &State) -> Result<()> {
    let graph = vm.graph().await.map_err(qemu("read the block graph"))?;
    if graph.node(&state.node()).is_some() {
        return Ok(());
    }
    let file = hand_over(vm.qmp(), directory, &state.unfinished()).await?;
    let file = json!({"driver": "file", "node-name": state.file_node(), "filename": file, "discard": "unmap"});
    vm.qmp().blockdev_add(&file, QMP_TIMEOUT).await.map_err(qemu("open the copy's file"))?;
    let node = json!({"driver": state.format.name(), "node-name": state.node(), "file": state.file_node(),
                      "discard": "unmap", "detect-zeroes": "unmap"});
    vm.qmp().blockdev_add(&node, QMP_TIMEOUT).await.map_err(qemu("open the copy"))
}

/// Closes the nodes, which flushes them, and takes their descriptors back.
pub async fn close(vm: &Vm, state: &State, file: Option<FileId>) -> Result<()> {
    let graph = vm.graph().await.map_err(qemu("read the block graph"))?;
    for node in [state.node(), state.file_node()] {
        if graph.node(&node).is_some() {
            vm.qmp().blockdev_del(&node, QMP_TIMEOUT).await.map_err(qemu("close the copy"))?;
        }
    }
    match file {
        Some(id) => take_back(vm.qmp(), id).await.map_err(qemu("take the copy's descriptors back")),
        None => Ok(()),
    }
}

/// Gives back what was set apart beyond the file's end, and makes the file durable.
pub async fn settle(directory: &ImageDirectory, state: &State) -> Result<()> {
    let path = directory.join(&state.unfinished());
    let io = |source| ImageError::Io { doing: "give space back of", path: path.clone(), source };
    let file = File::from(directory.open(&state.unfinished(), OFlags::RDWR)?);
    let length = file.metadata().map_err(io)?.len();
    file.set_len(length).map_err(io)?;
    sync(directory, state).await
}

/// Makes the file durable, on a thread that may wait for as long as the storage needs.
pub async fn sync(directory: &ImageDirectory, state: &State) -> Result<()> {
    let (name, path) = (state.unfinished(), directory.join(&state.unfinished()));
    let file = File::from(directory.open(&name, OFlags::RDONLY)?);
    let synced = tokio::task::spawn_blocking(move || file.sync_all()).await;
    let io = |source| ImageError::Io { doing: "sync", path, source };
    Ok(synced.unwrap_or_else(|died| Err(died.into())).map_err(io)?)
}

/// The copy is as large as the disk and stands alone.
pub fn verify(directory: &ImageDirectory, state: &State, task: &DiskTask) -> Result<()> {
    let (name, path) = (state.unfinished(), directory.join(&state.unfinished()));
    if directory.id(&name)?.is_none() {
        return Err(ImageError::NotRegular(path).into());
    }
    let mut file = File::from(directory.open(&name, OFlags::RDONLY)?);
    let (size, backing) = match state.format {
        Format::Raw => {
            let io = |source| ImageError::Io { doing: "examine", path: path.clone(), source };
            (file.metadata().map_err(io)?.len(), None)
        }
        Format::Qcow2 => {
            let header = read_header(&mut file).map_err(|source| DriverError::Header { path, source })?;
            (header.virtual_size, header.backing)
        }
    };
    if size == task.size && backing.is_none() {
        return Ok(());
    }
    Err(DriverError::Verify(format!("disk {}: the copy has {size} bytes, not {}", task.disk, task.size)))
}
