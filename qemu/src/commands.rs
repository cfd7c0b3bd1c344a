//! Typed wrappers for the monitor's commands; each takes its time limit last.

use std::collections::{HashMap, HashSet};
use std::os::fd::BorrowedFd;
use std::time::Duration;

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::qmp::Qmp;

/// Whether and why the vCPUs run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct RunState {
    /// QEMU's word, such as `running`, `paused` or `io-error`; may be one we do not know.
    pub status: String,
    /// Whether the vCPUs run.
    pub running: bool,
}

/// A thread that runs block devices beside the main loop.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct IoThread {
    /// Its object id.
    pub id: String,
    /// Its thread id on the host.
    #[serde(default)]
    pub thread_id: i64,
}

/// A character device, such as the guest agent's channel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Chardev {
    /// Its id.
    pub label: String,
    /// What is behind it, in QEMU's words.
    pub filename: String,
    /// Whether the guest has its end open. A hung agent keeps it open.
    pub frontend_open: bool,
}

/// A background job.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Job {
    /// Its id.
    pub id: String,
    /// Such as `commit`, `stream` or `backup`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Such as `running`, `ready`, `pending` or `concluded`.
    pub status: String,
    /// Work done, in units that grow towards `total_progress`.
    pub current_progress: u64,
    /// Work in all, in the same units; may grow.
    pub total_progress: u64,
    /// Why it failed, if it did: for display only.
    pub error: Option<String>,
}

/// Descriptors that QEMU opens as `/dev/fdset/<id>`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct FdSet {
    /// The set's number.
    #[serde(rename = "fdset-id")]
    pub id: i64,
    /// What is in it.
    #[serde(default)]
    pub fds: Vec<Fd>,
}

/// A descriptor in a set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Fd {
    /// Its number in QEMU's process.
    pub fd: i64,
    /// What was said of it when it was added.
    #[serde(default)]
    pub opaque: Option<String>,
}

/// By device, of its reads, writes and flushes: how many there were, and nanoseconds that they took together.
pub type BlockStats = HashMap<String, [(u64, u64); 3]>;

#[derive(Default, Deserialize)]
#[serde(default)]
struct DeviceStats {
    device: String,
    qdev: String,
    stats: Counters,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Counters {
    rd_operations: u64,
    rd_total_time_ns: u64,
    wr_operations: u64,
    wr_total_time_ns: u64,
    wr_bytes: u64,
    flush_operations: u64,
    flush_total_time_ns: u64,
}

impl DeviceStats {
    fn name(&self) -> String {
        if self.qdev.is_empty() { self.device.clone() } else { self.qdev.clone() }
    }

    fn counted(self) -> Option<(String, [(u64, u64); 3])> {
        let name = self.name();
        let Counters { rd_operations, wr_operations, flush_operations, .. } = self.stats;
        let counters = [
            (rd_operations, self.stats.rd_total_time_ns),
            (wr_operations, self.stats.wr_total_time_ns),
            (flush_operations, self.stats.flush_total_time_ns),
        ];
        (!name.is_empty()).then_some((name, counters))
    }
}

#[derive(Deserialize)]
struct Name {
    name: Option<String>,
}

#[derive(Deserialize)]
struct Migration {
    status: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct SchemaEntry {
    name: String,
    meta_type: String,
}

impl Qmp {
    /// Whether and why the VM runs.
    pub async fn query_status(&self, timeout: Duration) -> Result<RunState> {
        self.execute("query-status", (), timeout).await
    }

    /// The VM's `-name`, if it has one.
    pub async fn query_name(&self, timeout: Duration) -> Result<Option<String>> {
        Ok(self.execute::<Name>("query-name", (), timeout).await?.name)
    }

    /// The VM's iothreads.
    pub async fn query_iothreads(&self, timeout: Duration) -> Result<Vec<IoThread>> {
        self.execute("query-iothreads", (), timeout).await
    }

    /// The state of a migration, such as `active` or `completed`; none if there was never one.
    pub async fn query_migrate_status(&self, timeout: Duration) -> Result<Option<String>> {
        Ok(self.execute::<Migration>("query-migrate", (), timeout).await?.status)
    }

    /// The VM's character devices.
    pub async fn query_chardevs(&self, timeout: Duration) -> Result<Vec<Chardev>> {
        self.execute("query-chardev", (), timeout).await
    }

    /// Stops the vCPUs. Success does *not* mean that flushing the disks succeeded.
    pub async fn stop(&self, timeout: Duration) -> Result<()> {
        self.run("stop", (), timeout).await
    }

    /// Lets the vCPUs run. Also clears an I/O error's pause: ask for the state before.
    pub async fn cont(&self, timeout: Duration) -> Result<()> {
        self.run("cont", (), timeout).await
    }

    /// Presses the power button.
    pub async fn system_powerdown(&self, timeout: Duration) -> Result<()> {
        self.run("system_powerdown", (), timeout).await
    }

    /// Ends QEMU. That the connection closes before the answer arrives is success too.
    pub async fn quit(&self, timeout: Duration) -> Result<()> {
        match self.run("quit", (), timeout).await {
            Err(Error::Closed) => Ok(()),
            other => other,
        }
    }

    /// Runs all actions at one instant, or none.
    pub async fn transaction(&self, actions: &[Value], timeout: Duration) -> Result<()> {
        self.run("transaction", json!({ "actions": actions }), timeout).await
    }

    /// Opens a node.
    pub async fn blockdev_add(&self, options: &Value, timeout: Duration) -> Result<()> {
        self.run("blockdev-add", options, timeout).await
    }

    /// Closes a node that nothing uses.
    pub async fn blockdev_del(&self, node: &str, timeout: Duration) -> Result<()> {
        self.run("blockdev-del", json!({ "node-name": node }), timeout).await
    }

    /// Replaces nodes' options, all or none. QEMU refuses nodes that it named itself.
    pub async fn blockdev_reopen(&self, options: &[Value], timeout: Duration) -> Result<()> {
        self.run("blockdev-reopen", json!({ "options": options }), timeout).await
    }

    /// Starts a job that moves data down the chain.
    pub async fn block_commit(&self, arguments: &Value, timeout: Duration) -> Result<()> {
        self.run("block-commit", arguments, timeout).await
    }

    /// Starts a job that pulls data up the chain.
    pub async fn block_stream(&self, arguments: &Value, timeout: Duration) -> Result<()> {
        self.run("block-stream", arguments, timeout).await
    }

    /// Lets a job that is `ready` finish.
    pub async fn job_complete(&self, id: &str, timeout: Duration) -> Result<()> {
        self.run("job-complete", json!({ "id": id }), timeout).await
    }

    /// Asks a job to stop.
    pub async fn job_cancel(&self, id: &str, timeout: Duration) -> Result<()> {
        self.run("job-cancel", json!({ "id": id }), timeout).await
    }

    /// Forgets a job that is `concluded`.
    pub async fn job_dismiss(&self, id: &str, timeout: Duration) -> Result<()> {
        self.run("job-dismiss", json!({ "id": id }), timeout).await
    }

    /// Lets a job that is `pending` make its graph changes.
    pub async fn job_finalize(&self, id: &str, timeout: Duration) -> Result<()> {
        self.run("job-finalize", json!({ "id": id }), timeout).await
    }

    /// What was done on each device since QEMU started.
    pub async fn query_blockstats(&self, timeout: Duration) -> Result<BlockStats> {
        let devices: Vec<DeviceStats> = self.execute("query-blockstats", (), timeout).await?;
        Ok(devices.into_iter().filter_map(DeviceStats::counted).collect())
    }

    /// What was written to each device since QEMU started, in bytes; by name as in [`Self::query_blockstats`].
    pub async fn query_written_bytes(&self, timeout: Duration) -> Result<HashMap<String, u64>> {
        let devices: Vec<DeviceStats> = self.execute("query-blockstats", (), timeout).await?;
        Ok(devices.into_iter().map(|device| (device.name(), device.stats.wr_bytes)).collect())
    }

    /// All jobs, also those of others.
    pub async fn query_jobs(&self, timeout: Duration) -> Result<Vec<Job>> {
        self.execute("query-jobs", (), timeout).await
    }

    /// Gives QEMU a duplicate of `fd` in set `fdset`, which is made if it does not exist.
    pub async fn add_fd(&self, fdset: i64, opaque: &str, fd: BorrowedFd<'_>, timeout: Duration) -> Result<()> {
        let arguments = json!({ "fdset-id": fdset, "opaque": opaque });
        self.execute_with_fd::<IgnoredAny>("add-fd", arguments, fd, timeout).await.map(drop)
    }

    /// Removes a set; QEMU closes its descriptors once no node uses them.
    pub async fn remove_fdset(&self, fdset: i64, timeout: Duration) -> Result<()> {
        self.run("remove-fd", json!({ "fdset-id": fdset }), timeout).await
    }

    /// All sets, also those of others.
    pub async fn query_fdsets(&self, timeout: Duration) -> Result<Vec<FdSet>> {
        self.execute("query-fdsets", (), timeout).await
    }

    /// Whether this QEMU has a command; its schema is read once per connection.
    pub async fn query_schema_has(&self, command: &str, timeout: Duration) -> Result<bool> {
        let commands = self.schema().get_or_try_init(|| async {
            let entries: Vec<SchemaEntry> = self.execute("query-qmp-schema", (), timeout).await?;
            let commands = entries.into_iter().filter(|entry| entry.meta_type == "command").map(|entry| entry.name);
            Ok::<HashSet<_>, Error>(commands.collect())
        });
        Ok(commands.await?.contains(command))
    }

    /// A command whose answer says nothing.
    async fn run(&self, command: &str, arguments: impl Serialize, timeout: Duration) -> Result<()> {
        self.execute::<IgnoredAny>(command, arguments, timeout).await.map(drop)
    }
}
