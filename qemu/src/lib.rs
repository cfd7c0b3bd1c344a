//! Clients for QEMU's machine protocol (QMP) and the QEMU guest agent, written for hostile peers.
//!
//! Everything a peer sends is bounded in size, nesting and time, and none of it may panic: a wrong answer becomes an
//! [`Error`]. The crate knows nothing of Kubernetes, of snapshots or of sessions.
//!
//! Start at [`Qmp`] for the monitor, [`GuestAgent`] for the guest, [`BlockGraph`] for the disks and
//! [`connect_beneath`] for reaching a VM's sockets safely. An [`Error`] leaves out what caused it: [`causes::chain`] says
//! all of it.

mod block;
pub mod causes;
mod codec;
mod commands;
mod error;
pub mod fake;
mod guest_agent;
mod qmp;
mod socket;

pub use block::{BlockGraph, Cache, Disk, Node};
pub use commands::{BlockStats, Chardev, Fd, FdSet, IoThread, Job, RunState};
pub use error::{Error, Result};
pub use guest_agent::{AgentInfo, Filesystem, FreezeStatus, GuestAgent};
pub use qmp::{Event, Qmp};
pub use socket::{SocketIdentity, connect_beneath};
