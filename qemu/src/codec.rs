//! Bytes on the wire: bounded lines in, one JSON object a line out.
//!
//! Answers are kept as raw JSON until the caller's type is known. That keeps a hostile ten-megabyte line at ten
//! megabytes, where a tree of JSON values would be twenty times that.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use bytes::BytesMut;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::Instant;

use crate::error::{Error, Result};

/// How much is read at once.
const CHUNK: usize = 16 * 1024;

/// An error's text is shown in statuses and logs: longer than this it is an attack or useless.
const MAX_TEXT: usize = 1024;

/// Never panics, whatever the caller's duration; a year stands for "without end".
pub(crate) fn deadline_after(timeout: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(timeout).unwrap_or_else(|| now + Duration::from_secs(365 * 24 * 3600))
}

/// What arrived and was not consumed yet. Reading is cancel-safe: bytes stay here when a caller gives up.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) buffer: BytesMut,
    /// Bytes at the front of the buffer that are known to hold no newline.
    scanned: usize,
    max_line: usize,
}

impl Incoming {
    pub(crate) fn new(max_line: usize) -> Self {
        Self { buffer: BytesMut::new(), scanned: 0, max_line }
    }

    /// The next line that is not blank, without its newline.
    pub(crate) async fn line(&mut self, stream: &UnixStream) -> Result<BytesMut> {
        loop {
            while let Some(line) = self.buffered_line()? {
                if !line.trim_ascii().is_empty() {
                    return Ok(line);
                }
            }
            self.fill(stream).await?;
        }
    }

    fn buffered_line(&mut self) -> Result<Option<BytesMut>> {
        let end = self.buffer[self.scanned..].iter().position(|&byte| byte == b'\n').map(|at| at + self.scanned);
        if end.unwrap_or(self.buffer.len()) > self.max_line {
            return Err(Error::protocol(format!("a line is longer than {} bytes", self.max_line)));
        }
        let Some(end) = end else {
            self.scanned = self.buffer.len();
            return Ok(None);
        };
        self.scanned = 0;
        let mut line = self.buffer.split_to(end + 1);
        line.truncate(end);
        Ok(Some(line))
    }

    /// Waits until more bytes are in the buffer.
    pub(crate) async fn fill(&mut self, stream: &UnixStream) -> Result<()> {
        loop {
            stream.readable().await.map_err(|source| Error::Io { doing: "wait for the peer", source })?;
            if self.fill_now(stream)? {
                return Ok(());
            }
        }
    }

    /// Takes what has arrived, without waiting; false if nothing has.
    pub(crate) fn fill_now(&mut self, stream: &UnixStream) -> Result<bool> {
        self.buffer.reserve(CHUNK);
        match stream.try_read_buf(&mut self.buffer) {
            Ok(0) => Err(Error::Closed),
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Err(Error::Closed),
            Err(source) => Err(Error::Io { doing: "read from the peer", source }),
        }
    }

    /// Drops the first `count` bytes.
    pub(crate) fn discard(&mut self, count: usize) {
        let count = count.min(self.buffer.len());
        drop(self.buffer.split_to(count));
        self.scanned = 0;
    }
}

/// Writes all of `bytes`, with `fd` beside the first of them. `sent` counts along, so that a caller that gives up knows
/// whether the peer has seen any of it.
pub(crate) async fn send(
    stream: &UnixStream,
    bytes: &[u8],
    mut fd: Option<BorrowedFd<'_>>,
    sent: &mut usize,
) -> Result<()> {
    while *sent < bytes.len() {
        let rest = &bytes[*sent..];
        match stream.async_io(Interest::WRITABLE, || send_now(stream, rest, fd)).await {
            Ok(count) => *sent += count,
            Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
                return Err(Error::Closed);
            }
            Err(source) => return Err(Error::Io { doing: "write to the peer", source }),
        }
        fd = None;
    }
    Ok(())
}

fn send_now(stream: &UnixStream, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<usize> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = fd.into_iter().collect();
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::from(io::ErrorKind::OutOfMemory));
    }
    // MSG_NOSIGNAL: a peer that hangs up must not be able to raise SIGPIPE in us.
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(rustix::net::sendmsg(stream.as_fd(), &[IoSlice::new(bytes)], &mut control, flags)?)
}

#[derive(Serialize)]
struct Request<'a> {
    execute: &'a str,
    #[serde(skip_serializing_if = "serde_json::Value::is_null")]
    arguments: serde_json::Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<u64>,
}

/// One command as a line. Arguments that are JSON's null (such as `()`) are left out.
pub(crate) fn encode(command: &str, arguments: impl Serialize, id: Option<u64>) -> Result<Vec<u8>> {
    let failed = |source| Error::Encode { command: command.to_owned(), source };
    let arguments = serde_json::to_value(arguments).map_err(failed)?;
    let mut line = serde_json::to_vec(&Request { execute: command, arguments, id }).map_err(failed)?;
    line.push(b'\n');
    Ok(line)
}

/// Any line a peer sends; what it is follows from the members it has.
#[derive(Debug, Deserialize)]
pub(crate) struct Message<'a> {
    #[serde(default, borrow)]
    id: Option<&'a RawValue>,
    #[serde(default, rename = "return", borrow, deserialize_with = "present")]
    returned: Option<&'a RawValue>,
    #[serde(default)]
    error: Option<Refusal>,
    #[serde(default)]
    pub(crate) event: Option<String>,
    #[serde(default, borrow)]
    pub(crate) data: Option<&'a RawValue>,
    #[serde(default)]
    pub(crate) timestamp: Option<Timestamp>,
    #[serde(default, rename = "QMP", borrow)]
    pub(crate) greeting: Option<&'a RawValue>,
}

// Without this, a `return` of null would look like no `return` at all.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(default)]
pub(crate) struct Timestamp {
    seconds: i64,
    microseconds: i64,
}

impl Timestamp {
    pub(crate) fn micros(self) -> i64 {
        self.seconds.saturating_mul(1_000_000).saturating_add(self.microseconds)
    }
}

/// An error as a peer words it.
#[derive(Debug, Deserialize)]
pub(crate) struct Refusal {
    #[serde(default)]
    class: String,
    #[serde(default)]
    desc: String,
}

/// What a peer answered to a command.
pub(crate) type Answer = std::result::Result<Box<RawValue>, Refusal>;

impl<'a> Message<'a> {
    pub(crate) fn parse(line: &'a [u8]) -> Result<Self> {
        serde_json::from_slice(line).map_err(|error| Error::protocol(format!("a line is no message: {error}")))
    }

    /// Our number of the command that this answers; peers' own ids of other shapes are nobody's.
    pub(crate) fn id(&self) -> Option<u64> {
        self.id.and_then(|id| id.get().parse().ok())
    }

    /// The answer in this message, if it is one.
    pub(crate) fn answer(self) -> Option<Answer> {
        match (self.error, self.returned) {
            (Some(refusal), _) => Some(Err(refusal)),
            (None, Some(value)) => Some(Ok(value.to_owned())),
            (None, None) => None,
        }
    }
}

/// The caller's type out of an answer.
pub(crate) fn decode<T: DeserializeOwned>(command: &str, answer: Answer) -> Result<T> {
    match answer {
        Ok(value) => {
            serde_json::from_str(value.get()).map_err(|source| Error::Decode { command: command.to_owned(), source })
        }
        Err(Refusal { class, desc }) => {
            Err(Error::Command { command: command.to_owned(), class: shorten(class), desc: shorten(desc) })
        }
    }
}

/// Text of a peer, cut to what is worth showing.
pub(crate) fn shorten(mut text: String) -> String {
    if let Some((cut, _)) = text.char_indices().nth(MAX_TEXT) {
        text.truncate(cut);
        text.push('…');
    }
    text
}
