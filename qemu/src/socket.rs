//! Opening a VM's socket under a directory that somebody else may write to.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::time::timeout_at;

use crate::codec::deadline_after;
use crate::error::{Error, Result};

/// Which socket it is and who listens: enough to notice that a VM was replaced by another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SocketIdentity {
    /// The file system that holds the socket.
    pub device: u64,
    /// The socket's inode there.
    pub inode: u64,
    /// The process that listens; 0 if it is not visible from our pid namespace.
    pub peer_pid: i32,
    /// The user it runs as.
    pub peer_uid: u32,
}

/// Connects to the socket `relative` beneath `root`, following no symbolic link below `root`.
///
/// The path is resolved once; what is checked to be a socket is what is connected to, whatever becomes of the names.
/// [`Error::Busy`] means that the listener's queue is full.
pub async fn connect_beneath(root: &Path, relative: &Path, timeout: Duration) -> Result<(UnixStream, SocketIdentity)> {
    let deadline = deadline_after(timeout);
    let timed_out = |_| Error::Timeout { command: "connect".into(), after: timeout };
    let (root, relative) = (root.to_owned(), relative.to_owned());
    // A path lookup can hang in the kernel on a dead file system, and must not take the runtime's thread with it.
    let lookup = tokio::task::spawn_blocking(move || open_socket(&root, &relative));
    let opened = timeout_at(deadline, lookup).await.map_err(timed_out)?;
    let (socket, device, inode) =
        opened.map_err(|error| Error::Io { doing: "look the socket up", source: error.into() })??;
    let path = format!("/proc/self/fd/{}", socket.as_raw_fd());
    let stream = timeout_at(deadline, UnixStream::connect(path)).await.map_err(timed_out)?.map_err(connect_error)?;
    let peer = stream.peer_cred().map_err(|source| Error::Io { doing: "read the peer's credentials", source })?;
    let identity = SocketIdentity { device, inode, peer_pid: peer.pid().unwrap_or(0), peer_uid: peer.uid() };
    Ok((stream, identity))
}

fn open_socket(root: &Path, relative: &Path) -> Result<(OwnedFd, u64, u64)> {
    let io = |doing| move |error: rustix::io::Errno| Error::Io { doing, source: error.into() };
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, root, flags | OFlags::DIRECTORY, Mode::empty()).map_err(io("open the root"))?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let socket = rustix::fs::openat2(&root, relative, flags, Mode::empty(), resolve).map_err(io("open the socket"))?;
    let found = rustix::fs::fstat(&socket).map_err(io("examine the socket"))?;
    if FileType::from_raw_mode(found.st_mode) != FileType::Socket {
        return Err(Error::NotASocket { path: relative.display().to_string() });
    }
    Ok((socket, found.st_dev, found.st_ino))
}

fn connect_error(source: std::io::Error) -> Error {
    match source.kind() {
        std::io::ErrorKind::WouldBlock => Error::Busy,
        _ => Error::Io { doing: "connect to the socket", source },
    }
}
