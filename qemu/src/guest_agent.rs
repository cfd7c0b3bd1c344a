//! The guest agent's client.
//!
//! Answers carry nothing that says which command they belong to; the agent runs commands strictly in order. So one
//! command is in flight at a time, and a call that does not finish leaves the stream *out of step* until a sync:
//! a 0xFF byte, which makes the agent drop half a command, and `guest-sync-delimited` with a fresh id, whose
//! answer comes behind a 0xFF byte of the agent's. Everything before that byte is somebody else's and is discarded.
//!
//! A command that timed out may still run, whenever the guest gets to it. That holds for a freeze above all.

mod commands;
mod sync;

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};

use crate::codec::{self, Answer, Incoming, Message, deadline_after};
use crate::error::{Error, Result};

pub use commands::{AgentInfo, Filesystem, FreezeStatus};

/// The longest honest answers are `guest-info` and `guest-get-fsinfo`, some tens of KiB.
const MAX_LINE: usize = 1024 * 1024;

/// A connection to a guest agent. It owns its stream; one command is in flight at a time.
pub struct GuestAgent {
    stream: UnixStream,
    incoming: Incoming,
    in_step: bool,
}

impl GuestAgent {
    /// Takes a connected stream. The first call syncs, because an earlier client's answers may still arrive.
    #[must_use]
    pub fn new(stream: UnixStream) -> GuestAgent {
        GuestAgent { stream, incoming: Incoming::new(MAX_LINE), in_step: false }
    }

    /// Brings the stream into step: afterwards every command sent before has run, or never will.
    ///
    /// An error leaves it out of step; sync again, on this connection or on a new one.
    pub async fn sync(&mut self, timeout: Duration) -> Result<()> {
        let deadline = deadline_after(timeout);
        self.in_step = false;
        let (mark, id) = sync::request()?;
        self.write(&mark, "guest-sync-delimited", timeout, deadline).await?;
        self.await_sync(id, timeout, deadline).await?;
        self.in_step = true;
        Ok(())
    }

    /// Whether the next call begins with a sync: the stream is fresh, or an earlier call did not finish.
    #[must_use]
    pub fn needs_sync(&self) -> bool {
        !self.in_step
    }

    /// Runs a command; syncs first when the stream is fresh or out of step. `timeout` bounds both together.
    ///
    /// After [`Error::Timeout`] the command may still run later.
    pub async fn execute<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: impl Serialize,
        timeout: Duration,
    ) -> Result<T> {
        let line = codec::encode(command, arguments, None)?;
        let deadline = deadline_after(timeout);
        self.come_into_step(timeout, deadline).await?;
        let answer = self.exchange(command, &line, timeout, deadline).await?;
        self.accept(command, answer)
    }

    /// As [`GuestAgent::execute`], with sync and command in one write: should we die or give up before the agent comes
    /// round to the sync, the command runs nevertheless. Right for a thaw and for nothing else.
    async fn execute_at_any_time<T: DeserializeOwned>(&mut self, command: &str, timeout: Duration) -> Result<T> {
        let deadline = deadline_after(timeout);
        let (mut bytes, id) = sync::request()?;
        bytes.extend_from_slice(&codec::encode(command, (), None)?);
        self.in_step = false;
        self.write(&bytes, command, timeout, deadline).await?;
        self.await_sync(id, timeout, deadline).await?;
        let answer = self.read_answer(command, timeout, deadline).await?;
        self.in_step = true;
        self.accept(command, answer)
    }

    async fn come_into_step(&mut self, timeout: Duration, deadline: Instant) -> Result<()> {
        if self.in_step && self.incoming.buffer.is_empty() && !self.incoming.fill_now(&self.stream)? {
            return Ok(());
        }
        // Bytes that nobody asked for, such as a second answer, would be taken for the next command's answer.
        let left = deadline.saturating_duration_since(Instant::now());
        self.sync(left).await.map_err(|error| match error {
            Error::Timeout { command, .. } => Error::Timeout { command, after: timeout },
            error => error,
        })
    }

    /// One command and its answer. Out of step from the first byte until the answer is complete, so that a caller who
    /// drops the future half way leaves the right state behind.
    async fn exchange(&mut self, command: &str, line: &[u8], timeout: Duration, deadline: Instant) -> Result<Answer> {
        self.in_step = false;
        self.write(line, command, timeout, deadline).await?;
        let answer = self.read_answer(command, timeout, deadline).await?;
        self.in_step = true;
        Ok(answer)
    }

    /// QEMU stops reading when the guest does, so writing needs a limit too.
    async fn write(&self, bytes: &[u8], command: &str, timeout: Duration, deadline: Instant) -> Result<()> {
        let mut sent = 0;
        timeout_at(deadline, codec::send(&self.stream, bytes, None, &mut sent))
            .await
            .map_err(|_| Error::Timeout { command: command.to_owned(), after: timeout })?
    }

    async fn read_answer(&mut self, command: &str, timeout: Duration, deadline: Instant) -> Result<Answer> {
        let line = timeout_at(deadline, self.incoming.line(&self.stream))
            .await
            .map_err(|_| Error::Timeout { command: command.to_owned(), after: timeout })??;
        Message::parse(&line)?.answer().ok_or_else(|| Error::protocol("the guest agent's answer is no answer"))
    }

    async fn await_sync(&mut self, id: u64, timeout: Duration, deadline: Instant) -> Result<()> {
        timeout_at(deadline, sync::discard_until(id, &mut self.incoming, &self.stream))
            .await
            .map_err(|_| Error::Timeout { command: "guest-sync-delimited".into(), after: timeout })?
    }

    /// An answer of the wrong shape may be another command's: the stream can't be trusted to be in step.
    fn accept<T: DeserializeOwned>(&mut self, command: &str, answer: Answer) -> Result<T> {
        let decoded = codec::decode(command, answer);
        if matches!(decoded, Err(Error::Decode { .. })) {
            self.in_step = false;
        }
        decoded
    }

    /// The connected socket, to be duplicated for the guard.
    #[must_use]
    pub fn stream_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl fmt::Debug for GuestAgent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestAgent").field("in_step", &self.in_step).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
