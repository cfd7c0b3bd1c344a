//! The guard as a whole: what it found at start, who connects, and how it stops.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{sleep, timeout};

use crate::Timing;
use crate::listen::listen;
use crate::protocol::Refusal;
use crate::record::Record;
use crate::state_dir::{self, StateDir};
use crate::window::{serve, settle};

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
pub(crate) struct Shared {
    state: StateDir,
    pub(crate) timing: Timing,
    /// The VM of each open or owed window, by the record's id.
    owed: Mutex<HashMap<String, String>>,
    stopping: watch::Receiver<bool>,
}

/// A VM's entry in the list of the owed, for as long as the value lives.
#[derive(Debug)]
pub(crate) struct Claim {
    id: String,
    pub(crate) shared: Arc<Shared>,
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
        // Not by `claim`: there may be several records of one VM, and each must be settled.
        let enter = |record| (shared.enter(&mut shared.owed(), &record), record);
        let found = records.into_iter().map(enter).collect();
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
    pub(crate) async fn told_to_stop(&self) {
        // A sender that is gone can never say it.
        if self.stopping.clone().wait_for(|stop| *stop).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    pub(crate) fn claim(self: &Arc<Self>, record: &Record) -> Result<Claim, (Refusal, String)> {
        if *self.stopping.borrow() {
            return Err((Refusal::Stopping, "the guard is stopping".to_owned()));
        }
        let mut owed = self.owed();
        if owed.contains_key(&record.id) || owed.values().any(|vm| *vm == record.vm) {
            return Err((Refusal::Busy, format!("{} has an open or owed window", record.vm)));
        }
        Ok(self.enter(&mut owed, record))
    }

    fn enter(self: &Arc<Self>, owed: &mut HashMap<String, String>, record: &Record) -> Claim {
        owed.insert(record.id.clone(), record.vm.clone());
        Claim { id: record.id.clone(), shared: Arc::clone(self) }
    }

    pub(crate) fn owes(&self, vm: &str) -> bool {
        self.owed().values().any(|owed| owed == vm)
    }

    fn owed(&self) -> MutexGuard<'_, HashMap<String, String>> {
        // The map is whole at every moment: a thread that died holding it did no harm.
        self.owed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` on the state directory off the runtime's threads: a sync may take seconds.
    pub(crate) async fn on_disk<W>(self: &Arc<Self>, work: W) -> io::Result<()>
    where
        W: FnOnce(&StateDir) -> Result<(), state_dir::Error> + Send + 'static,
    {
        let shared = Arc::clone(self);
        tokio::task::spawn_blocking(move || work(&shared.state)).await?.map_err(io::Error::other)
    }

    pub(crate) async fn remove(self: &Arc<Self>, id: &str) -> io::Result<()> {
        let id = id.to_owned();
        self.on_disk(move |state| state.remove(&id)).await
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.shared.owed().remove(&self.id);
    }
}
