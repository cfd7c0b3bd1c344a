//! Reaching a VM again, or knowing that it is gone.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use freezeframe_qemu::{Error, SocketIdentity, connect_beneath};
use tokio::net::UnixStream;

use crate::record::Endpoint;

/// What came of going to a VM's socket.
#[derive(Debug)]
pub(crate) enum Reach {
    /// The VM of the record answers, or will when its present client lets go.
    Connected(UnixStream),
    /// The VM of the record does not run any more; says how that was seen.
    Gone(&'static str),
    /// Nothing was learnt; try again.
    Unclear(Error),
}

/// Connects to the very VM that `endpoint` describes, never to a successor at the same place.
///
/// A process that is known and lives on outweighs what the file system says: a removed or replaced socket file does
/// not thaw a guest.
pub(crate) async fn reach(root: &Path, endpoint: &Endpoint, timeout: Duration) -> Reach {
    match connect_beneath(root, &endpoint.path, timeout).await {
        Ok((stream, found)) => match differs(endpoint, &found) {
            // A second QEMU that was started by mistake took the socket's name.
            Some(how) if process_lives(endpoint) => Reach::Unclear(out_of_reach(how)),
            Some(how) => Reach::Gone(how),
            None => Reach::Connected(stream),
        },
        Err(error) if is_missing(&error) && !process_lives(endpoint) => Reach::Gone("its socket is gone"),
        Err(error) if is_refused(&error) && !process_lives(endpoint) => Reach::Gone("nobody listens on its socket"),
        Err(error) => Reach::Unclear(error),
    }
}

/// What to say of a VM that lives on behind a socket which no name leads to any more.
fn out_of_reach(how: &'static str) -> Error {
    Error::Io { doing: "reach a VM that runs", source: std::io::Error::other(how) }
}

fn is_refused(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. } if source.kind() == ErrorKind::ConnectionRefused)
}

/// Whether there is no socket at the path: nothing, something else, or a way that leads elsewhere.
fn is_missing(error: &Error) -> bool {
    use ErrorKind::{NotADirectory, NotFound};
    match error {
        Error::NotASocket { .. } => true,
        Error::Io { source, .. } => matches!(source.kind(), NotFound | NotADirectory),
        _ => false,
    }
}

fn differs(endpoint: &Endpoint, found: &SocketIdentity) -> Option<&'static str> {
    let Some(pid) = known_pid(endpoint).filter(|_| found.peer_pid != 0) else {
        let same = (endpoint.device, endpoint.inode) == (found.device, found.inode);
        return (!same).then_some("another socket is in its place");
    };
    let started = (endpoint.peer_started, process_started(found.peer_pid));
    let reused = matches!(started, (Some(then), Some(now)) if then != now);
    (pid != found.peer_pid || reused).then_some("another process has its socket")
}

fn process_lives(endpoint: &Endpoint) -> bool {
    let started = known_pid(endpoint).and_then(process_started);
    started.is_some() && started == endpoint.peer_started
}

/// The VM's pid, if it was seen and means the same process here.
fn known_pid(endpoint: &Endpoint) -> Option<i32> {
    let ours = endpoint.pid_namespace.is_some() && endpoint.pid_namespace == pid_namespace();
    Some(endpoint.peer_pid).filter(|&pid| ours && pid != 0)
}

/// The pid namespace we live in. Without one, pids prove nothing.
pub(crate) fn pid_namespace() -> Option<u64> {
    std::fs::metadata("/proc/self/ns/pid").ok().map(|namespace| namespace.ino())
}

/// When the process `pid` started, in clock ticks since boot; `None` if it is not seen or has exited.
pub(crate) fn process_started(pid: i32) -> Option<u64> {
    // Whatever keeps us from reading it, we know as little: the socket itself has to tell then.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok().filter(|_| pid > 0)?;
    // The second field is the program's name in brackets and may hold anything; the third is the state.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let exited = matches!(fields.next()?, "Z" | "X");
    // The 22nd of all fields, hence the 18th after the state and the one taken.
    fields.nth(18).filter(|_| !exited)?.parse().ok()
}
