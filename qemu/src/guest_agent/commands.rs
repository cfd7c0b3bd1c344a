//! The commands that a snapshot needs of a guest.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::GuestAgent;
use crate::codec::{deadline_after, shorten};
use crate::error::{Error, Result};

const EXEC_POLL: Duration = Duration::from_millis(50);

/// What a guest agent says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AgentInfo {
    /// The agent's version, in its own words.
    pub version: String,
    commands: BTreeMap<String, bool>,
}

impl AgentInfo {
    /// Whether the agent has this command and its administrator allows it.
    #[must_use]
    pub fn enabled(&self, command: &str) -> bool {
        self.commands.get(command).copied().unwrap_or(false)
    }
}

/// Whether the agent holds the guest's file systems. Any other word of the agent is an error: it proves neither.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FreezeStatus {
    /// The agent holds nothing.
    Thawed,
    /// The agent has frozen file systems and not thawed them.
    Frozen,
}

/// A mounted file system as the guest names it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Filesystem {
    /// The device's name in the guest, such as `vda1`.
    pub name: String,
    /// Where it is mounted.
    pub mountpoint: String,
    /// Such as `ext4`.
    #[serde(rename = "type")]
    pub kind: String,
}

impl Filesystem {
    /// Whether it lives in a file of another file system: frozen in the wrong order, such a pair blocks the agent for ever.
    #[must_use]
    pub fn is_loop(&self) -> bool {
        self.name.starts_with("loop")
    }
}

#[derive(Deserialize)]
struct RawInfo {
    #[serde(default)]
    version: String,
    #[serde(default)]
    supported_commands: Vec<RawCommand>,
}

#[derive(Deserialize)]
struct RawCommand {
    name: String,
    #[serde(default)]
    enabled: bool,
}

#[derive(Deserialize)]
struct Spawned {
    pid: i64,
}

#[derive(Deserialize)]
struct ExecStatus {
    exited: bool,
    exitcode: Option<i64>,
    signal: Option<i64>,
}

impl GuestAgent {
    /// Version and commands.
    pub async fn info(&mut self, timeout: Duration) -> Result<AgentInfo> {
        let raw: RawInfo = self.execute("guest-info", (), timeout).await?;
        let commands = raw.supported_commands.into_iter().map(|command| (command.name, command.enabled)).collect();
        Ok(AgentInfo { version: shorten(raw.version), commands })
    }

    /// Whether the agent holds file systems frozen.
    pub async fn fsfreeze_status(&mut self, timeout: Duration) -> Result<FreezeStatus> {
        self.execute("guest-fsfreeze-status", (), timeout).await
    }

    /// Freezes the file systems mounted at `mountpoints`, or all if it is empty; returns how many are frozen.
    ///
    /// Zero means that the guest is *not* quiesced. After any error but a refusal the guest counts as frozen.
    pub async fn freeze(&mut self, mountpoints: &[String], timeout: Duration) -> Result<u64> {
        if mountpoints.is_empty() {
            return self.execute("guest-fsfreeze-freeze", (), timeout).await;
        }
        self.execute("guest-fsfreeze-freeze-list", json!({ "mountpoints": mountpoints }), timeout).await
    }

    /// Thaws all; returns how many were thawed. Fewer than were frozen means that the window was broken.
    ///
    /// On a stream that is out of step the sync and the thaw leave together: even if this call times out, the agent
    /// thaws when it gets to it.
    pub async fn thaw(&mut self, timeout: Duration) -> Result<u64> {
        if self.needs_sync() {
            return self.execute_at_any_time("guest-fsfreeze-thaw", timeout).await;
        }
        self.execute("guest-fsfreeze-thaw", (), timeout).await
    }

    /// The file systems that are mounted in the guest. Not available while it is frozen.
    pub async fn filesystems(&mut self, timeout: Duration) -> Result<Vec<Filesystem>> {
        self.execute("guest-get-fsinfo", (), timeout).await
    }

    /// Runs a program in the guest and waits for its end; returns its exit code, or 128 + N if signal N ended it.
    ///
    /// After a timeout the program may still run.
    pub async fn exec(&mut self, path: &str, args: &[&str], timeout: Duration) -> Result<i64> {
        let deadline = deadline_after(timeout);
        let left = || deadline.saturating_duration_since(Instant::now());
        let arguments = json!({ "path": path, "arg": args, "capture-output": false });
        let Spawned { pid } = self.execute("guest-exec", arguments, timeout).await?;
        loop {
            let status: ExecStatus = self.execute("guest-exec-status", json!({ "pid": pid }), left()).await?;
            if status.exited {
                return Ok(exit_code(&status));
            }
            if left().is_zero() {
                return Err(Error::Timeout { command: "guest-exec".into(), after: timeout });
            }
            sleep(EXEC_POLL.min(left())).await;
        }
    }

    /// Asks for a sign of life.
    pub async fn ping(&mut self, timeout: Duration) -> Result<()> {
        self.execute::<IgnoredAny>("guest-ping", (), timeout).await.map(drop)
    }
}

fn exit_code(status: &ExecStatus) -> i64 {
    match (status.exitcode, status.signal) {
        (Some(code), _) => code,
        (None, Some(signal)) => signal.saturating_add(128),
        // The agent always gives one of the two; a program that ended for no reason did not succeed.
        (None, None) => -1,
    }
}
