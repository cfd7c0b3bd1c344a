//! A VM that plays the node: Debian with LVM, QEMU and a kernel of its own, for storage that the host doesn't have.
//!
//! One VM is one test's: its root disk is thrown away when it ends. Files go in as a read-only disk at `/share`;
//! commands run in it through its guest agent.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use crate::{Cache, Invocation, Process, await_condition, run};

/// Exec to a running guest agent is 5 s on an idle machine.
const UP: Duration = Duration::from_secs(180);
const REPLY: Duration = Duration::from_secs(30);
/// An unanswered greeting is asked again on a new connection: the guest wasn't there yet.
const GREETING: Duration = Duration::from_secs(2);
/// Its clock goes by instructions, two nanoseconds each: what is timed inside, the product's bounds above all, takes the
/// same time however busy this host is. Only one virtual CPU does that. What the CPU lacks are instructions that the
/// kernel would prefer and that are slow to emulate.
const MACHINE: &str = "-machine q35 -accel tcg,thread=single,tb-size=256 -icount shift=1 -rtc clock=vm -smp 1 \
                       -cpu max,-erms,-fsrm,-la57,-smap \
                       -nodefaults -no-user-config -display none -no-reboot -device virtio-serial-pci \
                       -object rng-random,id=rng,filename=/dev/urandom -device virtio-rng-pci,rng=rng";
const KERNEL: &str =
    "console=ttyS0 quiet panic=-1 clocksource=acpi_pm no_timer_check random.trust_cpu=on mitigations=off";
/// For commands inside: those of a root shell.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a node VM is booted with.
#[derive(Clone, Debug)]
pub struct NodeVmConfig {
    /// For its sockets, disks and logs.
    pub directory: PathBuf,
    /// Memory, in MiB.
    pub memory_mib: u64,
    /// Size of the empty second disk, `/dev/vdb` inside, in MiB; it is sparse.
    pub data_mib: u64,
    /// Files that are in `/share`: path here, name there.
    pub share: Vec<(PathBuf, String)>,
}

/// How a command inside ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Its exit code; 128 and the number of the signal that killed it.
    pub code: i64,
    /// What it wrote to stdout and stderr together.
    pub output: String,
}

/// A running node VM; killed on drop.
#[derive(Debug)]
pub struct NodeVm {
    process: Process,
    directory: PathBuf,
    agent: BufReader<UnixStream>,
}

impl NodeVm {
    /// Starts QEMU and waits until the guest agent answers.
    pub async fn boot(config: &NodeVmConfig) -> Result<Self> {
        std::fs::create_dir_all(&config.directory)?;
        let data = config.directory.join("data.raw");
        std::fs::File::create(data)?.set_len(config.data_mib << 20)?;
        pack_share(config)?;
        let mut process = Process::spawn("node-vm", &command_line(config)?, &config.directory)?;
        let socket = config.directory.join("agent.sock");
        let agent = await_condition("the node VM's guest agent", UP, async || {
            process.ensure_running()?;
            greeted(&socket).await.map(Some)
        });
        let console = config.directory.join("console.log");
        let agent = agent.await.with_context(|| std::fs::read_to_string(console).unwrap_or_default())?;
        Ok(Self { process, directory: config.directory.clone(), agent })
    }

    /// Runs a shell command inside, at most for `bound`; what it says with its exit code is the caller's to judge.
    pub async fn ask(&mut self, command: &str, bound: Duration) -> Result<Ended> {
        let started = Instant::now();
        let arguments = json!({
            "path": "/bin/bash",
            "arg": ["-c", format!("exec 2>&1; {command}")],
            "env": [PATH, "HOME=/root", "LC_ALL=C"],
            "capture-output": true,
        });
        let pid = self.agent_command("guest-exec", arguments).await?["pid"].clone();
        let mut ticks = tokio::time::interval(Duration::from_millis(50));
        loop {
            ticks.tick().await;
            let status = self.agent_command("guest-exec-status", json!({"pid": pid})).await?;
            if status["exited"] == true {
                return ended(&status);
            }
            ensure!(started.elapsed() < bound, "`{command}` still runs in the node VM after {bound:?}");
        }
    }

    /// Runs a shell command inside that must succeed, and returns what it wrote.
    pub async fn run(&mut self, command: &str, bound: Duration) -> Result<String> {
        let Ended { code, output } = self.ask(command, bound).await?;
        ensure!(code == 0, "`{command}` ended with {code} in the node VM:\n{output}");
        Ok(output)
    }

    /// Kills the VM on the spot, as a power failure of the node.
    pub fn kill(mut self) -> Result<()> {
        self.process.kill_9()
    }

    /// What the VM printed on its console.
    pub fn console(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&std::fs::read(self.directory.join("console.log"))?).into_owned())
    }

    async fn agent_command(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        let reply = tokio::time::timeout(REPLY, exchange(&mut self.agent, &request)).await;
        reply.with_context(|| format!("no answer to {command} in {REPLY:?}"))?
    }
}

fn command_line(config: &NodeVmConfig) -> Result<Invocation> {
    let cache = Cache::locate()?;
    let file = |name: &str| config.directory.join(name).display().to_string();
    let disk = |path: &Path, options: &str| {
        ["-drive".to_owned(), format!("file={},format=raw,if=virtio,{options}", path.display())]
    };
    let agent = format!("socket,id=agent,path={},server=on,wait=off", file("agent.sock"));
    let console = format!("file,id=console,path={}", file("console.log"));
    let invocation = Invocation::new("qemu-system-x86_64")
        .args(["-name", "node", "-m", &config.memory_mib.to_string()])
        .args(MACHINE.split_whitespace())
        .args(["-kernel".as_ref(), cache.node_vm_file("vmlinuz")?.as_os_str()])
        .args(["-initrd".as_ref(), cache.node_vm_file("initrd")?.as_os_str()])
        .args(["-append", KERNEL])
        .args(["-chardev", &console, "-serial", "chardev:console"])
        .args(["-chardev", &agent, "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"])
        .args(disk(&cache.node_vm_file("root.raw")?, "snapshot=on"))
        .args(disk(&config.directory.join("data.raw"), "cache=unsafe,discard=unmap"));
    if config.share.is_empty() {
        return Ok(invocation);
    }
    Ok(invocation.args(disk(&config.directory.join("share.raw"), "readonly=on")))
}

/// Makes the disk that `/share` is mounted from.
fn pack_share(config: &NodeVmConfig) -> Result<()> {
    const SLACK: u64 = 32 << 20;
    if config.share.is_empty() {
        return Ok(());
    }
    let (tree, image) = (config.directory.join("share"), config.directory.join("share.raw"));
    std::fs::create_dir_all(&tree)?;
    let mut bytes = SLACK;
    for (path, name) in &config.share {
        bytes += std::fs::copy(path, tree.join(name)).with_context(|| format!("copying {}", path.display()))?;
    }
    std::fs::File::create(&image)?.set_len((bytes + bytes / 8).next_multiple_of(1 << 20))?;
    let options = ["-q", "-t", "ext4", "-O", "^has_journal", "-L", "share", "-d"].map(Path::new);
    run("mke2fs", options.into_iter().chain([tree.as_path(), image.as_path()]))?;
    std::fs::remove_dir_all(tree).context("removing the share's files")
}

/// A connection on which the guest agent has answered.
async fn greeted(socket: &Path) -> Result<BufReader<UnixStream>> {
    let mut stream = BufReader::new(UnixStream::connect(socket).await?);
    let id = std::time::UNIX_EPOCH.elapsed()?.subsec_nanos();
    let request = json!({"execute": "guest-sync", "arguments": {"id": id}});
    let greet = async {
        let mut answer = exchange(&mut stream, &request).await?;
        // Answers to greetings of earlier connections come first.
        while answer != id {
            answer = reply(&mut stream).await?;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(GREETING, greet).await.context("the guest agent doesn't answer")??;
    Ok(stream)
}

async fn exchange(stream: &mut BufReader<UnixStream>, request: &Value) -> Result<Value> {
    stream.write_all(format!("{request}\n").as_bytes()).await?;
    reply(stream).await
}

async fn reply(stream: &mut BufReader<UnixStream>) -> Result<Value> {
    let mut line = String::new();
    ensure!(stream.read_line(&mut line).await? > 0, "QEMU closed the guest agent's channel");
    let mut message: Value = serde_json::from_str(&line).context("malformed answer of the guest agent")?;
    match message.get_mut("return") {
        Some(value) => Ok(value.take()),
        None => bail!("the guest agent refused: {line}"),
    }
}

fn ended(status: &Value) -> Result<Ended> {
    let code = status["exitcode"].as_i64().or_else(|| status["signal"].as_i64().map(|signal| 128 + signal));
    let output = status["out-data"].as_str().map(decode).transpose()?.unwrap_or_default();
    Ok(Ended { code: code.context("a command ended without a code")?, output })
}

/// Base64, as the guest agent writes it.
fn decode(text: &str) -> Result<String> {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bytes, mut bits, mut held) = (Vec::with_capacity(text.len() / 4 * 3), 0u32, 0);
    for digit in text.bytes().filter(|digit| *digit != b'=') {
        let value = ALPHABET.iter().position(|known| *known == digit).context("malformed base64")?;
        bits = (bits << 6 | u32::try_from(value)?) & 0xff_ffff;
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push(u8::try_from(bits >> held & 0xff)?);
        }
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_every_length_is_read() {
        for (text, plain) in [("", ""), ("YQ==", "a"), ("YWI=", "ab"), ("YWJj", "abc"), ("YWJjCg==", "abc\n")] {
            assert_eq!(decode(text).unwrap(), plain);
        }
        assert!(decode("a*b=").is_err());
    }

    #[test]
    fn a_command_that_a_signal_killed_has_a_code_too() {
        assert_eq!(ended(&json!({"exited": true, "signal": 9})).unwrap().code, 137);
        assert!(ended(&json!({"exited": true})).is_err());
    }
}
