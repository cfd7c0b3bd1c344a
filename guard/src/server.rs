//! Windows: who is heard, and when the guard acts.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{FileType, Mode};
use rustix::net::{AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::Timing;
use crate::obligation::Obligation;
use crate::protocol::{Lines, Refusal, Reply, Request};
use crate::record::Record;
use crate::state_dir::{self, StateDir};

/// Connections and owed windows at once; more wait in the socket's queue.
const MAX_TASKS: usize = 1024;
/// Waited for before the next accept when the process is out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The guard: it owes from the moment its records are loaded.
#[derive(Debug)]
pub struct Server {
    socket: PathBuf,
    listener: UnixListener,
    found: Vec<(Claim, Record)>,
    shared: Arc<Shared>,
}

/// Why the guard cannot start or has to be started anew.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The records cannot be read.
    #[error("load records")]
    State(#[from] state_dir::Error),
    /// There is something at the socket's path that is not a stale socket.
    #[error("{0} is in use")]
    InUse(PathBuf),
    /// The socket cannot be made.
    #[error("listen at {path}")]
    Listen {
        /// Where.
        path: PathBuf,
        #[source]
        /// Why.
        source: io::Error,
    },
    /// A task died with an obligation in its hands. A new start takes it up from its record.
    #[error("a window's task died")]
    Died(#[source] JoinError),
}

#[derive(Debug)]
struct Shared {
    state: StateDir,
    timing: Timing,
    owed: Mutex<HashMap<String, String>>,
    stopping: watch::Receiver<bool>,
}

/// A VM's entry in the list of the owed, for as long as the value lives.
#[derive(Debug)]
struct Claim {
    id: String,
    shared: Arc<Shared>,
}

/// How a window ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Disarm,
    Act(Cause),
}

/// Why the guard acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    Broken,
    Silent,
    Deadline,
    Stopping,
    NotRemoved,
}

impl Server {
    /// Loads the records of `state` and listens at `socket` (mode 0600, a stale one is replaced).
    /// The sender of `stopping` says `true` when the guard shall end.
    pub fn bind(
        socket: &Path,
        state: StateDir,
        timing: Timing,
        stopping: watch::Receiver<bool>,
    ) -> Result<Self, Error> {
        let records = state.load()?;
        let shared = Arc::new(Shared { state, timing, owed: Mutex::default(), stopping });
        let found = records.into_iter().map(|record| (shared.insert(&record), record)).collect();
        let listener = listen(socket)?;
        Ok(Self { socket: socket.to_owned(), listener, found, shared })
    }

    /// Serves until told to stop; then settles what is open within [`Timing::grace`] and leaves the other records for
    /// the next start.
    pub async fn run(self) -> Result<(), Error> {
        let Self { socket, listener, found, shared } = self;
        let mut tasks = JoinSet::new();
        for (claim, record) in found {
            tracing::warn!(vm = record.vm, id = record.id, "record found at start");
            tasks.spawn(settle(claim, record));
        }
        while !*shared.stopping.borrow() {
            tokio::select! {
                () = shared.told_to_stop() => {}
                Some(ended) = tasks.join_next() => ended.map_err(Error::Died)?,
                accepted = listener.accept(), if tasks.len() < MAX_TASKS => match accepted {
                    Ok((stream, _)) => drop(tasks.spawn(serve(stream, Arc::clone(&shared)))),
                    Err(error) => {
                        tracing::error!(%error, "accept failed");
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
        drop(listener);
        // Another guard may have replaced it already; then it is not ours to complain.
        let _ = std::fs::remove_file(&socket);
        drain(tasks, shared.timing.grace).await
    }
}

async fn drain(mut tasks: JoinSet<()>, grace: Duration) -> Result<(), Error> {
    let drained = timeout(grace, async {
        while let Some(ended) = tasks.join_next().await {
            ended.map_err(Error::Died)?;
        }
        Ok(())
    });
    drained.await.unwrap_or_else(|_| {
        tracing::error!(owed = tasks.len(), "stopping with windows still owed; their records are kept");
        Ok(())
    })
}

impl Shared {
    async fn told_to_stop(&self) {
        // A sender that is gone can never say it.
        if self.stopping.clone().wait_for(|stop| *stop).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    fn claim(self: &Arc<Self>, record: &Record) -> Result<Claim, (Refusal, String)> {
        if *self.stopping.borrow() {
            return Err((Refusal::Stopping, "the guard is stopping".to_owned()));
        }
        let mut owed = self.owed.lock().unwrap_or_else(PoisonError::into_inner);
        if owed.contains_key(&record.id) || owed.values().any(|vm| *vm == record.vm) {
            return Err((Refusal::Busy, format!("{} has an open or owed window", record.vm)));
        }
        owed.insert(record.id.clone(), record.vm.clone());
        Ok(Claim { id: record.id.clone(), shared: Arc::clone(self) })
    }

    /// For records found at start: of those there may be several for one VM, and each must be settled.
    fn insert(self: &Arc<Self>, record: &Record) -> Claim {
        let mut owed = self.owed.lock().unwrap_or_else(PoisonError::into_inner);
        owed.insert(record.id.clone(), record.vm.clone());
        Claim { id: record.id.clone(), shared: Arc::clone(self) }
    }

    fn owes(&self, vm: &str) -> bool {
        self.owed.lock().unwrap_or_else(PoisonError::into_inner).values().any(|owed| owed == vm)
    }

    /// Runs `work` on the state directory off the runtime's threads: a sync may take seconds.
    async fn on_disk<W>(self: &Arc<Self>, work: W) -> io::Result<()>
    where
        W: FnOnce(&StateDir) -> Result<(), state_dir::Error> + Send + 'static,
    {
        let shared = Arc::clone(self);
        tokio::task::spawn_blocking(move || work(&shared.state)).await?.map_err(io::Error::other)
    }

    async fn remove(self: &Arc<Self>, id: &str) -> io::Result<()> {
        let id = id.to_owned();
        self.on_disk(move |state| state.remove(&id)).await
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.shared.owed.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

/// One connection, from its first line to the end of what it owes.
async fn serve(stream: UnixStream, shared: Arc<Shared>) {
    let ours = rustix::process::geteuid().as_raw();
    if !stream.peer_cred().is_ok_and(|peer| peer.uid() == ours) {
        return tracing::warn!("connection of another user refused");
    }
    let mut lines = Lines::new(stream);
    let reply = match timeout(shared.timing.silence, lines.next()).await {
        Ok(Ok(Some(Request::Arm(record)))) => return arm(lines, *record, shared).await,
        Ok(Ok(Some(Request::Owes(vm)))) => Reply::Owes(shared.owes(&vm)),
        Ok(Ok(Some(request))) => refused(Refusal::Invalid, format!("{request:?} without a window")),
        Ok(Err(error)) => refused(Refusal::Invalid, error.to_string()),
        Ok(Ok(None)) | Err(_) => return,
    };
    say(&mut lines, &reply, shared.timing.step).await;
}

async fn arm(mut lines: Lines, record: Record, shared: Arc<Shared>) {
    let deadline = Instant::now() + Duration::from_millis(record.deadline_millis);
    match open_window(&record, &shared).await {
        Ok(claim) => window(lines, claim, record, deadline).await,
        Err((reason, detail)) => {
            tracing::error!(vm = record.vm, ?reason, detail, "arm refused");
            say(&mut lines, &refused(reason, detail), shared.timing.step).await;
        }
    }
}

async fn open_window(record: &Record, shared: &Arc<Shared>) -> Result<Claim, (Refusal, String)> {
    record.validate().map_err(|invalid| (Refusal::Invalid, invalid.to_string()))?;
    let claim = shared.claim(record)?;
    let to_save = record.clone();
    let saved = shared.on_disk(move |state| state.save(&to_save)).await;
    saved.map(|()| claim).map_err(|error| (Refusal::Storage, error.to_string()))
}

/// An open window, to its end and to the end of what it leaves owed.
async fn window(mut lines: Lines, claim: Claim, record: Record, deadline: Instant) {
    let shared = Arc::clone(&claim.shared);
    let descriptors = lines.take_descriptors();
    let mut end = End::Act(Cause::Broken);
    if say(&mut lines, &Reply::Armed, shared.timing.step).await {
        end = listen_to(&mut lines, deadline, &shared).await;
    }
    let cause = match end {
        End::Act(cause) => cause,
        End::Disarm => match shared.remove(&record.id).await {
            Ok(()) => {
                // Before the answer, so that the agent may arm for this VM again at once.
                drop(claim);
                say(&mut lines, &Reply::Disarmed, shared.timing.step).await;
                return;
            }
            Err(error) => {
                say(&mut lines, &refused(Refusal::Storage, error.to_string()), shared.timing.step).await;
                Cause::NotRemoved
            }
        },
    };
    tracing::error!(vm = record.vm, id = record.id, ?cause, "the guard takes over");
    cut_off(&descriptors);
    drop((lines, descriptors));
    settle(claim, record).await;
}

/// Listens to the agent until the window ends.
async fn listen_to(lines: &mut Lines, deadline: Instant, shared: &Shared) -> End {
    let mut heard = Instant::now();
    loop {
        tokio::select! {
            // In this order: no flood of lines may hide the deadline, and a line that is there counts as heard.
            biased;
            () = sleep_until(deadline) => return End::Act(Cause::Deadline),
            () = shared.told_to_stop() => return End::Act(Cause::Stopping),
            line = lines.next() => match line {
                Ok(Some(Request::Alive)) => heard = Instant::now(),
                Ok(Some(Request::Disarm)) => return End::Disarm,
                Ok(Some(Request::Arm(_) | Request::Owes(_)) | None) | Err(_) => return End::Act(Cause::Broken),
            },
            () = sleep_until(heard + shared.timing.silence) => return End::Act(Cause::Silent),
        }
    }
}

/// Takes the VM's sockets from whoever shares them. A stopped agent cannot close them; this does it for all copies.
fn cut_off(descriptors: &[OwnedFd]) {
    for descriptor in descriptors {
        match rustix::net::shutdown(descriptor, Shutdown::Both) {
            Ok(()) | Err(rustix::io::Errno::NOTCONN) => {}
            Err(error) => tracing::error!(%error, "the agent's connection cannot be shut down"),
        }
    }
}

async fn settle(claim: Claim, record: Record) {
    let (id, vm) = (record.id.clone(), record.vm.clone());
    let Shared { timing, .. } = *claim.shared;
    Obligation::new(record, timing).settle().await;
    // A record left behind would be acted on at the next start, when the VM is in other hands.
    while let Err(error) = claim.shared.remove(&id).await {
        tracing::error!(vm, id, %error, "settled, but the record cannot be removed");
        sleep(timing.retry).await;
    }
    tracing::warn!(vm, id, "settled");
}

/// Sends `reply`; whether that worked.
async fn say(lines: &mut Lines, reply: &Reply, bound: Duration) -> bool {
    matches!(timeout(bound, lines.send(reply)).await, Ok(Ok(())))
}

fn refused(reason: Refusal, detail: String) -> Reply {
    Reply::Refused { reason, detail }
}

fn listen(path: &Path) -> Result<UnixListener, Error> {
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
