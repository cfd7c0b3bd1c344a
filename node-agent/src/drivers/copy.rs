//! `copy`: a full copy of anything that QEMU has open, as it was at the cut.
//!
//! QEMU's backup job keeps the old content of each block for the copy before the guest overwrites it, so the copy is
//! of the instant of the transaction, whenever it is finished. If that write failed, QEMU would fail the *guest's*
//! write: so the whole size is reserved before the window, and a full disk is found there and not by the guest.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use freezeframe_qemu::BlockGraph;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::jobs::{self, Wanted};
use super::quantity::bytes;
use super::{Artifact, Cut, DiskFacts, DiskTask, DriverError, Env, Removal, Result, SnapshotDriver, Verdict};
use super::{qemu, qemu_img};
use crate::hypervisor::graph::{hand_over, take_back};
use crate::hypervisor::image::{FileId, ImageDirectory, ImageError, ImageRoots, trusted_directory};
use crate::hypervisor::qcow2::read_header;
use crate::hypervisor::{QMP_TIMEOUT, Vm};

const DIRECTORY: &str = "directory";
/// Bytes that the copy of one disk may write in a second; without it, as fast as it goes.
const SPEED: &str = "speed";
/// What a fully reserved qcow2 image needs beyond its virtual size, as a divisor: one cluster of map for 8192 of data.
const METADATA_SHARE: u64 = 1000;

/// The driver.
pub struct Copy;

#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    /// The class's directory.
    root: PathBuf,
    /// The copy's file, in `<root>/<namespace>.<vm>`.
    file: String,
    /// That file, once made.
    id: Option<FileId>,
    node_prefix: String,
}

impl State {
    fn unfinished(&self) -> String {
        format!("{}.partial", self.file)
    }

    fn node(&self) -> String {
        format!("{}-c", self.node_prefix)
    }

    fn file_node(&self) -> String {
        format!("{}-cf", self.node_prefix)
    }

    fn job(&self) -> String {
        format!("{}-copy", self.node_prefix)
    }

    /// The VM's directory below the class's, made if need be. VM and namespace are DNS names: no `/`, no `..`.
    fn directory(&self, task: &DiskTask) -> Result<ImageDirectory> {
        let root = trusted_directory(&self.root)?;
        Ok(root.subdirectory(&format!("{}.{}", task.vm.namespace, task.vm.name))?)
    }
}

#[async_trait]
impl SnapshotDriver for Copy {
    fn name(&self) -> &'static str {
        "copy"
    }

    fn check_parameters(&self, parameters: &BTreeMap<String, String>) -> Result<()> {
        for (key, value) in parameters {
            let why = match key.as_str() {
                DIRECTORY if Path::new(value).is_absolute() => continue,
                DIRECTORY => "must be an absolute path",
                SPEED if bytes(value).is_some() => continue,
                SPEED => "must be bytes a second, such as 100Mi",
                _ => "copy doesn't know this parameter; it knows `directory` and `speed`",
            };
            return Err(DriverError::Parameter { key: key.clone(), why: why.into() });
        }
        Ok(())
    }

    fn can_take(&self, disk: &DiskFacts, parameters: &BTreeMap<String, String>) -> Verdict {
        if !parameters.contains_key(DIRECTORY) {
            return Verdict::Unusable("needs class parameter `directory`".into());
        }
        if disk.encrypted {
            return Verdict::Unusable("the image is encrypted, and a copy would not be".into());
        }
        Verdict::Usable(format!("full copy of a {} image", disk.format))
    }

    fn plan(&self, task: &mut DiskTask, _: &BlockGraph, _: &ImageRoots) -> Result<()> {
        let root = task
            .parameters
            .get(DIRECTORY)
            .ok_or_else(|| DriverError::Parameter { key: DIRECTORY.into(), why: "is missing".into() })?;
        let state = State {
            root: root.into(),
            file: format!("{}-{}.qcow2", task.disk, task.id),
            id: None,
            node_prefix: format!("ff-{}-{}", task.id, task.index),
        };
        task.set_state(&state)
    }

    async fn prepare(&self, vm: &Vm, _: &ImageRoots, task: &mut DiskTask) -> Result<()> {
        let mut state: State = task.state()?;
        make_target(task, &mut state).await?;
        task.set_state(&state)?;
        open_target(vm, task, &state).await
    }

    fn cut(&self, group: &[&DiskTask], _: &ImageRoots) -> Result<Cut> {
        let action = |task: &&DiskTask| {
            let state: State = task.state()?;
            // QEMU takes 0 for no limit.
            let speed = task.parameters.get(SPEED).and_then(|speed| bytes(speed)).unwrap_or(0);
            Ok(json!({
                "type": "blockdev-backup",
                "data": {"job-id": state.job(), "device": task.node, "target": state.node(), "sync": "full",
                         "speed": speed, "auto-dismiss": false},
            }))
        };
        Ok(Cut { actions: group.iter().map(action).collect::<Result<_>>()?, ..Cut::default() })
    }

    async fn complete(&self, vm: &Vm, _: &ImageRoots, task: &mut DiskTask) -> Result<()> {
        let state: State = task.state()?;
        let directory = state.directory(task)?;
        if state.id.is_none() || directory.id(&state.file)? != state.id {
            jobs::wait(vm.qmp(), &state.job(), Wanted::Concluded).await?;
            jobs::dismiss_if_concluded(vm.qmp(), &state.job()).await?;
            close(vm, &state, state.id).await?;
            directory.sync_file(&state.unfinished())?;
            verify(&directory, &state.unfinished(), task)?;
            directory.rename_new(&state.unfinished(), &state.file)?;
        }
        task.artifact = Some(Artifact { handle: directory.join(&state.file), format: "qcow2".into() });
        Ok(())
    }

    async fn remove(&self, env: &Env<'_>, task: &mut DiskTask) -> Result<Removal> {
        if task.state.is_null() {
            return Ok(Removal::Done);
        }
        let state: State = task.state()?;
        let directory = state.directory(task)?;
        if let Some(vm) = env.vm {
            jobs::cancel(vm.qmp(), &state.job()).await?;
            // A crash in `prepare` may have left a file that isn't on record yet.
            close(vm, &state, state.id.or(directory.id(&state.unfinished())?)).await?;
        }
        directory.unlink(&state.unfinished())?;
        if state.id.is_some() && directory.id(&state.file)? == state.id {
            directory.unlink(&state.file)?;
        }
        Ok(Removal::Done)
    }

    fn is_instant(&self) -> bool {
        false
    }
}

async fn make_target(task: &DiskTask, state: &mut State) -> Result<()> {
    let directory = state.directory(task)?;
    let name = state.unfinished();
    if state.id.is_some() && state.id == directory.id(&name)? {
        return Ok(());
    }
    if directory.names()?.contains(&state.file) {
        return Err(DriverError::NotNow(format!("{} is there already", directory.join(&state.file).display())));
    }
    directory.unlink(&name)?;
    let (free, needed) = (directory.free_bytes()?, task.size + task.size / METADATA_SHARE);
    if free < needed {
        return Err(DriverError::NoSpace { path: directory.join(&name), needed, free });
    }
    let size = task.size.to_string();
    let arguments = ["create", "-q", "-f", "qcow2", "-o", "preallocation=falloc"];
    qemu_img(&arguments, &directory.join(&name), Some(&size)).await.map_err(|error| error.or_no_space(&directory))?;
    state.id = directory.id(&name)?;
    Ok(())
}

async fn open_target(vm: &Vm, task: &DiskTask, state: &State) -> Result<()> {
    let graph = vm.graph().await.map_err(qemu("read the block graph"))?;
    if graph.node(&state.node()).is_some() {
        return Ok(());
    }
    let file = hand_over(vm.qmp(), &state.directory(task)?, &state.unfinished()).await?;
    let file = json!({"driver": "file", "node-name": state.file_node(), "filename": file, "discard": "unmap"});
    vm.qmp().blockdev_add(&file, QMP_TIMEOUT).await.map_err(qemu("open the copy's file"))?;
    let node = json!({"driver": "qcow2", "node-name": state.node(), "file": state.file_node(),
                      "discard": "unmap", "detect-zeroes": "unmap"});
    vm.qmp().blockdev_add(&node, QMP_TIMEOUT).await.map_err(qemu("open the copy"))
}

/// Closes the target's nodes, which flushes them, and takes its descriptors back.
async fn close(vm: &Vm, state: &State, file: Option<FileId>) -> Result<()> {
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

fn verify(directory: &ImageDirectory, name: &str, task: &DiskTask) -> Result<()> {
    let path = directory.join(name);
    if directory.id(name)?.is_none() {
        return Err(ImageError::NotRegular(path).into());
    }
    let mut file = std::fs::File::from(directory.open(name, OFlags::RDONLY)?);
    let header = read_header(&mut file).map_err(|source| DriverError::Header { path, source })?;
    if header.virtual_size == task.size && header.backing.is_none() {
        return Ok(());
    }
    Err(DriverError::Verify(format!(
        "disk {}: the copy has {} bytes, not {}",
        task.disk, header.virtual_size, task.size
    )))
}
