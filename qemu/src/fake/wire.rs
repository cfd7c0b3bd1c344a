//! How a fake serves: one client at a time, over a socket pair or at a path.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};

/// What a fake does with one line that it got.
pub(super) enum Response {
    Say(Vec<u8>),
    SayLater(Duration, Vec<u8>),
    Nothing,
    HangUp,
}

/// A fake's mind: what it says first, and what it answers to a line.
pub(super) trait Mind: Clone + Send + Sync + 'static {
    fn greeting(&self) -> Option<Vec<u8>>;
    fn hear(&self, line: &[u8]) -> Response;
    /// A line that it says by itself, when there is one.
    fn speak(&self) -> impl Future<Output = Vec<u8>> + Send;
}

/// One end of a socket pair; the fake serves the other.
pub(super) fn pair(mind: impl Mind) -> io::Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair()?;
    tokio::spawn(async move { serve(&mind, ours).await });
    Ok(theirs)
}

/// Serves at a path until the runtime ends.
pub(super) fn listen(mind: impl Mind, path: &Path) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            serve(&mind, stream).await;
        }
    });
    Ok(())
}

async fn serve(mind: &impl Mind, stream: UnixStream) {
    // A client that went away ends its own connection and no test.
    if let Err(error) = converse(mind, stream).await {
        tracing::debug!(%error, "a fake lost its client");
    }
}

async fn converse(mind: &impl Mind, stream: UnixStream) -> io::Result<()> {
    let (reader, mut writer): (OwnedReadHalf, OwnedWriteHalf) = stream.into_split();
    let mut reader = BufReader::new(reader);
    if let Some(greeting) = mind.greeting() {
        writer.write_all(&greeting).await?;
    }
    let mut line = Vec::new();
    loop {
        let arrived = tokio::select! {
            arrived = reader.read_until(b'\n', &mut line) => arrived?,
            said = mind.speak() => {
                writer.write_all(&said).await?;
                continue;
            }
        };
        if arrived == 0 {
            return Ok(());
        }
        match mind.hear(&line) {
            Response::Say(bytes) => writer.write_all(&bytes).await?,
            Response::SayLater(delay, bytes) => {
                tokio::time::sleep(delay).await;
                writer.write_all(&bytes).await?;
            }
            Response::Nothing => {}
            Response::HangUp => return Ok(()),
        }
        line.clear();
    }
}

/// A value as a line.
pub(super) fn line(value: &Value) -> Vec<u8> {
    format!("{value}\n").into_bytes()
}
