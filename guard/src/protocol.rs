//! The guard's lines: one JSON value each, at most [`MAX_LINE`] bytes; the first may carry descriptors beside it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncWriteExt as _, Interest};
use tokio::net::UnixStream;

use crate::record::Record;

/// The longest line either side takes, in bytes.
pub const MAX_LINE: usize = 64 * 1024;
/// The guest agent's socket and the monitor's.
pub(crate) const MAX_DESCRIPTORS: usize = 2;

/// What an agent says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    /// Open a window.
    Arm(Box<Record>),
    /// The window's agent still runs.
    Alive,
    /// The guest was seen thawed and running; nothing is owed any more.
    Disarm,
    /// Is anything owed to this VM?
    Owes(String),
}

/// What the guard says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reply {
    /// The record is on disk.
    Armed,
    /// The record is gone from disk.
    Disarmed,
    /// Whether the VM has an open or owed window.
    Owes(bool),
    /// No, and why.
    Refused { reason: Refusal, detail: String },
}

/// Why the guard said no.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// The VM has a window that is open or owed.
    Busy,
    /// The record or the line does not make sense.
    Invalid,
    /// The record could not be written or removed safely.
    Storage,
    /// The guard is on its way out.
    Stopping,
}

/// What went wrong between agent and guard.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket failed.
    #[error("talk over the guard's socket")]
    Io(#[from] io::Error),
    /// A line was longer than [`MAX_LINE`].
    #[error("line of over {MAX_LINE} bytes")]
    TooLong,
    /// More descriptors than a window has sockets.
    #[error("more than {MAX_DESCRIPTORS} descriptors")]
    TooManyDescriptors,
    /// A line that is none of ours.
    #[error("malformed line")]
    Malformed(#[source] serde_json::Error),
}

/// The reading side of a connection. Nothing is lost when a call to `next` is dropped half way.
#[derive(Debug)]
pub(crate) struct Lines {
    stream: UnixStream,
    buffer: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Lines {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self { stream, buffer: Vec::new(), descriptors: Vec::new() }
    }

    /// The next line, or `None` when the peer has closed.
    pub(crate) async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Error> {
        loop {
            if let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return serde_json::from_slice(&line).map(Some).map_err(Error::Malformed);
            }
            if self.buffer.len() > MAX_LINE {
                return Err(Error::TooLong);
            }
            if self.receive().await? == 0 {
                return Ok(None);
            }
        }
    }

    /// The descriptors that came so far.
    pub(crate) fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.descriptors)
    }

    pub(crate) async fn send(&mut self, message: &impl Serialize) -> Result<(), Error> {
        Ok(self.stream.write_all(&encode(message)?).await?)
    }

    /// Sends a line with `descriptors` beside its first bytes.
    pub(crate) async fn send_with(
        &mut self,
        message: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        if descriptors.len() > MAX_DESCRIPTORS {
            return Err(Error::TooManyDescriptors);
        }
        let line = encode(message)?;
        let sent = self
            .stream
            .async_io(Interest::WRITABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
                let mut beside = SendAncillaryBuffer::new(&mut space);
                if !descriptors.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(descriptors)) {
                    return Err(io::Error::other("no room for the descriptors"));
                }
                let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                Ok(rustix::net::sendmsg(self.stream.as_fd(), &[IoSlice::new(&line)], &mut beside, flags)?)
            })
            .await?;
        Ok(self.stream.write_all(&line[sent..]).await?)
    }

    async fn receive(&mut self) -> Result<usize, Error> {
        let mut chunk = [0; 4096];
        let (read, descriptors, truncated) = self
            .stream
            .async_io(Interest::READABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
                let mut beside = RecvAncillaryBuffer::new(&mut space);
                let mut parts = [IoSliceMut::new(&mut chunk)];
                let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
                let message = rustix::net::recvmsg(self.stream.as_fd(), &mut parts, &mut beside, flags)?;
                let mut descriptors = Vec::new();
                for part in beside.drain() {
                    if let RecvAncillaryMessage::ScmRights(rights) = part {
                        descriptors.extend(rights);
                    }
                }
                Ok((message.bytes, descriptors, message.flags.contains(ReturnFlags::CTRUNC)))
            })
            .await?;
        self.descriptors.extend(descriptors);
        if truncated || self.descriptors.len() > MAX_DESCRIPTORS {
            return Err(Error::TooManyDescriptors);
        }
        self.buffer.extend_from_slice(&chunk[..read]);
        Ok(read)
    }
}

fn encode(message: &impl Serialize) -> Result<Vec<u8>, Error> {
    let mut line = serde_json::to_vec(message).map_err(Error::Malformed)?;
    line.push(b'\n');
    if line.len() > MAX_LINE {
        return Err(Error::TooLong);
    }
    Ok(line)
}
