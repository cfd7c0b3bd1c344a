//! A stopped VM's images, opened in `qemu-storage-daemon`: the same block layer and the same jobs as in a running VM.
//!
//! The daemon holds QEMU's image locks, so a VM that is started in the middle fails to open its disk instead of
//! writing into a merge. A writable export on the top node stands in for the guest's device: it keeps the locks, also
//! on the base once an active commit has switched to it.

use std::process::Stdio;
use std::time::Duration;

use freezeframe_qemu::{Error as QemuError, Qmp, connect_beneath};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

use super::QMP_TIMEOUT;
use super::device::number_of;

const START_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a stopped VM's images can't be worked on.
#[derive(Debug, thiserror::Error)]
pub enum OfflineError {
    /// The daemon couldn't be started.
    #[error("failed to start qemu-storage-daemon")]
    Start(#[source] std::io::Error),
    /// The daemon refused: most likely another process has the image open.
    #[error("failed to open the stopped VM's images")]
    Qemu(#[from] QemuError),
}

/// A running `qemu-storage-daemon`; it ends when this is dropped.
pub struct StorageDaemon {
    qmp: Qmp,
    process: Child,
    directory: TempDir,
}

impl StorageDaemon {
    /// Starts a daemon with no image open.
    pub async fn start() -> Result<Self, OfflineError> {
        let directory = TempDir::new().map_err(OfflineError::Start)?;
        let socket = directory.path().join("qmp.sock");
        // Its agent's death must end it, or a VM could never be started again: its locks would stay.
        let process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "qemu-storage-daemon", "--chardev"])
            .arg(format!("socket,id=qmp,path={},server=on,wait=off", socket.display()))
            .args(["--monitor", "chardev=qmp"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(OfflineError::Start)?;
        let qmp = Self::connect(directory.path()).await?;
        Ok(Self { qmp, process, directory })
    }

    async fn connect(directory: &std::path::Path) -> Result<Qmp, QemuError> {
        let end = Instant::now() + START_TIMEOUT;
        loop {
            match connect_beneath(directory, "qmp.sock".as_ref(), START_TIMEOUT).await {
                Ok((stream, _)) => return Qmp::connect(stream, START_TIMEOUT).await,
                Err(error) if Instant::now() > end => return Err(error),
                Err(_) => sleep(Duration::from_millis(10)).await,
            }
        }
    }

    /// The monitor.
    #[must_use]
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// Opens an image as a node.
    pub async fn open(
        &self,
        node: &str,
        format: &str,
        path: &std::path::Path,
        backing: Option<&str>,
    ) -> Result<(), OfflineError> {
        let mut options = json!({
            "driver": format,
            "node-name": node,
            "file": {"driver": if number_of(path).is_ok() { "host_device" } else { "file" }, "filename": path},
        });
        if let Some(backing) = backing {
            options["backing"] = backing.into();
        }
        Ok(self.qmp.blockdev_add(&options, QMP_TIMEOUT).await?)
    }

    /// Takes the top node's locks as a guest's device would.
    pub async fn hold(&self, node: &str) -> Result<(), OfflineError> {
        let socket = self.directory.path().join("nbd.sock");
        let address = json!({"addr": {"type": "unix", "data": {"path": socket}}});
        self.qmp.execute::<Value>("nbd-server-start", address, QMP_TIMEOUT).await?;
        let export = json!({"type": "nbd", "id": "hold", "node-name": node, "writable": true});
        self.qmp.execute::<Value>("block-export-add", export, QMP_TIMEOUT).await?;
        Ok(())
    }

    /// Closes all images and waits for the daemon's end.
    pub async fn stop(mut self) -> Result<(), OfflineError> {
        self.qmp.quit(QMP_TIMEOUT).await?;
        match tokio::time::timeout(START_TIMEOUT, self.process.wait()).await {
            Ok(ended) => ended.map(drop).map_err(OfflineError::Start),
            Err(_) => self.process.kill().await.map_err(OfflineError::Start),
        }
    }
}
