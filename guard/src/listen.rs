//! The guard's socket file: its owner's alone from its first moment, and never taken from a living guard.

use std::io;
use std::path::Path;

use rustix::fs::{FileType, Mode};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::UnixListener;

use crate::server::Error;

/// Listens at `path`; replaces a socket that nobody listens at.
pub(crate) fn listen(path: &Path) -> Result<UnixListener, Error> {
    let failed = |source: io::Error| Error::Listen { path: path.to_owned(), source };
    match rustix::fs::lstat(path) {
        Err(rustix::io::Errno::NOENT) => {}
        Ok(found) if FileType::from_raw_mode(found.st_mode).is_socket() => remove_stale(path)?,
        Ok(_) => return Err(Error::InUse(path.to_owned())),
        Err(error) => return Err(failed(error.into())),
    }
    open_listener(path).map_err(failed)
}

fn remove_stale(path: &Path) -> Result<(), Error> {
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|source| Error::Listen { path: path.to_owned(), source })
        }
        _ => Err(Error::InUse(path.to_owned())),
    }
}

fn open_listener(path: &Path) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Before `bind`, which gives the file the mode of the socket: there is no moment at which others could connect.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, 128)?;
    UnixListener::from_std(socket.into())
}
