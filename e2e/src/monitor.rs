//! The tests' own QMP monitor of a guest: independent of the client that is under test.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::Mutex;

const REPLY: Duration = Duration::from_secs(20);

/// A connection that runs one command at a time and passes over events.
#[derive(Debug)]
pub struct Monitor {
    stream: Mutex<BufReader<UnixStream>>,
}

impl Monitor {
    /// Connects and leaves the negotiation behind.
    pub(crate) async fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).await.with_context(|| format!("connecting to {}", path.display()))?;
        let monitor = Self { stream: Mutex::new(BufReader::new(stream)) };
        read_until(&mut *monitor.stream.lock().await, "QMP").await?;
        monitor.execute("qmp_capabilities", json!({})).await?;
        Ok(monitor)
    }

    /// Runs a command and returns its result; QEMU's refusal is an error.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value> {
        let mut stream = self.stream.lock().await;
        let request = json!({"execute": command, "arguments": arguments}).to_string();
        stream.write_all(request.as_bytes()).await.with_context(|| format!("sending {command}"))?;
        read_until(&mut stream, "return").await.with_context(|| command.to_owned())
    }

    /// Whether the guest has opened the virtio-serial port of this chardev.
    pub async fn port_is_open(&self, label: &str) -> Result<bool> {
        let chardevs = self.execute("query-chardev", json!({})).await?;
        let named = |chardev: &&Value| chardev["label"] == label;
        let chardev = chardevs.as_array().and_then(|all| all.iter().find(named));
        Ok(chardev.is_some_and(|chardev| chardev["frontend-open"] == true))
    }
}

/// The value of `key` in the next message that has it.
async fn read_until(stream: &mut BufReader<UnixStream>, key: &str) -> Result<Value> {
    let read = async {
        let mut line = String::new();
        loop {
            line.clear();
            if stream.read_line(&mut line).await? == 0 {
                bail!("QEMU closed the monitor");
            }
            let mut message: Value = serde_json::from_str(&line).context("malformed QMP")?;
            if let Some(error) = message.get("error") {
                bail!("QEMU refused: {error}");
            }
            if let Some(value) = message.get_mut(key) {
                return Ok(value.take());
            }
        }
    };
    tokio::time::timeout(REPLY, read).await.with_context(|| format!("no answer from QEMU in {REPLY:?}"))?
}
