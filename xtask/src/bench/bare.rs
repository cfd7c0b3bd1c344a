//! What a careful person's script does by hand: prepared overlays, freeze, transaction, thaw. No guard, no names that
//! change hands, nobody to thaw if the script dies.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use freezeframe_e2e::{Guest, await_condition, run};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::table::{DISK_MIB, Sample};

const SOON: Duration = Duration::from_secs(60);

/// The script, connected to a guest's agent.
pub struct Script<'a> {
    guest: &'a Guest,
    agent: BufReader<UnixStream>,
    directory: PathBuf,
}

impl<'a> Script<'a> {
    /// Connects; overlays go to `directory`.
    pub async fn new(guest: &'a Guest, directory: &Path) -> Result<Self> {
        std::fs::create_dir_all(directory)?;
        let stream = UnixStream::connect(guest.config().socket_directory().join("qga.sock")).await?;
        let mut script = Self { guest, agent: BufReader::new(stream), directory: directory.to_owned() };
        // Whoever was connected before may have left an answer behind.
        script.send("guest-sync", json!({"id": 7})).await?;
        while script.answer().await? != 7 {}
        Ok(script)
    }

    /// Cuts once, then merges the overlays back.
    pub async fn round(&mut self, flush: bool) -> Result<Sample> {
        let disks = self.open_overlays().await?;
        let start = Instant::now();
        if flush {
            self.flush().await?;
        }
        let asked = Instant::now();
        self.send("guest-fsfreeze-freeze", json!({})).await?;
        self.answer().await?;
        let frozen = Instant::now();
        self.cut(&disks).await?;
        let thaw = Instant::now();
        self.send("guest-fsfreeze-thaw", json!({})).await?;
        self.answer().await?;
        self.guest.await_records(10, SOON).await?;
        let gap = self.guest.heartbeat_gap(start);
        for disk in &disks {
            self.merge(disk).await?;
        }
        let (freeze, hold) = (millis(frozen - asked), millis(thaw - frozen));
        Ok(Sample { freeze, hold, skew: hold, pause: 0.0, gap: millis(gap), ready: None, writes: None })
    }

    async fn open_overlays(&self) -> Result<Vec<&'static str>> {
        let disks: Vec<_> = ["vda", "vdb", "vdc", "vdd"].into_iter().take(self.guest.config().disks.len()).collect();
        for disk in &disks {
            let path = self.overlay(disk);
            let size = format!("{DISK_MIB}M");
            run("qemu-img", ["create", "-q", "-f", "qcow2", &path.to_string_lossy(), &size])?;
            let file = json!({"driver": "file", "filename": path});
            let node = json!({"driver": "qcow2", "node-name": format!("bare-{disk}"), "file": file, "backing": null});
            self.qmp("blockdev-add", node).await?;
        }
        Ok(disks)
    }

    async fn cut(&self, disks: &[&str]) -> Result<()> {
        let action = |disk: &&str| {
            let data = json!({"node": format!("fmt-{disk}"), "overlay": format!("bare-{disk}")});
            json!({"type": "blockdev-snapshot", "data": data})
        };
        let actions: Vec<_> = disks.iter().map(action).collect();
        self.qmp("transaction", json!({"actions": actions})).await.map(drop)
    }

    async fn merge(&self, disk: &str) -> Result<()> {
        let (overlay, job) = (format!("bare-{disk}"), format!("merge-{disk}"));
        let commit = json!({"job-id": job, "device": overlay, "base-node": format!("fmt-{disk}")});
        self.qmp("block-commit", commit).await?;
        await_condition("the merge to be ready", SOON, async || {
            Ok((self.job_status(&job).await? == "ready").then_some(()))
        })
        .await?;
        self.qmp("job-complete", json!({"id": job})).await?;
        await_condition("the merge to end", SOON, async || Ok(self.job_status(&job).await?.is_empty().then_some(())))
            .await?;
        self.qmp("blockdev-del", json!({"node-name": overlay})).await?;
        std::fs::remove_file(self.overlay(disk)).context("removing an overlay")
    }

    /// Empty when there is no such job.
    async fn job_status(&self, id: &str) -> Result<String> {
        let jobs = self.qmp("query-jobs", json!({})).await?;
        let job = jobs.as_array().and_then(|jobs| jobs.iter().find(|job| job["id"] == id));
        Ok(job.and_then(|job| job["status"].as_str()).unwrap_or_default().to_owned())
    }

    async fn flush(&mut self) -> Result<()> {
        self.send("guest-exec", json!({"path": "sync"})).await?;
        let pid = self.answer().await?["pid"].take();
        loop {
            self.send("guest-exec-status", json!({"pid": pid})).await?;
            if self.answer().await?["exited"] == true {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn overlay(&self, disk: &str) -> PathBuf {
        self.directory.join(format!("{disk}.qcow2"))
    }

    async fn qmp(&self, command: &str, arguments: Value) -> Result<Value> {
        self.guest.monitor().execute(command, arguments).await
    }

    async fn send(&mut self, command: &str, arguments: Value) -> Result<()> {
        let request = json!({"execute": command, "arguments": arguments});
        Ok(self.agent.write_all(format!("{request}\n").as_bytes()).await?)
    }

    async fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        tokio::time::timeout(SOON, self.agent.read_line(&mut line))
            .await
            .context("the guest agent doesn't answer")??;
        let mut answer: Value = serde_json::from_str(&line).with_context(|| format!("the guest agent said {line}"))?;
        match answer.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => bail!("the guest agent refused: {answer}"),
        }
    }
}

/// Milliseconds, with fractions.
pub fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
