//! `copy`: a full copy of anything that QEMU has open, as it was at the cut.
//!
//! QEMU's backup job keeps the old content of each block for the copy before the guest overwrites it, so the copy is
//! of the instant of the transaction, whenever it is finished. If that write failed, QEMU would fail the *guest's*
//! write: so the whole size is reserved before the window, and a full disk is found there and not by the guest
//! ([`target`]).

mod owned;
mod parameters;
mod target;
mod volume;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use freezeframe_qemu::BlockGraph;
use k8s_openapi::jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::jobs::{self, Wanted};
use super::lvm::target::{self as lvm_target, TARGET_GROUPS};
use super::lvm::volume::Volume;
use super::{Artifact, Cut, DiskFacts, DiskTask, DriverError, Env, Need, Removal, Result, SnapshotDriver, Verdict};
use crate::hypervisor::Vm;
use crate::hypervisor::image::{FileId, ImageDirectory, ImageError, ImageRoots, trusted_directory};
use parameters::{DIRECTORY, Format, OUTPUT_TEMPLATE, Parameters, TARGETS};

/// Bytes a second until the guest runs again: QEMU's answer to the cut waits while a job at full speed begins, which took
/// 35 ms a disk.
const CRAWL: u64 = 1;

/// The driver.
pub struct Copy;

#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    /// The class's directory.
    root: PathBuf,
    /// Directories below it that the class names; `<namespace>.<vm>` where it names none.
    #[serde(default)]
    beneath: Option<Vec<String>>,
    /// The copy's file there.
    file: String,
    /// Whether the user made it.
    #[serde(default)]
    owned: bool,
    /// The volume that the user made, instead of a file.
    #[serde(default)]
    volume: Option<Volume>,
    /// Its format.
    #[serde(default)]
    format: Format,
    /// That file, once made.
    id: Option<FileId>,
    node_prefix: String,
}

impl State {
    fn unfinished(&self) -> String {
        format!("{}.{}.partial", self.file, self.node_prefix)
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

    /// The directory of the file, made if need be. VM and namespace are DNS names, and what a class names was checked:
    /// no `/`, no `..`.
    fn directory(&self, task: &DiskTask, roots: &ImageRoots) -> Result<ImageDirectory> {
        let open = |above: ImageDirectory, name: &String| {
            if self.owned { above.existing_subdirectory(name) } else { above.subdirectory(name) }
        };
        Ok(self.path(task).iter().try_fold(self.open_root(roots)?, open)?)
    }

    fn path(&self, task: &DiskTask) -> Vec<String> {
        self.beneath.clone().unwrap_or_else(|| vec![format!("{}.{}", task.vm.namespace, task.vm.name)])
    }

    /// Where a class says what files are called, they must be where the agent's configuration allows images.
    fn open_root(&self, roots: &ImageRoots) -> std::result::Result<ImageDirectory, ImageError> {
        if self.beneath.is_some() { roots.directory(&self.root) } else { trusted_directory(&self.root) }
    }

    /// The same as it is; none where it isn't there, and with it nothing that was made. A root that isn't there may come
    /// back, such as a file system that isn't mounted; what is gone from below it was removed.
    fn existing_directory(&self, task: &DiskTask, roots: &ImageRoots) -> Result<Option<ImageDirectory>> {
        let open = |above: ImageDirectory, name: &String| above.existing_subdirectory(name);
        let root = match self.open_root(roots) {
            Err(error) if error.is_no_directory() && self.id.is_none() => return Ok(None),
            root => root?,
        };
        match self.path(task).iter().try_fold(root, open) {
            Err(error) if error.is_not_found() || error.is_no_directory() && self.id.is_none() => Ok(None),
            found => Ok(found.map(Some)?),
        }
    }
}

/// Where a copy goes.
struct Place {
    root: PathBuf,
    beneath: Option<Vec<String>>,
    file: String,
    owned: bool,
    volume: Option<Volume>,
}

fn place(parameters: &Parameters, task: &DiskTask, roots: &ImageRoots) -> Result<Place> {
    let refused = |key: &str, why: String| DriverError::Parameter { key: key.into(), why };
    let beneath_root = |key: &str, path: &Path| {
        let why = || format!("{} is not beneath an image root of this node's agent, as it must be", path.display());
        if roots.names(path) { Ok(()) } else { Err(refused(key, why())) }
    };
    if let Some(volume) = task.target.as_ref().and_then(|target| lvm_target::named(target, &parameters.target_groups)) {
        let volume = volume?;
        let (root, file) = (Path::new("/dev").join(volume.group()), volume.name().to_owned());
        beneath_root(TARGET_GROUPS, &root)?;
        return Ok(Place { root, beneath: None, file, owned: true, volume: Some(volume) });
    }
    if let Some(file) = task.target.clone() {
        let root =
            parameters.targets.clone().ok_or_else(|| refused(TARGETS, "is missing, and a disk has a target".into()))?;
        beneath_root(TARGETS, &root)?;
        if !super::naming::is_plain(&file) {
            return Err(DriverError::Target { path: file.into(), why: "is not a file's name".into() });
        }
        let beneath = Some(vec![task.vm.namespace.clone()]);
        return Ok(Place { root, beneath, file, owned: true, volume: None });
    }
    let root = parameters.directory.clone().ok_or_else(|| refused(DIRECTORY, "is missing".into()))?;
    let Some(template) = &parameters.template else {
        let file = format!("{}-{}.{}", task.disk, task.id, parameters.format.name());
        return Ok(Place { root, beneath: None, file, owned: false, volume: None });
    };
    beneath_root(DIRECTORY, &root)?;
    let (beneath, file) = template.fill(task, Timestamp::now()).map_err(|why| refused(OUTPUT_TEMPLATE, why))?;
    Ok(Place { root, beneath: Some(beneath), file, owned: false, volume: None })
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

    fn plan(&self, task: &mut DiskTask, _: &BlockGraph, roots: &ImageRoots) -> Result<()> {
        let parameters = Parameters::parse(&task.parameters)?;
        let Place { root, beneath, file, owned, volume } = place(&parameters, task, roots)?;
        let format = if volume.is_some() { Format::Raw } else { parameters.format };
        let state = State {
            root,
            beneath,
            file,
            owned,
            volume,
            format,
            id: None,
            node_prefix: format!("ff-{}-{}", task.id, task.index),
        };
        task.set_state(&state)
    }

    async fn prepare(&self, vm: &Vm, roots: &ImageRoots, task: &mut DiskTask) -> Result<()> {
        let mut state: State = task.state()?;
        if let Some(volume) = &state.volume {
            volume::lend(task, volume).await?;
            return volume::open(vm, &state, volume).await;
        }
        let directory = state.directory(task, roots)?;
        if state.owned {
            owned::lend(task, &mut state, &directory).await?;
        } else {
            target::make(task, &mut state, &directory).await?;
        }
        task.set_state(&state)?;
        target::open(vm, &directory, &state).await
    }

    fn cut(&self, group: &[&DiskTask], _: &ImageRoots) -> Result<Cut> {
        let action = |task: &&DiskTask| {
            let state: State = task.state()?;
            let compressed = Parameters::parse(&task.parameters)?.compressed;
            Ok(json!({
                "type": "blockdev-backup",
                "data": {"job-id": state.job(), "device": task.node, "target": state.node(), "sync": "full",
                         "speed": CRAWL, "compress": compressed, "auto-dismiss": false},
            }))
        };
        Ok(Cut { actions: group.iter().map(action).collect::<Result<_>>()?, ..Cut::default() })
    }

    async fn go_on(&self, vm: &Vm, task: &DiskTask) -> Result<()> {
        let state: State = task.state()?;
        jobs::set_speed(vm.qmp(), &state.job(), Parameters::parse(&task.parameters)?.speed).await
    }

    async fn complete(&self, vm: &Vm, roots: &ImageRoots, task: &mut DiskTask) -> Result<()> {
        let state: State = task.state()?;
        if let Some(volume) = &state.volume {
            jobs::wait(vm.qmp(), &state.job(), Wanted::Concluded).await?;
            task.artifact = Some(volume::finish(task, volume).await?);
            target::close(vm, &state, volume::id(volume)).await?;
            jobs::dismiss_if_concluded(vm.qmp(), &state.job()).await?;
            return Ok(());
        }
        let directory = state.directory(task, roots)?;
        if state.id.is_none() || directory.id(&state.file)? != state.id {
            jobs::wait(vm.qmp(), &state.job(), Wanted::Concluded).await?;
            // First: closing has QEMU's main loop, and with it the guest, wait for all that isn't on disk by then.
            target::sync(&directory, &state).await?;
            target::close(vm, &state, state.id).await?;
            target::settle(&directory, &state).await?;
            target::verify(&directory, &state, task)?;
            directory.rename_new(&state.unfinished(), &state.file)?;
        }
        // Last: until the file has its name, the job is all that says that the copy is whole.
        jobs::dismiss_if_concluded(vm.qmp(), &state.job()).await?;
        task.artifact = Some(Artifact { handle: directory.join(&state.file), format: state.format.name().into() });
        Ok(())
    }

    async fn remove(&self, env: &Env<'_>, task: &mut DiskTask) -> Result<Removal> {
        if task.state.is_null() {
            return Ok(Removal::Done);
        }
        let state: State = task.state()?;
        if let Some(volume) = &state.volume {
            if let Some(vm) = env.vm {
                jobs::cancel(vm.qmp(), &state.job()).await?;
                target::close(vm, &state, volume::id(volume)).await?;
            }
            return volume::give_back(task, volume).await;
        }
        let Some(directory) = state.existing_directory(task, env.roots)? else { return Ok(Removal::Done) };
        if let Some(vm) = env.vm {
            jobs::cancel(vm.qmp(), &state.job()).await?;
            // A crash in `prepare` may have left a file that isn't on record yet.
            target::close(vm, &state, state.id.or(directory.id(&state.unfinished())?)).await?;
        }
        if state.owned {
            return owned::give_back(&directory, &state).await;
        }
        directory.unlink(&state.unfinished())?;
        if state.id.is_some() && directory.id(&state.file)? == state.id {
            directory.unlink(&state.file)?;
        }
        Ok(Removal::Done)
    }

    fn directories(&self, task: &DiskTask) -> Vec<PathBuf> {
        // Until a file is on record the directories may have been as they are.
        let made = task.state().ok().filter(|state: &State| state.volume.is_none() && state.id.is_some());
        let Some(state) = made else { return vec![] };
        let directory = state.path(task).iter().fold(state.root.clone(), |above, name| above.join(name));
        vec![state.root, directory]
    }

    fn needs(&self, task: &DiskTask) -> Option<Need> {
        let state: State = task.state().ok().filter(|state: &State| state.volume.is_none())?;
        Some(Need { bytes: target::needed(state.format, task.size), directory: state.root })
    }

    fn grows_with_writes(&self) -> bool {
        false
    }

    fn why_no_target(&self, _: &DiskFacts, _: &BTreeMap<String, String>) -> Option<String> {
        None
    }

    fn is_instant(&self) -> bool {
        false
    }

    async fn progress(&self, vm: &Vm, task: &DiskTask) -> Result<Option<u8>> {
        let state: State = task.state()?;
        Ok(jobs::find(vm.qmp(), &state.job()).await?.as_ref().and_then(jobs::percent))
    }
}
