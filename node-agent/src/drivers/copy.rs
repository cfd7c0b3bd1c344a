//! `copy`: a full copy of anything that QEMU has open, as it was at the cut.
//!
//! QEMU's backup job keeps the old content of each block for the copy before the guest overwrites it, so the copy is
//! of the instant of the transaction, whenever it is finished. If that write failed, QEMU would fail the *guest's*
//! write: so the whole size is reserved before the window, and a full disk is found there and not by the guest
//! ([`target`]).

mod parameters;
mod target;

use std::collections::BTreeMap;
use std::path::PathBuf;

use async_trait::async_trait;
use freezeframe_qemu::BlockGraph;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::jobs::{self, Wanted};
use super::{Artifact, Cut, DiskFacts, DiskTask, DriverError, Env, Need, Removal, Result, SnapshotDriver, Verdict};
use crate::hypervisor::Vm;
use crate::hypervisor::image::{FileId, ImageDirectory, ImageRoots, trusted_directory};
use parameters::{Format, Parameters};

/// The driver.
pub struct Copy;

#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    /// The class's directory.
    root: PathBuf,
    /// The copy's file, in `<root>/<namespace>.<vm>`.
    file: String,
    /// Its format.
    #[serde(default)]
    format: Format,
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
        Ok(trusted_directory(&self.root)?.subdirectory(&directory_name(task))?)
    }

    /// The same as it is; none where it isn't there and nothing was made that could be in it.
    fn existing_directory(&self, task: &DiskTask) -> Result<Option<ImageDirectory>> {
        let found = trusted_directory(&self.root).and_then(|root| root.existing_subdirectory(&directory_name(task)));
        match found {
            Err(error) if error.is_not_found() && self.id.is_none() => Ok(None),
            found => Ok(found.map(Some)?),
        }
    }
}

fn directory_name(task: &DiskTask) -> String {
    format!("{}.{}", task.vm.namespace, task.vm.name)
}

#[async_trait]
impl SnapshotDriver for Copy {
    fn name(&self) -> &'static str {
        "copy"
    }

    fn check_parameters(&self, parameters: &BTreeMap<String, String>) -> Result<()> {
        Parameters::parse(parameters).map(drop)
    }

    fn can_take(&self, disk: &DiskFacts, parameters: &BTreeMap<String, String>) -> Verdict {
        if Parameters::parse(parameters).is_ok_and(|parameters| parameters.directory.is_none()) {
            return Verdict::Unusable("needs a class that says where copies go (parameter `directory`)".into());
        }
        if disk.encrypted {
            return Verdict::Unusable("the image is encrypted, and a copy would not be".into());
        }
        Verdict::Usable(format!("full copy of a {} image", disk.format))
    }

    fn plan(&self, task: &mut DiskTask, _: &BlockGraph, _: &ImageRoots) -> Result<()> {
        let parameters = Parameters::parse(&task.parameters)?;
        let missing = || DriverError::Parameter { key: "directory".into(), why: "is missing".into() };
        let state = State {
            root: parameters.directory.ok_or_else(missing)?,
            file: format!("{}-{}.{}", task.disk, task.id, parameters.format.name()),
            format: parameters.format,
            id: None,
            node_prefix: format!("ff-{}-{}", task.id, task.index),
        };
        task.set_state(&state)
    }

    async fn prepare(&self, vm: &Vm, _: &ImageRoots, task: &mut DiskTask) -> Result<()> {
        let mut state: State = task.state()?;
        target::make(task, &mut state).await?;
        task.set_state(&state)?;
        target::open(vm, task, &state).await
    }

    fn cut(&self, group: &[&DiskTask], _: &ImageRoots) -> Result<Cut> {
        let action = |task: &&DiskTask| {
            let state: State = task.state()?;
            let Parameters { speed, compressed, .. } = Parameters::parse(&task.parameters)?;
            Ok(json!({
                "type": "blockdev-backup",
                "data": {"job-id": state.job(), "device": task.node, "target": state.node(), "sync": "full",
                         "speed": speed, "compress": compressed, "auto-dismiss": false},
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
            target::close(vm, &state, state.id).await?;
            target::settle(&directory, &state)?;
            target::verify(&directory, &state, task)?;
            directory.rename_new(&state.unfinished(), &state.file)?;
        }
        task.artifact = Some(Artifact { handle: directory.join(&state.file), format: state.format.name().into() });
        Ok(())
    }

    async fn remove(&self, env: &Env<'_>, task: &mut DiskTask) -> Result<Removal> {
        if task.state.is_null() {
            return Ok(Removal::Done);
        }
        let state: State = task.state()?;
        let Some(directory) = state.existing_directory(task)? else { return Ok(Removal::Done) };
        if let Some(vm) = env.vm {
            jobs::cancel(vm.qmp(), &state.job()).await?;
            // A crash in `prepare` may have left a file that isn't on record yet.
            target::close(vm, &state, state.id.or(directory.id(&state.unfinished())?)).await?;
        }
        directory.unlink(&state.unfinished())?;
        if state.id.is_some() && directory.id(&state.file)? == state.id {
            directory.unlink(&state.file)?;
        }
        Ok(Removal::Done)
    }

    fn needs(&self, task: &DiskTask) -> Option<Need> {
        let state: State = task.state().ok()?;
        Some(Need { bytes: target::needed(state.format, task.size), directory: state.root })
    }

    fn is_instant(&self) -> bool {
        false
    }

    async fn progress(&self, vm: &Vm, task: &DiskTask) -> Result<Option<u8>> {
        let state: State = task.state()?;
        Ok(jobs::find(vm.qmp(), &state.job()).await?.as_ref().and_then(jobs::percent))
    }
}
