//! A guard in this process, and how to wait for it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use freezeframe_guard::client::Guard;
use freezeframe_guard::{Server, ServerError, StateDir, Timing};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// The real bounds of silence and of a step; the pauses between attempts are short.
pub fn timing() -> Timing {
    Timing { retry: Duration::from_millis(20), confirm: Duration::from_millis(20), ..Timing::default() }
}

pub struct Harness {
    pub dir: TempDir,
    stop: watch::Sender<bool>,
    server: JoinHandle<Result<(), ServerError>>,
}

impl Harness {
    pub fn start() -> Self {
        Self::start_in(TempDir::new().unwrap(), timing())
    }

    pub fn start_in(dir: TempDir, timing: Timing) -> Self {
        let (stop, stopping) = watch::channel(false);
        let state = StateDir::open(&dir.path().join("state")).unwrap();
        let server = Server::bind(&dir.path().join("guard.sock"), state, timing, stopping).unwrap();
        Self { dir, stop, server: tokio::spawn(server.run()) }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("guard.sock")
    }

    pub fn guard(&self) -> Guard {
        Guard::new(self.socket())
    }

    pub fn records(&self) -> Vec<String> {
        files(&self.dir.path().join("state"))
    }

    pub async fn settled(&self) {
        until("no record is left", || self.records().is_empty()).await;
    }

    /// Tells the guard to stop and waits for it; the directory outlives it.
    pub async fn stop(self) -> TempDir {
        self.stop.send_replace(true);
        soon(self.server).await.unwrap().unwrap();
        self.dir
    }

    /// The guard dies on the spot, as by SIGKILL.
    pub async fn kill(self) -> TempDir {
        self.server.abort();
        assert!(self.server.await.unwrap_err().is_cancelled());
        let state = self.dir.path().join("state");
        until("the dead guard's lock is free", || StateDir::open(&state).is_ok()).await;
        self.dir
    }
}

pub fn files(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Waits for a condition that other tasks bring about.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    let reached = tokio::time::timeout(Duration::from_secs(20), async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    assert!(reached.await.is_ok(), "never came true: {what}");
}

/// Waits for what has to come long before any window's deadline would bring it about.
pub async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), what).await.expect("it never came")
}
