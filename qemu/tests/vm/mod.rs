//! A QEMU of one test's own, killed when the test ends.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use freezeframe_qemu::{Qmp, connect_beneath};
use tempfile::TempDir;
use tokio::net::UnixStream;

const START: Duration = Duration::from_secs(60);

pub struct Vm {
    process: Child,
    dir: TempDir,
}

impl Vm {
    /// Starts QEMU in `dir` with vCPUs stopped. Each argument is an option and its value, parted by the first space.
    pub fn start(dir: TempDir, arguments: &[&str]) -> Self {
        let process = Command::new("qemu-system-x86_64")
            .current_dir(dir.path())
            .args("-M pc,accel=tcg -m 64 -nodefaults -display none -S -qmp unix:qmp.sock,server=on,wait=off".split(' '))
            .args(arguments.iter().flat_map(|argument| argument.splitn(2, ' ')))
            .stdin(Stdio::null())
            .spawn()
            .expect("these tests need qemu-system-x86_64");
        Self { process, dir }
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    /// A connection to the monitor's socket, once QEMU listens there.
    pub async fn connect(&self) -> UnixStream {
        let end = Instant::now() + START;
        loop {
            match connect_beneath(self.dir(), Path::new("qmp.sock"), START).await {
                Ok((stream, identity)) => {
                    assert_eq!(u32::try_from(identity.peer_pid).unwrap(), self.process.id());
                    return stream;
                }
                Err(error) => assert!(Instant::now() < end, "QEMU does not listen: {error:?}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn qmp(&self) -> Qmp {
        Qmp::connect(self.connect().await, START).await.unwrap()
    }

    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // A test that fails must leave no QEMU behind; one that ended it has nothing to kill.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

fn run(dir: &Path, program: &str, arguments: &[&str]) {
    let output = Command::new(program).current_dir(dir).args(arguments).output();
    let output = output.expect("these tests need QEMU's tools");
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An empty image of so many MiB.
pub fn image(dir: &Path, name: &str, format: &str, mebibytes: u64) {
    run(dir, "qemu-img", &["create", "-q", "-f", format, name, &format!("{mebibytes}M")]);
}

/// An overlay over an image that may be in use.
pub fn overlay(dir: &Path, name: &str, base: &str) {
    let size = virtual_size(dir, base);
    run(dir, "qemu-img", &["create", "-q", "-u", "-f", "qcow2", "-b", base, "-F", "qcow2", name, &size]);
}

fn virtual_size(dir: &Path, name: &str) -> String {
    let arguments = ["info", "-U", "--output=json", name];
    let output = Command::new("qemu-img").current_dir(dir).args(arguments).output().unwrap();
    let info: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    info["virtual-size"].to_string()
}

/// Writes a pattern, such as to `0 1M`.
pub fn fill(dir: &Path, name: &str, range: &str) {
    run(dir, "qemu-io", &["-f", "qcow2", "-c", &format!("write -P 7 {range}"), name]);
}
