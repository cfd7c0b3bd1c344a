//! The bare commands of each layer: what is prepared, what cuts, and how it is cleared away.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use freezeframe_e2e::{Guest, await_condition, run};
use serde_json::{Value, json};

use super::super::layer::Layer;
use super::super::table::DISK_MIB;

const SOON: Duration = Duration::from_secs(60);

/// One disk of a guest.
pub struct Disk<'a> {
    guest: &'a Guest,
    pub layer: Layer,
    name: String,
    image: PathBuf,
    /// Of what the commands make.
    directory: PathBuf,
}

impl<'a> Disk<'a> {
    pub fn new(guest: &'a Guest, layer: Layer, index: u8, image: &Path, directory: &Path) -> Self {
        let name = format!("vd{}", char::from(b'a' + index));
        Self { guest, layer, name, image: image.to_owned(), directory: directory.to_owned() }
    }

    /// Makes and opens what QEMU writes to.
    pub async fn prepare(&self) -> Result<()> {
        if !self.is_cut_by_qemu() {
            return Ok(());
        }
        let (path, size) = (self.file(), format!("{DISK_MIB}M"));
        run("qemu-img", ["create", "-q", "-f", "qcow2", &path.to_string_lossy(), &size])?;
        let file = json!({"driver": "file", "filename": path});
        let node = json!({"driver": "qcow2", "node-name": self.node(), "file": file, "backing": null});
        self.qmp("blockdev-add", node).await.map(drop)
    }

    pub fn is_cut_by_qemu(&self) -> bool {
        matches!(self.layer, Layer::Overlay | Layer::Copy)
    }

    /// Its action in a transaction.
    pub fn action(&self) -> Option<Value> {
        let device = format!("fmt-{}", self.name);
        match self.layer {
            Layer::Overlay => {
                Some(json!({"type": "blockdev-snapshot", "data": {"node": device, "overlay": self.node()}}))
            }
            Layer::Copy => Some(json!({"type": "blockdev-backup", "data": {
                "job-id": self.job(), "device": device, "target": self.node(), "sync": "full"}})),
            Layer::Reflink | Layer::Btrfs => None,
        }
    }

    /// Cuts outside QEMU; of the disks in one subvolume only the first needs to.
    pub fn cut(&self, first_of_its_layer: bool) -> Result<()> {
        match self.layer {
            Layer::Reflink => {
                run("cp", ["--reflink=always".as_ref(), self.image.as_os_str(), self.clone().as_os_str()])
            }
            Layer::Btrfs if first_of_its_layer => {
                let words = ["subvolume", "snapshot", "-r"].map(OsStr::new);
                let subvolume = self.image.parent().context("an image without a directory")?;
                run("btrfs", words.into_iter().chain([subvolume.as_os_str(), self.subvolume().as_os_str()]))
            }
            _ => return Ok(()),
        }
        .map(drop)
    }

    /// Merges or removes what was made.
    pub async fn clear(&self, first_of_its_layer: bool) -> Result<()> {
        match self.layer {
            Layer::Overlay => self.merge().await,
            Layer::Copy => {
                self.await_job("").await?;
                self.close().await
            }
            Layer::Reflink => std::fs::remove_file(self.clone()).context("removing a clone"),
            Layer::Btrfs if first_of_its_layer => {
                let words = ["subvolume", "delete"].map(OsStr::new);
                run("btrfs", words.into_iter().chain([self.subvolume().as_os_str()])).map(drop)
            }
            Layer::Btrfs => Ok(()),
        }
    }

    async fn merge(&self) -> Result<()> {
        let commit = json!({"job-id": self.job(), "device": self.node(), "base-node": format!("fmt-{}", self.name)});
        self.qmp("block-commit", commit).await?;
        self.await_job("ready").await?;
        self.qmp("job-complete", json!({"id": self.job()})).await?;
        self.await_job("").await?;
        self.close().await
    }

    async fn close(&self) -> Result<()> {
        self.qmp("blockdev-del", json!({"node-name": self.node()})).await?;
        std::fs::remove_file(self.file()).context("removing what QEMU wrote")
    }

    /// Waits until the job has this status; none when it is gone.
    async fn await_job(&self, wanted: &str) -> Result<()> {
        await_condition("a job to get on", SOON, async || {
            let jobs = self.qmp("query-jobs", json!({})).await?;
            let job = jobs.as_array().and_then(|jobs| jobs.iter().find(|job| job["id"] == self.job()));
            let status = job.and_then(|job| job["status"].as_str()).unwrap_or_default();
            Ok((status == wanted).then_some(()))
        })
        .await
    }

    fn node(&self) -> String {
        format!("bare-{}", self.name)
    }

    fn job(&self) -> String {
        format!("job-{}", self.name)
    }

    fn file(&self) -> PathBuf {
        self.directory.join(format!("{}.qcow2", self.name))
    }

    fn clone(&self) -> PathBuf {
        self.image.with_extension("bare")
    }

    fn subvolume(&self) -> PathBuf {
        self.image.with_file_name(".bare")
    }

    async fn qmp(&self, command: &str, arguments: Value) -> Result<Value> {
        self.guest.monitor().execute(command, arguments).await
    }
}
