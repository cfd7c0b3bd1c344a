//! One VM's QEMU: its sockets, its state, and the four verbs that only an armed window may use.
//!
//! Freeze, thaw, pause and resume take the guard's [`Window`] by reference: without a guard that owes the thaw on disk,
//! there is no value to call them with.

pub mod backing;
pub mod backing_path;
pub mod btrfs;
pub mod device;
pub mod device_name;
pub mod disks;
pub mod file_id;
pub mod filesystem;
pub mod graph;
pub mod image;
mod image_error;
pub mod lock;
pub mod offline;
pub mod qcow2;
pub mod share;
pub mod still;
pub mod target_file;

use std::path::{Path, PathBuf};
use std::time::Duration;

use freezeframe_guard::client::Window;
use freezeframe_qemu::BlockGraph;
use freezeframe_qemu::{Error as QemuError, GuestAgent, Qmp, RunState, SocketIdentity, connect_beneath};

/// Bound of one ordinary monitor command.
pub const QMP_TIMEOUT: Duration = Duration::from_secs(5);
/// Bound of one ordinary guest-agent command.
pub const AGENT_TIMEOUT: Duration = Duration::from_secs(5);
/// Bound of connecting to a socket and of the monitor's greeting.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// A VM on this node: a directory `<root>/<namespace>/<name>`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct VmKey {
    /// Namespace of the VMTarget.
    pub namespace: String,
    /// Name of the VMTarget.
    pub name: String,
}

impl std::fmt::Display for VmKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl VmKey {
    /// A socket of the VM, relative to the root of all VMs.
    #[must_use]
    pub fn socket(&self, file: &str) -> PathBuf {
        Path::new(&self.namespace).join(&self.name).join(file)
    }
}

/// Why a VM's monitor can't be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No QEMU listens.
    #[error("no QEMU process runs for VM {0}")]
    NotRunning(VmKey),
    /// QEMU is there but its monitor serves another client, or doesn't answer.
    #[error("the monitor of VM {vm} can't be used")]
    Monitor {
        /// The VM.
        vm: VmKey,
        /// What happened.
        #[source]
        source: QemuError,
    },
}

/// A connection to one running VM.
pub struct Vm {
    key: VmKey,
    root: PathBuf,
    qmp: Qmp,
    qmp_identity: SocketIdentity,
    agent: Option<(GuestAgent, SocketIdentity)>,
}

impl Vm {
    /// Connects to the monitor of a VM beneath `root`.
    pub async fn open(root: &Path, key: &VmKey) -> Result<Self, OpenError> {
        let (stream, qmp_identity) = connect_beneath(root, &key.socket("qmp.sock"), CONNECT_TIMEOUT)
            .await
            .map_err(|error| open_error(key, error))?;
        let qmp = Qmp::connect(stream, CONNECT_TIMEOUT)
            .await
            .map_err(|source| OpenError::Monitor { vm: key.clone(), source })?;
        Ok(Self { key: key.clone(), root: root.to_owned(), qmp, qmp_identity, agent: None })
    }

    /// The VM's name.
    #[must_use]
    pub fn key(&self) -> &VmKey {
        &self.key
    }

    /// The root of all VMs' directories.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The monitor, for everything but the four verbs.
    #[must_use]
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// Which socket the monitor is, and who listens there.
    #[must_use]
    pub fn qmp_identity(&self) -> SocketIdentity {
        self.qmp_identity
    }

    /// The guest agent's connection, once [`Vm::connect_agent`] made it.
    pub fn agent(&mut self) -> Option<&mut GuestAgent> {
        self.agent.as_mut().map(|(agent, _)| agent)
    }

    /// Which socket the guest agent's is.
    #[must_use]
    pub fn agent_identity(&self) -> Option<SocketIdentity> {
        self.agent.as_ref().map(|(_, identity)| *identity)
    }

    /// The descriptors that the guard needs to take the sockets away from us: agent first, as its protocol wants.
    #[must_use]
    pub fn stream_fds(&self) -> Vec<std::os::fd::BorrowedFd<'_>> {
        let agent = self.agent.iter().map(|(agent, _)| agent.stream_fd());
        agent.chain(std::iter::once(self.qmp.stream_fd())).collect()
    }

    /// Whether and how the VM runs.
    pub async fn run_state(&self) -> Result<RunState, QemuError> {
        self.qmp.query_status(QMP_TIMEOUT).await
    }

    /// The block graph.
    pub async fn graph(&self) -> Result<BlockGraph, QemuError> {
        BlockGraph::read(&self.qmp, QMP_TIMEOUT).await
    }

    /// Connects to the guest agent and waits for its answer to a sync, `patience` at the most.
    ///
    /// Nothing is sent while nobody in the guest has the channel open: the bytes would wait there and be executed at
    /// any later time.
    pub async fn connect_agent(&mut self, patience: Duration) -> Result<&mut GuestAgent, QemuError> {
        self.agent = None;
        if !self.agent_port_open().await? {
            return Err(QemuError::Closed);
        }
        let (stream, identity) = connect_beneath(&self.root, &self.key.socket("qga.sock"), CONNECT_TIMEOUT).await?;
        let mut agent = GuestAgent::new(stream);
        agent.sync(patience).await?;
        Ok(&mut self.agent.insert((agent, identity)).0)
    }

    /// Whether the guest has the agent's channel open; true where QEMU can't tell which channel it is.
    async fn agent_port_open(&self) -> Result<bool, QemuError> {
        let chardevs = self.qmp.query_chardevs(QMP_TIMEOUT).await?;
        Ok(chardevs.iter().find(|chardev| chardev.filename.contains("qga.sock")).is_none_or(|c| c.frontend_open))
    }

    /// Freezes the guest's file systems, all when `mountpoints` is empty; returns how many.
    pub async fn freeze(&mut self, _armed: &Window, mountpoints: &[String], bound: Duration) -> Result<u64, QemuError> {
        self.agent().ok_or(QemuError::Closed)?.freeze(mountpoints, bound).await
    }

    /// Thaws the guest's file systems; returns how many.
    pub async fn thaw(&mut self, _armed: &Window, bound: Duration) -> Result<u64, QemuError> {
        self.agent().ok_or(QemuError::Closed)?.thaw(bound).await
    }

    /// Stops the virtual CPUs and flushes the disks' caches.
    pub async fn pause(&self, _armed: &Window, bound: Duration) -> Result<(), QemuError> {
        self.qmp.stop(bound).await
    }

    /// Lets the virtual CPUs go.
    pub async fn resume(&self, _armed: &Window, bound: Duration) -> Result<(), QemuError> {
        self.qmp.cont(bound).await
    }
}

/// A socket that isn't there, or that nobody listens at, is a VM that doesn't run; all else is a monitor in trouble.
fn open_error(key: &VmKey, error: QemuError) -> OpenError {
    use std::io::ErrorKind::{ConnectionRefused, NotFound};
    match &error {
        QemuError::Io { source, .. } if matches!(source.kind(), NotFound | ConnectionRefused) => {
            OpenError::NotRunning(key.clone())
        }
        _ => OpenError::Monitor { vm: key.clone(), source: error },
    }
}
