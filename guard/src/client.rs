//! The agent's side: arm, stay alive, disarm.

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};

use crate::protocol::{self, Lines, Refusal, Reply, Request};
use crate::record::{Invalid, Record};

const HEARTBEAT: Duration = Duration::from_millis(250);
/// For any answer. It covers two syncs of a slow disk.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where the guard listens.
#[derive(Debug, Clone)]
pub struct Guard {
    socket: PathBuf,
}

/// An open window. While it lives, the guard hears from this process; dropping it hands the guest over to the guard.
#[derive(Debug)]
pub struct Window {
    disarm: Option<oneshot::Sender<()>>,
    end: watch::Sender<Option<Instant>>,
    lost: watch::Receiver<bool>,
    heartbeat: JoinHandle<Result<(), Error>>,
}

/// Why there is no window, or why it did not end well.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No guard, or it broke off.
    #[error("talk to the guard")]
    Protocol(#[from] protocol::Error),
    /// The record can be seen from here to be wrong.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// The guard said no.
    #[error("the guard refused ({reason:?}): {detail}")]
    Refused {
        /// Why.
        reason: Refusal,
        /// The guard's own words, for people.
        detail: String,
    },
    /// No answer came in the time given.
    #[error("no answer from the guard in {0:?}")]
    Timeout(Duration),
    /// The guard closed the connection: it has taken over, or it died.
    #[error("the guard closed the window")]
    Closed,
    /// The window was held for longer than it may be, and the guard has it now.
    #[error("the window was held for too long and is the guard's now")]
    GivenUp,
    /// The guard's answer belongs to another question.
    #[error("the guard gave an answer that does not fit")]
    Unexpected,
}

impl From<std::io::Error> for Error {
    fn from(source: std::io::Error) -> Self {
        Self::Protocol(source.into())
    }
}

impl Guard {
    /// The guard that listens at `socket`. Nothing is opened yet.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// Opens a window. When this returns, the record is on disk and the guard owes the guest what it says.
    ///
    /// `sockets` are the connections to the guest agent and to the monitor that the window will use, if any. The guard
    /// shuts them down before it acts, so nothing may be sent to the VM in this window by any other connection.
    /// Must be called within a runtime; the heartbeat is a task of it. On an error nothing may be frozen.
    pub async fn arm(&self, record: Record, sockets: &[BorrowedFd<'_>]) -> Result<Window, Error> {
        record.validate()?;
        let mut lines = self.connect().await?;
        let request = Request::Arm(Box::new(record));
        within(async { Ok(lines.send_with(&request, sockets).await?) }).await?;
        match answer(&mut lines).await? {
            Reply::Armed => Ok(Window::open(lines)),
            _ => Err(Error::Unexpected),
        }
    }

    /// Whether a window of `vm` (`namespace/name`) is open or owed.
    pub async fn owed(&self, vm: &str) -> Result<bool, Error> {
        let mut lines = self.connect().await?;
        within(async { Ok(lines.send(&Request::Owes(vm.to_owned())).await?) }).await?;
        match answer(&mut lines).await? {
            Reply::Owes(owed) => Ok(owed),
            _ => Err(Error::Unexpected),
        }
    }

    async fn connect(&self) -> Result<Lines, Error> {
        within(async { Ok(Lines::new(UnixStream::connect(&self.socket).await?)) }).await
    }
}

impl Window {
    fn open(lines: Lines) -> Self {
        let (disarm, told) = oneshot::channel();
        let (losing, lost) = watch::channel(false);
        let (end, ends) = watch::channel(None);
        let heartbeat = tokio::spawn(async move {
            let ended = tokio::select! {
                ended = keep_alive(lines, told) => ended,
                () = given_up(ends) => Err(Error::GivenUp),
            };
            losing.send_replace(true);
            ended
        });
        Self { disarm: Some(disarm), end, lost, heartbeat }
    }

    /// Hands the guest over to the guard unless the window has ended by then. It does so too while the caller's own
    /// task hangs in a system call, which is what it is for: a heartbeat alone would hide that.
    pub fn give_up_after(&self, limit: Duration) {
        self.end.send_replace(Some(Instant::now() + limit));
    }

    /// Ends the window: the guest was seen thawed and running. On an error the guard may act on the VM still.
    pub async fn disarm(mut self) -> Result<(), Error> {
        // If that fails the task is at its end already, and says itself why.
        let _ = self.disarm.take().map(|disarm| disarm.send(()));
        (&mut self.heartbeat).await.unwrap_or(Err(Error::Closed))
    }

    /// Resolves when the guard is no longer with us: it took over or died. Then thaw at once and open no new window.
    pub fn lost(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut lost = self.lost.clone();
        async move {
            // A closed channel means that the task has ended without a word: lost as well.
            let _ = lost.wait_for(|lost| *lost).await;
        }
    }

    /// Whether the guard is no longer with us, see [`Window::lost`].
    #[must_use]
    pub fn is_lost(&self) -> bool {
        *self.lost.borrow()
    }

    /// Hands the guest over to the guard, at once.
    pub fn abandon(self) {}
}

impl Drop for Window {
    fn drop(&mut self) {
        self.heartbeat.abort();
    }
}

/// Resolves at the instant set last; never while none is, and never once the window is gone.
async fn given_up(mut ends: watch::Receiver<Option<Instant>>) {
    loop {
        let end = *ends.borrow_and_update();
        let over = async {
            match end {
                Some(end) => sleep_until(end).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = over => return,
            Ok(()) = ends.changed() => {}
        }
    }
}

/// Says `alive` until told to disarm; an error if the guard breaks off first.
async fn keep_alive(mut lines: Lines, mut told: oneshot::Receiver<()>) -> Result<(), Error> {
    let mut beat = interval(HEARTBEAT);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            told = &mut told => break told.map_err(|_| Error::Closed)?,
            reply = lines.next::<Reply>() => return reply?.map_or(Err(Error::Closed), |_| Err(Error::Unexpected)),
            _ = beat.tick() => within(async { Ok(lines.send(&Request::Alive).await?) }).await?,
        }
    }
    within(async { Ok(lines.send(&Request::Disarm).await?) }).await?;
    match answer(&mut lines).await? {
        Reply::Disarmed => Ok(()),
        _ => Err(Error::Unexpected),
    }
}

async fn answer(lines: &mut Lines) -> Result<Reply, Error> {
    match within(async { Ok(lines.next().await?) }).await? {
        Some(Reply::Refused { reason, detail }) => Err(Error::Refused { reason, detail }),
        Some(reply) => Ok(reply),
        None => Err(Error::Closed),
    }
}

async fn within<T>(work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    timeout(PATIENCE, work).await.unwrap_or(Err(Error::Timeout(PATIENCE)))
}
