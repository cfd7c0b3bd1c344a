//! The record: what an agent may be about to do to a VM, and so what may have to be undone.

use std::path::{Component, Path, PathBuf};

use freezeframe_qemu::SocketIdentity;
use serde::{Deserialize, Serialize};

use crate::exchange::Exchange;
use crate::reach;

const MAX_ID: usize = 128;
/// A namespace (63), a slash and a name (253), as Kubernetes bounds them.
const MAX_VM: usize = 317;
const MAX_EXCHANGES: usize = 256;
/// No freeze may be planned to last longer; ten minutes is far above any sane deadline and far below "for ever".
const MAX_DEADLINE_MILLIS: u64 = 600_000;

/// One window's obligation, as the agent states it when it arms.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Names the record's file: letters, digits, `.`, `_` and `-`, not starting with a dot. Unique among open windows.
    pub id: String,
    /// The VM as `namespace/name`. One open window a VM.
    pub vm: String,
    /// Absolute directory that both sockets' paths start from.
    pub vm_root: PathBuf,
    /// QEMU's monitor. Needed to resume and for exchanges.
    pub qmp: Option<Endpoint>,
    /// The guest agent's socket. Needed to thaw.
    pub agent: Option<Endpoint>,
    /// The VM was running and may be found `paused` by us.
    pub may_resume: bool,
    /// A freeze will be sent, so a thaw is owed.
    pub freeze: bool,
    /// How long the window may be open, in milliseconds from arming.
    pub deadline_millis: u64,
    /// Names that have to change hands if the cut took place.
    #[serde(default)]
    pub exchanges: Vec<Exchange>,
    /// A block job that was told to complete, which would be the cut: it must be over before the names can be right.
    #[serde(default)]
    pub job: Option<String>,
}

/// A VM's socket, and how to tell that the one found there later is still the same VM's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Relative to the record's `vm_root`.
    pub path: PathBuf,
    /// Device number of the socket file.
    pub device: u64,
    /// Inode of the socket file.
    pub inode: u64,
    /// The process that listens; 0 if it is outside our pid namespace.
    pub peer_pid: i32,
    /// The user that process runs as.
    pub peer_uid: u32,
    /// When that process started, in clock ticks since boot: a pid alone may be used again.
    #[serde(default)]
    pub peer_started: Option<u64>,
    /// The pid namespace that `peer_pid` was read in: in another one the number means another process.
    #[serde(default)]
    pub pid_namespace: Option<u64>,
}

impl Endpoint {
    /// The endpoint at `path` as it was when `identity` was read. Also looks up when the peer's process started.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>, identity: &SocketIdentity) -> Self {
        Self {
            path: path.into(),
            device: identity.device,
            inode: identity.inode,
            peer_pid: identity.peer_pid,
            peer_uid: identity.peer_uid,
            peer_started: reach::process_started(identity.peer_pid),
            pid_namespace: reach::pid_namespace(),
        }
    }

    fn is_confined(&self) -> bool {
        let mut parts = self.path.components();
        self.path.parent().is_some() && parts.all(|part| matches!(part, Component::Normal(_)))
    }
}

/// A record that the guard does not take on: it names what is wrong with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("invalid record: {0}")]
pub struct Invalid(pub(crate) &'static str);

impl Record {
    /// Whether everything the record may ask for can be done with what it names.
    pub fn validate(&self) -> Result<(), Invalid> {
        let endpoints = || self.qmp.iter().chain(&self.agent);
        let checks = [
            (is_file_stem(&self.id), "id is not a plain file name"),
            (is_vm_name(&self.vm), "vm is not namespace/name"),
            (self.vm_root.is_absolute(), "vm_root is not absolute"),
            (endpoints().all(Endpoint::is_confined), "a socket's path leaves vm_root"),
            (self.agent.is_some() || !self.freeze, "a freeze without a guest agent to thaw it"),
            (self.qmp.is_some() || !self.may_resume, "a pause without a monitor to resume by"),
            (self.qmp.is_some() || self.exchanges.is_empty(), "exchanges without a monitor to ask"),
            ((1..=MAX_DEADLINE_MILLIS).contains(&self.deadline_millis), "deadline is zero or over ten minutes"),
            (self.exchanges.len() <= MAX_EXCHANGES, "too many exchanges"),
            (self.exchanges.iter().all(Exchange::is_confined), "an exchange leaves its directory"),
            (self.job.as_deref().is_none_or(is_file_stem), "job is not a job's id"),
        ];
        checks.into_iter().find(|(holds, _)| !holds).map_or(Ok(()), |(_, wrong)| Err(Invalid(wrong)))
    }
}

fn is_file_stem(id: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=MAX_ID).contains(&id.len()) && !id.starts_with('.') && id.bytes().all(plain)
}

fn is_vm_name(vm: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let part = |part: &str| !part.is_empty() && part.bytes().all(plain);
    vm.len() <= MAX_VM && vm.split_once('/').is_some_and(|(namespace, name)| part(namespace) && part(name))
}

/// Whether `name` is one component of a path, and an ordinary one.
pub(crate) fn is_component(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
}
