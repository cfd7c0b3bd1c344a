//! The monitor's client.
//!
//! Two tasks share one socket: the reader matches answers to calls by their id and hands events to whoever listens;
//! the writer writes one command at a time. A call that times out leaves nothing behind: its late answer finds no call
//! and is dropped. A command whose bytes did not all leave before its deadline is never finished later: either none
//! of it left and it is skipped, or the connection ends.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::net::UnixStream;
use tokio::sync::{OnceCell, broadcast, mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use crate::codec::{self, Answer, Incoming, Message, deadline_after};
use crate::error::{Error, Result};

/// QEMU's longest answers (`query-qmp-schema`, graphs of hundreds of nodes) stay far below this.
const MAX_LINE: usize = 10 * 1024 * 1024;

/// QEMU's events are a few hundred bytes. Listeners that lag keep `EVENTS_KEPT` of them in memory.
const MAX_EVENT: usize = 16 * 1024;
const EVENTS_KEPT: usize = 256;

/// Something QEMU told without being asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Such as `STOP` or `JOB_STATUS_CHANGE`; may be one we do not know.
    pub name: String,
    /// What came with it; null if nothing did.
    pub data: Value,
    /// QEMU's wall clock when it happened, in microseconds since 1970; 0 if it did not say.
    pub micros: i64,
}

/// A connection to a QEMU monitor; a cheap handle. Dropping the last one closes the socket.
#[derive(Clone)]
pub struct Qmp {
    inner: Arc<Inner>,
}

struct Inner {
    link: Arc<Link>,
    outgoing: mpsc::Sender<Outgoing>,
    next_id: AtomicU64,
    version: String,
    schema: OnceCell<HashSet<String>>,
    tasks: [AbortHandle; 2],
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.link.close(None);
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// What the handle and its two tasks share.
struct Link {
    stream: UnixStream,
    state: Mutex<State>,
}

struct State {
    waiting: HashMap<u64, oneshot::Sender<Answer>>,
    /// None once the connection is closed, so that listeners see the end.
    events: Option<broadcast::Sender<Event>>,
    /// What the peer did wrong, if that is why it is closed.
    fault: Option<String>,
}

struct Outgoing {
    line: Vec<u8>,
    fd: Option<OwnedFd>,
    deadline: Instant,
}

impl Qmp {
    /// Waits for the greeting and negotiates capabilities; each may take `greeting`.
    ///
    /// A monitor that serves another client accepts connections and says nothing: [`Error::Busy`].
    pub async fn connect(stream: UnixStream, greeting: Duration) -> Result<Qmp> {
        let mut incoming = Incoming::new(MAX_LINE);
        let version = timeout_at(deadline_after(greeting), read_greeting(&stream, &mut incoming))
            .await
            .map_err(|_| Error::Busy)??;
        let qmp = Self::start(stream, incoming, version);
        qmp.execute::<serde::de::IgnoredAny>("qmp_capabilities", (), greeting).await?;
        Ok(qmp)
    }

    fn start(stream: UnixStream, incoming: Incoming, version: String) -> Qmp {
        let state = State { waiting: HashMap::new(), events: Some(broadcast::channel(EVENTS_KEPT).0), fault: None };
        let link = Arc::new(Link { stream, state: Mutex::new(state) });
        let (outgoing, queue) = mpsc::channel(16);
        let reader = tokio::spawn(read_loop(Arc::clone(&link), incoming)).abort_handle();
        let writer = tokio::spawn(write_loop(Arc::clone(&link), queue)).abort_handle();
        let inner = Inner {
            link,
            outgoing,
            next_id: AtomicU64::new(1),
            version,
            schema: OnceCell::new(),
            tasks: [reader, writer],
        };
        Qmp { inner: Arc::new(inner) }
    }

    /// Runs a command. After a timeout QEMU may still run it; its late answer is dropped.
    pub async fn execute<T: DeserializeOwned>(
        &self,
        command: &str,
        arguments: impl Serialize,
        timeout: Duration,
    ) -> Result<T> {
        let id = self.next_id();
        let line = codec::encode(command, arguments, Some(id))?;
        self.call(command, id, line, None, timeout).await
    }

    /// Runs a command with a file descriptor beside its bytes (`SCM_RIGHTS`), as `add-fd` wants.
    pub async fn execute_with_fd<T: DeserializeOwned>(
        &self,
        command: &str,
        arguments: impl Serialize,
        fd: BorrowedFd<'_>,
        timeout: Duration,
    ) -> Result<T> {
        let id = self.next_id();
        let line = codec::encode(command, arguments, Some(id))?;
        let fd = fd.try_clone_to_owned().map_err(|source| Error::Io { doing: "duplicate a descriptor", source })?;
        self.call(command, id, line, Some(fd), timeout).await
    }

    fn next_id(&self) -> u64 {
        self.inner.next_id.fetch_add(1, Ordering::Relaxed)
    }

    async fn call<T: DeserializeOwned>(
        &self,
        command: &str,
        id: u64,
        line: Vec<u8>,
        fd: Option<OwnedFd>,
        timeout: Duration,
    ) -> Result<T> {
        let deadline = deadline_after(timeout);
        let (_call, answer) = Call::begin(&self.inner.link, id)?;
        let answered = timeout_at(deadline, async {
            let queued = self.inner.outgoing.send(Outgoing { line, fd, deadline }).await;
            queued.map_err(|_| self.inner.link.why_closed())?;
            answer.await.map_err(|_| self.inner.link.why_closed())
        });
        let timed_out = |_| Error::Timeout { command: command.to_owned(), after: timeout };
        codec::decode(command, answered.await.map_err(timed_out)??)
    }

    /// Events from now on. A listener that lags more than 256 behind loses the oldest; the end of the stream means that
    /// the connection is closed.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<Event> {
        match &self.inner.link.state().events {
            Some(events) => events.subscribe(),
            None => broadcast::channel(1).1,
        }
    }

    /// QEMU's version, such as `7.2.22`. To know what it can do, ask its schema instead.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.inner.version
    }

    /// Whether the connection has ended, by either side.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.inner.link.state().events.is_none()
    }

    /// The connected socket, to be duplicated for the guard.
    #[must_use]
    pub fn stream_fd(&self) -> BorrowedFd<'_> {
        self.inner.link.stream.as_fd()
    }

    pub(crate) fn schema(&self) -> &OnceCell<HashSet<String>> {
        &self.inner.schema
    }
}

impl fmt::Debug for Qmp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qmp").field("version", &self.inner.version).field("closed", &self.is_closed()).finish()
    }
}

/// A call that waits for its answer; dropping it forgets the call, also when its future is dropped half way.
struct Call<'a> {
    link: &'a Link,
    id: u64,
}

impl<'a> Call<'a> {
    fn begin(link: &'a Link, id: u64) -> Result<(Self, oneshot::Receiver<Answer>)> {
        let (sender, receiver) = oneshot::channel();
        let mut state = link.state();
        if state.events.is_none() {
            drop(state);
            return Err(link.why_closed());
        }
        state.waiting.insert(id, sender);
        Ok((Self { link, id }, receiver))
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.link.state().waiting.remove(&self.id);
    }
}

impl Link {
    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock, and every state of the map is a good one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn why_closed(&self) -> Error {
        match &self.state().fault {
            Some(reason) => Error::protocol(reason.clone()),
            None => Error::Closed,
        }
    }

    /// Ends the connection for everybody; waiting calls fail at once.
    fn close(&self, fault: Option<String>) {
        let mut state = self.state();
        state.fault = state.fault.take().or(fault);
        state.events = None;
        state.waiting.clear();
        drop(state);
        // Closing our descriptor would not do: the guard may hold a duplicate, and QEMU serves one client only.
        if let Err(error) = rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Both) {
            debug!(%error, "the monitor's socket was already shut down");
        }
    }

    fn deliver(&self, message: Message<'_>) {
        if message.event.is_some() {
            return self.publish(message);
        }
        let id = message.id();
        let caller = id.and_then(|id| self.state().waiting.remove(&id));
        let Some((caller, answer)) = caller.zip(message.answer()) else {
            debug!(?id, "ignored a message that answers no call");
            return;
        };
        // An error says that the caller timed out this instant: then nobody wants the answer.
        drop(caller.send(answer));
    }

    fn publish(&self, message: Message<'_>) {
        let raw = message.data.map_or("null", RawValue::get);
        let name = message.event.unwrap_or_default();
        let data = if raw.len() <= MAX_EVENT { serde_json::from_str(raw).ok() } else { None };
        let Some(data) = data.filter(|_| name.len() <= MAX_EVENT) else {
            debug!(name = codec::shorten(name), "ignored an event that is too large or nested too deep");
            return;
        };
        let event = Event { name, data, micros: message.timestamp.unwrap_or_default().micros() };
        if let Some(events) = &self.state().events {
            // An error says that nobody listens, which is nobody's loss.
            drop(events.send(event));
        }
    }
}

async fn read_loop(link: Arc<Link>, mut incoming: Incoming) {
    let Err(fault) = deliver_all(&link, &mut incoming).await;
    debug!(%fault, "the monitor's connection ended");
    link.close(match fault {
        Error::Protocol { reason } => Some(reason),
        _ => None,
    });
}

async fn deliver_all(link: &Link, incoming: &mut Incoming) -> Result<Infallible> {
    loop {
        let received = incoming.line(&link.stream).await?;
        link.deliver(Message::parse(&received)?);
    }
}

async fn write_loop(link: Arc<Link>, mut queue: mpsc::Receiver<Outgoing>) {
    while let Some(Outgoing { line, fd, deadline }) = queue.recv().await {
        let mut sent = 0;
        let fd = fd.as_ref().map(AsFd::as_fd);
        match timeout_at(deadline, codec::send(&link.stream, &line, fd, &mut sent)).await {
            Ok(Ok(())) => {}
            Err(_) if sent == 0 => debug!("skipped a command that could not be sent in time"),
            Ok(Err(error)) => {
                debug!(%error, "the monitor's connection broke while writing");
                return link.close(None);
            }
            Err(_) => return link.close(Some("it stopped reading in the middle of a command".into())),
        }
    }
}

#[derive(Deserialize)]
struct Greeting {
    version: Version,
}

#[derive(Deserialize)]
struct Version {
    qemu: VersionNumbers,
}

#[derive(Deserialize)]
struct VersionNumbers {
    major: u32,
    minor: u32,
    micro: u32,
}

async fn read_greeting(stream: &UnixStream, incoming: &mut Incoming) -> Result<String> {
    loop {
        let line = incoming.line(stream).await?;
        let message = Message::parse(&line)?;
        // To a client that connects while QEMU starts it may tell of an event before it greets (seen with 7.2).
        if message.event.is_some() {
            continue;
        }
        let greeting = message.greeting.ok_or_else(|| Error::protocol("it did not begin with a greeting"))?;
        let greeting: Greeting = serde_json::from_str(greeting.get())
            .map_err(|error| Error::protocol(format!("its greeting is malformed: {error}")))?;
        let VersionNumbers { major, minor, micro } = greeting.version.qemu;
        return Ok(format!("{major}.{minor}.{micro}"));
    }
}

#[cfg(test)]
mod tests;
