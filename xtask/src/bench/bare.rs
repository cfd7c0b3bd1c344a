//! What a careful person's script does by hand: prepare, freeze, cut, thaw. No guard, no names that change hands, nobody
//! to thaw if the script dies.

mod cuts;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use freezeframe_e2e::Guest;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::layer::Layers;
use super::table::Sample;
use cuts::Disk;

const SOON: Duration = Duration::from_secs(60);
const STALE_ANSWERS: usize = 16;

/// The script, connected to a guest's agent.
pub struct Script<'a> {
    guest: &'a Guest,
    agent: BufReader<UnixStream>,
    directory: PathBuf,
    layers: Layers,
}

/// Whether no disk before it has its layer.
fn is_first(disks: &[Disk<'_>], index: usize) -> bool {
    disks.iter().position(|disk| disk.layer == disks[index].layer) == Some(index)
}

impl<'a> Script<'a> {
    /// Connects; what QEMU writes goes to `directory`.
    pub async fn new(guest: &'a Guest, directory: &Path, layers: Layers) -> Result<Self> {
        std::fs::create_dir_all(directory)?;
        let stream = UnixStream::connect(guest.config().socket_directory().join("qga.sock")).await?;
        let mut script = Self { guest, agent: BufReader::new(stream), directory: directory.to_owned(), layers };
        script.send("guest-sync", json!({"id": 7})).await?;
        // Whoever was connected before may have left answers behind, refusals among them.
        for _ in 0..STALE_ANSWERS {
            if script.answer().await.is_ok_and(|answer| answer == 7) {
                return Ok(script);
            }
        }
        bail!("the guest agent answers others than us");
    }

    /// Cuts once, then clears away what was made.
    pub async fn round(&mut self, flush: bool) -> Result<Sample> {
        let disks = self.disks();
        for disk in &disks {
            disk.prepare().await?;
        }
        let start = Instant::now();
        if flush {
            self.flush().await?;
        }
        let asked = Instant::now();
        self.send("guest-fsfreeze-freeze", json!({})).await?;
        self.answer().await?;
        let frozen = Instant::now();
        let (pause, skew) = self.cut(&disks).await?;
        let thaw = Instant::now();
        self.send("guest-fsfreeze-thaw", json!({})).await?;
        self.answer().await?;
        self.guest.await_records(10, SOON).await?;
        let gap = self.guest.heartbeat_gap(start);
        for (index, disk) in disks.iter().enumerate() {
            disk.clear(is_first(&disks, index)).await?;
        }
        let (freeze, hold) = (millis(frozen - asked), millis(thaw - frozen));
        let (pause, skew) = (millis(pause), millis(skew));
        Ok(Sample { freeze, hold, skew, pause, gap: millis(gap), ready: None, writes: None })
    }

    fn disks(&self) -> Vec<Disk<'a>> {
        let images = (0..).zip(&self.guest.config().disks);
        let disk = |(index, image): (u8, &freezeframe_e2e::Disk)| {
            Disk::new(self.guest, self.layers.of(index.into()), index, &image.path, &self.directory)
        };
        images.map(disk).collect()
    }

    /// Cuts, with the virtual CPUs stopped if that is not QEMU's alone; how long they were, and how long the cuts took.
    async fn cut(&self, disks: &[Disk<'_>]) -> Result<(Duration, Duration)> {
        let pauses = disks.iter().any(|disk| !disk.is_cut_by_qemu());
        let stopped = Instant::now();
        if pauses {
            self.qmp("stop", json!({})).await?;
        }
        let began = Instant::now();
        let actions: Vec<_> = disks.iter().filter_map(Disk::action).collect();
        if !actions.is_empty() {
            self.qmp("transaction", json!({"actions": actions})).await?;
        }
        for (index, disk) in disks.iter().enumerate() {
            disk.cut(is_first(disks, index))?;
        }
        let skew = began.elapsed();
        if pauses {
            self.qmp("cont", json!({})).await?;
        }
        Ok((if pauses { stopped.elapsed() } else { Duration::ZERO }, skew))
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
