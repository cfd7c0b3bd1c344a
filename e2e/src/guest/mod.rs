//! Real guests: QEMU with our own kernel and initramfs, by TCG, with the sockets an agent expects and private ones for us.

mod command_line;
mod config;
mod verify;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::Signal;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

pub(crate) use config::DISK_NAMES;
pub use config::{Agent, GuestConfig, Load, Style, Trouble};
pub use verify::{Verified, verify_by_booting};

use crate::{Cache, Disk, Heartbeat, Invocation, Monitor, Process, await_condition};

/// Ending the load, unmounting and powering off.
const DOWN: Duration = Duration::from_secs(60);

/// A running guest; killed on drop.
#[derive(Debug)]
pub struct Guest {
    process: Process,
    invocation: Invocation,
    monitor: Monitor,
    heartbeat: Heartbeat,
    config: GuestConfig,
}

impl Guest {
    /// Starts QEMU and waits until the guest has mounted its disks, started its load and, if it has one, its agent.
    ///
    /// Never touches `qga.sock` and `qmp.sock`: these belong to the program under test.
    pub async fn boot(config: GuestConfig) -> Result<Self> {
        std::fs::create_dir_all(config.socket_directory())?;
        std::fs::create_dir_all(&config.directory)?;
        let invocation = command_line::build(&Cache::locate()?, &config)?;
        Self::start(invocation, config, Patience::None).await
    }

    async fn start(invocation: Invocation, config: GuestConfig, patience: Patience) -> Result<Self> {
        let console = config.file("console.log");
        if console.exists() {
            // QEMU empties it a little later, and until then the last boot's lines would pass for this one's.
            std::fs::remove_file(&console)?;
        }
        let mut process = Process::spawn("qemu", &invocation, &config.directory)?;
        let monitor = await_condition("QEMU's monitor", config.boot_bound, async || {
            if patience == Patience::UntilUnlocked && process.exit_status()?.is_some() {
                process = Process::spawn("qemu", &invocation, &config.directory)?;
            }
            process.ensure_running()?;
            Monitor::connect(&config.file("test-qmp.sock")).await.map(Some)
        })
        .await?;
        let heartbeat = Heartbeat::listen(&config.file("heartbeat.sock"))?;
        let mut guest = Self { process, invocation, monitor, heartbeat, config };
        guest.await_up().await.with_context(|| format!("console:\n{}", guest.console().unwrap_or_default()))?;
        Ok(guest)
    }

    async fn await_up(&mut self) -> Result<()> {
        await_condition("the guest to be up", self.config.boot_bound, async || {
            self.process.ensure_running()?;
            let agent_ready = self.config.agent == Agent::Off || self.monitor.port_is_open("qga").await?;
            let load_runs = self.config.load == Load::None || self.records_written() > 0;
            Ok((agent_ready && load_runs && self.console()?.contains("guest: up")).then_some(()))
        })
        .await
    }

    /// What it was booted with.
    #[must_use]
    pub fn config(&self) -> &GuestConfig {
        &self.config
    }

    /// QEMU's process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// The exact command line: what "start it again as before" means.
    #[must_use]
    pub fn command_line(&self) -> Vec<OsString> {
        self.invocation.line()
    }

    /// The tests' own monitor.
    #[must_use]
    pub fn monitor(&self) -> &Monitor {
        &self.monitor
    }

    /// What the guest printed on its console since it was started.
    pub fn console(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&std::fs::read(self.config.file("console.log"))?).into_owned())
    }

    /// The beats of its writer.
    #[must_use]
    pub fn heartbeat(&self) -> &Heartbeat {
        &self.heartbeat
    }

    /// The longest time since `since` that the guest's writer stood still.
    #[must_use]
    pub fn heartbeat_gap(&self, since: Instant) -> Duration {
        self.heartbeat.gap(since)
    }

    /// Number of the last record known durable on both disks.
    #[must_use]
    pub fn records_written(&self) -> u64 {
        self.heartbeat.records_written()
    }

    /// Waits until the writer has got `more` records further: the guest runs and its disks take writes.
    pub async fn await_records(&self, more: u64, bound: Duration) -> Result<u64> {
        let wanted = self.records_written() + more;
        let what = format!("record {wanted} of {}", self.config.name);
        await_condition(&what, bound, async || {
            let written = self.records_written();
            Ok((written >= wanted).then_some(written))
        })
        .await
    }

    /// Lets the freezes go that [`Trouble::SlowFreeze`] keeps waiting, now and from now on.
    pub async fn release_freeze(&self) -> Result<()> {
        let mut control = UnixStream::connect(self.config.file("control.sock")).await?;
        control.write_all(b"release\n").await?;
        // The connection is kept until the guest has heard: QEMU drops what it hasn't passed on by the end of it.
        await_condition("the freeze to be released", DOWN, async || {
            Ok(self.console()?.contains("freeze released").then_some(()))
        })
        .await
    }

    /// QEMU dies on the spot, as by the kernel's out-of-memory killer.
    pub fn kill(mut self) -> Result<Stopped> {
        self.process.kill_9()?;
        Ok(self.stopped())
    }

    /// QEMU ends itself, the guest's caches are lost: what `quit` on a monitor does.
    pub fn quit(mut self) -> Result<Stopped> {
        // SIGTERM is the same as `quit` to QEMU, and needs no monitor that answers before the end.
        self.process.signal(Signal::TERM)?;
        self.process.wait(DOWN)?;
        Ok(self.stopped())
    }

    /// QEMU ends by somebody else's doing.
    pub async fn await_end(mut self) -> Result<Stopped> {
        await_condition("QEMU to be ended", DOWN, async || self.process.exit_status()).await?;
        Ok(self.stopped())
    }

    /// The guest ends its load, unmounts and powers off.
    pub async fn quiesce_and_quit(mut self) -> Result<Stopped> {
        let mut control = UnixStream::connect(self.config.file("control.sock")).await?;
        control.write_all(b"poweroff\n").await?;
        await_condition("the guest to power off", DOWN, async || self.process.exit_status()).await?;
        Ok(self.stopped())
    }

    fn stopped(self) -> Stopped {
        Stopped { records_written: self.records_written(), invocation: self.invocation, config: self.config }
    }
}

/// Whether QEMU is started again when it ends before its monitor answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Patience {
    None,
    UntilUnlocked,
}

/// A guest that does not run any more.
#[derive(Debug)]
pub struct Stopped {
    invocation: Invocation,
    config: GuestConfig,
    records_written: u64,
}

impl Stopped {
    /// Starts QEMU with the very same arguments, whatever has happened to the files in the meantime.
    pub async fn restart_same_command_line(self) -> Result<Guest> {
        Guest::start(self.invocation, self.config, Patience::None).await
    }

    /// Starts QEMU as before, but for its disks' images.
    pub async fn restart_with(mut self, disks: Vec<Disk>) -> Result<Guest> {
        self.config.disks = disks;
        let invocation = command_line::build(&Cache::locate()?, &self.config)?;
        Guest::start(invocation, self.config, Patience::None).await
    }

    /// The same, again and again while QEMU ends at once because somebody else has an image locked.
    pub async fn restart_when_unlocked(self) -> Result<Guest> {
        Guest::start(self.invocation, self.config, Patience::UntilUnlocked).await
    }

    /// Number of the last record that the guest was told is durable on both disks, as far as we heard.
    #[must_use]
    pub fn records_written(&self) -> u64 {
        self.records_written
    }

    /// Its images, in the order of its disks.
    #[must_use]
    pub fn images(&self) -> Vec<PathBuf> {
        self.config.disks.iter().map(|disk| disk.path.clone()).collect()
    }
}
