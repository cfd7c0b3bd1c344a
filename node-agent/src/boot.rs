//! Whether a set of disks starts: a throw-away QEMU, sealed, that changes nothing.
//!
//! It has no network, its writes go to temporary files that vanish with it (`snapshot=on`), its memory and its time are
//! bounded, and only so many run at once on the node. What runs in it is a guest, so it is as hostile as any.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use freezeframe_api::v1alpha1::{BootCheck, BootResult};
use freezeframe_qemu::Error as QemuError;
use serde::Deserialize;
use serde_json::json;
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep};

use crate::causes::chain;
use crate::hypervisor::image::{ImageError, ImageRoots};
use crate::hypervisor::still::{SANDBOX, has_sandbox};
use crate::hypervisor::target_file::BootWith;
use crate::hypervisor::{QMP_TIMEOUT, Vm, VmKey};

/// Machine of a guest whose file names none.
const MACHINE: &str = "q35";
/// Port of the guest agent.
const AGENT_PORT: &str = "org.qemu.guest_agent.0";
/// What one QEMU may write into one temporary file, in bytes.
const MOST_WRITTEN: u64 = 4 << 30;
/// A firmware that finds nothing to start reads less than this from all disks together, in bytes.
const FIRMWARE_READS: u64 = 64 << 10;
/// How long the guest agent may take to answer one sync.
const SYNC: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(300);

/// A disk to start from, in the order in which the firmware tries them.
#[derive(Clone, Debug)]
pub struct BootDisk {
    /// Its image.
    pub path: PathBuf,
    /// Format of the image.
    pub format: String,
}

/// Why disks couldn't be started at all.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// QEMU couldn't be started.
    #[error("failed to start a QEMU to try the disks")]
    Start(#[source] std::io::Error),
    /// Its monitor couldn't be used.
    #[error("failed to reach the QEMU that tries the disks: {0}")]
    Reach(String),
    /// A file that the guest is to be started with can't be used.
    #[error(transparent)]
    File(#[from] ImageError),
    /// A word that would be more than a value on QEMU's command line.
    #[error("`{0}` can't be used to start a guest")]
    Word(String),
}

/// What may be started on this node.
#[derive(Debug)]
pub struct Boots {
    memory_mib: u32,
    timeout: Duration,
    accelerator: Accelerator,
    turns: Semaphore,
}

/// What runs the guests' instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Accelerator {
    /// KVM where the node has it, else emulation.
    Auto,
    /// Emulation alone, for a node whose KVM can't be relied on.
    Tcg,
}

impl Accelerator {
    fn arguments(self) -> &'static [&'static str] {
        // Without a bound, translated code may take a gigabyte.
        const TCG: &str = "tcg,tb-size=64";
        match self {
            Self::Auto => &["-accel", "kvm", "-accel", TCG],
            Self::Tcg => &["-accel", TCG],
        }
    }
}

impl Boots {
    /// So much memory for each, so long, and so many at once.
    #[must_use]
    pub fn new(memory_mib: u32, timeout: Duration, at_once: usize, accelerator: Accelerator) -> Self {
        Self { memory_mib, timeout, accelerator, turns: Semaphore::new(at_once.max(1)) }
    }

    /// Starts from the disks and says how far that came. The disks aren't changed. That it couldn't be tried says nothing of
    /// them.
    pub async fn check(&self, disks: &[BootDisk], with: &BootWith, roots: &ImageRoots) -> BootCheck {
        self.attempt(disks, with, roots).await.unwrap_or_else(|error| BootCheck {
            result: BootResult::NotTried,
            seconds: 0,
            message: Some(chain(&error)),
        })
    }

    async fn attempt(&self, disks: &[BootDisk], with: &BootWith, roots: &ImageRoots) -> Result<BootCheck, BootError> {
        let mut arguments = self.arguments(disks, with, roots)?;
        arguments.extend(self.accelerator.arguments().iter().map(ToString::to_string));
        if has_sandbox().await {
            arguments.extend(["-sandbox", SANDBOX].map(Into::into));
        }
        // Closed never, so waiting is all that can come of it.
        let _turn = self.turns.acquire().await;
        let begun = Instant::now();
        let mut trial = Trial::start(arguments)?;
        let result = trial.watch(begun + self.timeout).await;
        trial.end().await;
        let seconds = i32::try_from(begun.elapsed().as_millis().div_ceil(1000)).unwrap_or(i32::MAX);
        Ok(BootCheck { result: result?, seconds, message: None })
    }

    fn arguments(&self, disks: &[BootDisk], with: &BootWith, roots: &ImageRoots) -> Result<Vec<String>, BootError> {
        let memory = with.memory_mib.unwrap_or(self.memory_mib).min(self.memory_mib);
        let machine = word(with.machine.as_deref().unwrap_or(MACHINE))?;
        let mut arguments: Vec<String> = ["-machine", &machine, "-m", &memory.to_string()].map(Into::into).into();
        for (option, file) in [("-kernel", &with.kernel), ("-initrd", &with.initrd)] {
            if let Some(file) = file {
                let (directory, name) = roots.directory_of(file)?;
                directory.id(&name)?.ok_or_else(|| ImageError::NotRegular(file.clone()))?;
                arguments.extend([option.into(), file.display().to_string()]);
            }
        }
        // Only a kernel has a command line; QEMU refuses one without.
        if with.kernel.is_some() {
            arguments.extend(["-append".into(), with.append.clone().unwrap_or_default()]);
        }
        for (at, disk) in disks.iter().enumerate() {
            let path = disk.path.to_str().ok_or_else(|| BootError::Word(disk.path.display().to_string()))?;
            let format = word(&disk.format)?;
            // Doubled, a comma is part of the name.
            let file = path.replace(',', ",,");
            arguments.extend(["-drive".into(), format!("if=none,id=d{at},format={format},snapshot=on,file={file}")]);
            // A kernel that QEMU loads itself is the first thing to boot, and its number is taken.
            let order = if with.kernel.is_some() { String::new() } else { format!(",bootindex={at}") };
            arguments.extend(["-device".into(), format!("virtio-blk-pci,drive=d{at}{order}")]);
        }
        Ok(arguments)
    }
}

/// One value, with nothing in it that QEMU's option parser would take apart.
fn word(text: &str) -> Result<String, BootError> {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    if text.is_empty() || text.starts_with('-') || !text.bytes().all(inner) {
        return Err(BootError::Word(text.to_owned()));
    }
    Ok(text.to_owned())
}

#[derive(Deserialize)]
struct DeviceStatistics {
    stats: Statistics,
}

#[derive(Deserialize)]
struct Statistics {
    rd_bytes: u64,
}

/// A running QEMU; it ends when this is dropped, or when this process does.
struct Trial {
    process: Child,
    directory: TempDir,
    key: VmKey,
}

impl Trial {
    fn start(arguments: Vec<String>) -> Result<Self, BootError> {
        let directory = TempDir::with_prefix("freezeframe-boot-").map_err(BootError::Start)?;
        let key = VmKey { namespace: "boot".into(), name: "trial".into() };
        let sockets = directory.path().join(key.socket(""));
        std::fs::create_dir_all(&sockets).map_err(BootError::Start)?;
        let process = command(&sockets, arguments).spawn().map_err(BootError::Start)?;
        Ok(Self { process, directory, key })
    }

    /// Waits for the guest agent's answer, QEMU's end, or the end of the time.
    async fn watch(&mut self, end: Instant) -> Result<BootResult, BootError> {
        let mut vm = self.connect(end).await?;
        let mut read = 0;
        while Instant::now() < end {
            if vm.connect_agent(SYNC).await.is_ok() {
                return Ok(BootResult::AgentAnswered);
            }
            match bytes_read(&vm).await {
                Ok(bytes) => read = bytes,
                // The guest powered itself off, or reset, which ends this QEMU.
                Err(_) if self.process.try_wait().is_ok_and(|ended| ended.is_some()) => break,
                Err(error) => tracing::debug!(%error, "how much a guest on trial has read isn't known"),
            }
            sleep(POLL).await;
        }
        Ok(if read > FIRMWARE_READS { BootResult::ReachedBootLoader } else { BootResult::NothingBooted })
    }

    async fn connect(&mut self, end: Instant) -> Result<Vm, BootError> {
        loop {
            match Vm::open(self.directory.path(), &self.key).await {
                Ok(vm) => return Ok(vm),
                Err(error) if Instant::now() > end => return Err(BootError::Reach(error.to_string())),
                Err(_) => sleep(Duration::from_millis(20)).await,
            }
            if let Some(ended) = self.process.try_wait().map_err(BootError::Start)? {
                let said = std::fs::read_to_string(self.directory.path().join(SAID)).unwrap_or_default();
                return Err(BootError::Reach(format!("it ended at once, with {ended}: {}", said.trim())));
            }
        }
    }

    async fn end(&mut self) {
        if let Err(error) = self.process.kill().await {
            tracing::error!(%error, "a QEMU on trial can't be ended");
        }
    }
}

async fn bytes_read(vm: &Vm) -> Result<u64, QemuError> {
    let devices: Vec<DeviceStatistics> = vm.qmp().execute("query-blockstats", json!({}), QMP_TIMEOUT).await?;
    Ok(devices.iter().map(|device| device.stats.rd_bytes).sum())
}

/// What QEMU prints before its end.
const SAID: &str = "said";

fn command(sockets: &Path, arguments: Vec<String>) -> Command {
    // The parent's death must end it, and its temporary files have a bound.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "prlimit", &format!("--fsize={MOST_WRITTEN}"), "--core=0", "--"]);
    command.args(["nice", "-n", "10", "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot"]);
    command.args(["-display", "none", "-nic", "none", "-name", "freezeframe-boot"]);
    command.args(["-smp", "1"]);
    // Relative names: a socket's path has 108 bytes.
    command.args(["-qmp", "unix:qmp.sock,server=on,wait=off", "-device", "virtio-serial-pci"]);
    command.args(["-chardev", "socket,id=agent,path=qga.sock,server=on,wait=off"]);
    command.args(["-device", &format!("virtserialport,chardev=agent,name={AGENT_PORT}")]);
    command.args(arguments).current_dir(sockets).env("TMPDIR", sockets);
    command.stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
    let said = sockets.ancestors().nth(2).and_then(|root| std::fs::File::create(root.join(SAID)).ok());
    command.stderr(said.map_or_else(Stdio::null, Stdio::from));
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(with: &BootWith, disks: &[BootDisk]) -> Result<Vec<String>, BootError> {
        let roots = ImageRoots::new(vec![std::env::temp_dir()]);
        Boots::new(512, Duration::from_secs(1), 1, Accelerator::Tcg).arguments(disks, with, &roots)
    }

    #[test]
    fn disks_are_opened_so_that_nothing_is_written_and_names_stay_names() {
        let disk = BootDisk { path: "/images/a,b.qcow2".into(), format: "qcow2".into() };
        let words = arguments(&BootWith::default(), &[disk]).unwrap();
        assert!(words.contains(&"if=none,id=d0,format=qcow2,snapshot=on,file=/images/a,,b.qcow2".to_owned()));
        let disk = BootDisk { path: "/images/a".into(), format: "raw,if=none".into() };
        assert!(matches!(arguments(&BootWith::default(), &[disk]), Err(BootError::Word(_))));
    }

    #[test]
    fn a_file_may_ask_for_less_memory_but_not_for_more_and_for_no_file_outside_the_roots() {
        for (asked, given) in [(Some(64), "64"), (Some(4096), "512"), (None, "512")] {
            let words = arguments(&BootWith { memory_mib: asked, ..Default::default() }, &[]).unwrap();
            assert_eq!(words[3], given);
        }
        let kernel = BootWith { kernel: Some("/etc/hostname".into()), ..Default::default() };
        assert!(matches!(arguments(&kernel, &[]), Err(BootError::File(ImageError::OutsideRoots(_)))));
        let machine = BootWith { machine: Some("pc,accel=kvm".into()), ..Default::default() };
        assert!(matches!(arguments(&machine, &[]), Err(BootError::Word(_))));
    }
}
