//! `loopcopy`: the smallest driver there can be. It copies a raw file while the VM is paused.
//!
//! It shows what a new driver costs: this file, one line in [`crate::cases::drivers`] (the product's own have theirs
//! in `drivers::registry`), and one line in [`crate::cases::NEEDS`]. It is no use outside tests: the guest waits for
//! the whole copy.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use freezeframe_node_agent::drivers::{
    Artifact, Cut, DiskFacts, DiskTask, DriverError, Env, HostCut, Removal, Result, SnapshotDriver, Verdict,
};
use freezeframe_node_agent::hypervisor::Vm;
use freezeframe_node_agent::hypervisor::image::{ImageError, ImageRoots};
use freezeframe_qemu::BlockGraph;

/// The driver, and what else its cut does before it copies.
pub struct Loopcopy(pub fn());

impl Default for Loopcopy {
    fn default() -> Self {
        Self(|| {})
    }
}

fn copy_of(task: &DiskTask) -> Result<PathBuf> {
    let path = task.path.as_ref().ok_or_else(|| DriverError::Verify("the disk has no file".into()))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    Ok(path.with_file_name(format!("{name}.loopcopy-{}", task.id)))
}

fn io(doing: &'static str, path: PathBuf) -> impl FnOnce(std::io::Error) -> ImageError {
    move |source| ImageError::Io { doing, path, source }
}

#[async_trait]
impl SnapshotDriver for Loopcopy {
    fn name(&self) -> &'static str {
        "loopcopy"
    }

    fn check_parameters(&self, _: &BTreeMap<String, String>) -> Result<()> {
        Ok(())
    }

    fn can_take(&self, disk: &DiskFacts, _: &BTreeMap<String, String>) -> Verdict {
        match &disk.path {
            Ok(_) if disk.format == "raw" => Verdict::Usable("a raw file".into()),
            Ok(_) => Verdict::Unusable(format!("the image is {}, not raw", disk.format)),
            Err(why) => Verdict::Unusable(why.clone()),
        }
    }

    fn plan(&self, task: &mut DiskTask, _: &BlockGraph, _: &ImageRoots) -> Result<()> {
        task.set_state(&None::<PathBuf>)
    }

    /// The copy's name is ours once it was seen free.
    async fn prepare(&self, _: &Vm, _: &ImageRoots, task: &mut DiskTask) -> Result<()> {
        let copy = copy_of(task)?;
        if task.state::<Option<PathBuf>>()?.is_none() && copy.exists() {
            return Err(DriverError::NotNow(format!("{} is there already", copy.display())));
        }
        task.set_state(&Some(copy))
    }

    fn cut(&self, group: &[&DiskTask], _: &ImageRoots) -> Result<Cut> {
        let before = self.0;
        let cut = |task: &&DiskTask| {
            let (from, to) = (task.path.clone().unwrap_or_default(), copy_of(task)?);
            let run = move || {
                before();
                std::fs::copy(&from, &to).map(drop).map_err(io("copy to", to.clone())).map_err(Into::into)
            };
            Ok(HostCut { disks: vec![task.disk.clone()], run: Arc::new(run) })
        };
        Ok(Cut { host: group.iter().map(cut).collect::<Result<_>>()?, ..Cut::default() })
    }

    fn needs_pause(&self) -> bool {
        true
    }

    async fn complete(&self, _: &Vm, _: &ImageRoots, task: &mut DiskTask) -> Result<()> {
        let handle = copy_of(task)?;
        let copied = std::fs::metadata(&handle).map_err(io("examine", handle.clone()))?.len();
        if copied != task.size {
            return Err(DriverError::Verify(format!("the copy has {copied} bytes, not {}", task.size)));
        }
        task.artifact = Some(Artifact { handle, format: "raw".into() });
        Ok(())
    }

    async fn remove(&self, _: &Env<'_>, task: &mut DiskTask) -> Result<Removal> {
        let Some(copy) = task.state::<Option<PathBuf>>()? else { return Ok(Removal::Done) };
        match std::fs::remove_file(&copy) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io("delete", copy)(error).into()),
            _ => Ok(Removal::Done),
        }
    }
}
