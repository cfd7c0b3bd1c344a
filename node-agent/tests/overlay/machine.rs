//! A QEMU with disks and no guest, and the tests' own monitor to it.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use freezeframe_qemu::{BlockGraph, Qmp, connect_beneath};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of a region, which is one pattern: two of them in a cluster, so that layers share clusters.
pub const REGION: u64 = 32 << 10;
pub const REGIONS: usize = 24;
/// What a guest reads from a disk, by region.
pub type View = [u8; REGIONS];

/// A disk's image and how QEMU gets it.
#[derive(Clone, Debug)]
pub struct Drive {
    /// Its `-device` id.
    pub id: String,
    pub image: PathBuf,
    /// Arguments, but for the device.
    pub arguments: Vec<String>,
    /// The device's `drive=` and more.
    pub device: String,
}

/// QEMU, running or not, always with the same command line until a test changes it.
pub struct Machine {
    directory: PathBuf,
    arguments: Vec<String>,
    drives: Vec<Drive>,
    process: Option<Child>,
    monitor: Option<Qmp>,
}

impl Machine {
    pub fn new(directory: &Path, sockets: &Path, extra: &[String], drives: &[Drive]) -> Self {
        std::fs::create_dir_all(sockets).unwrap();
        let mut arguments: Vec<String> =
            "-M pc,accel=tcg -m 64 -nodefaults -display none".split(' ').map(String::from).collect();
        for socket in [sockets.join("qmp.sock"), directory.join("test.sock")] {
            arguments.extend(["-qmp".into(), format!("unix:{},server=on,wait=off", socket.display())]);
        }
        arguments.extend_from_slice(extra);
        Self { directory: directory.to_owned(), arguments, drives: drives.to_vec(), process: None, monitor: None }
    }

    /// The VM's owner changes its command line.
    pub fn set_drives(&mut self, drives: &[Drive]) {
        self.drives = drives.to_vec();
    }

    pub async fn start(&mut self) {
        let socket = self.directory.join("test.sock");
        // Of the last life: it must not be taken for this one's.
        drop(std::fs::remove_file(&socket));
        let log = File::options().create(true).append(true).open(self.log()).unwrap();
        let mut arguments = self.arguments.clone();
        for drive in &self.drives {
            arguments.extend_from_slice(&drive.arguments);
            arguments.extend(["-device".into(), format!("virtio-blk-pci,id={},{}", drive.id, drive.device)]);
        }
        // qemu-io of the monitor prints on stdout, which would stay in a buffer.
        let process = Command::new("stdbuf")
            .args(["-oL", "setpriv", "--pdeathsig", "KILL", "--", "qemu-system-x86_64"])
            .args(&arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("these tests need qemu-system-x86_64");
        self.process = Some(process);
        let end = Instant::now() + PATIENCE;
        let stream = loop {
            match connect_beneath(&self.directory, Path::new("test.sock"), PATIENCE).await {
                Ok((stream, _)) => break stream,
                Err(error) => assert!(Instant::now() < end && self.is_running(), "no QEMU: {error}; {}", self.said()),
            }
            sleep(Duration::from_millis(10)).await;
        };
        self.monitor = Some(Qmp::connect(stream, PATIENCE).await.unwrap());
    }

    fn log(&self) -> PathBuf {
        self.directory.join("qemu.log")
    }

    /// What QEMU printed over all its lives, but for the good news.
    pub fn said(&self) -> String {
        let log = std::fs::read_to_string(self.log()).unwrap();
        let good = |line: &&str| line.contains(" bytes at offset ") || line.contains(" ops; ");
        log.lines().filter(|line| !good(line)).collect::<Vec<_>>().join("\n")
    }

    pub fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| process.try_wait().unwrap().is_none())
    }

    /// SIGKILL: what the guest had flushed is in the files, all else is lost.
    pub fn kill(&mut self) {
        self.monitor = None;
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    pub async fn execute(&self, command: &str, arguments: Value) -> Value {
        let monitor = self.monitor.as_ref().expect("QEMU runs");
        monitor
            .execute(command, arguments, PATIENCE)
            .await
            .unwrap_or_else(|error| panic!("{command}: {error}; {}", self.said()))
    }

    pub async fn graph(&self) -> BlockGraph {
        BlockGraph::read(self.monitor.as_ref().expect("QEMU runs"), PATIENCE).await.unwrap()
    }

    async fn io(&self, disk: &str, command: &str) {
        let line = format!("qemu-io -d /machine/peripheral/{disk}/virtio-backend \"{command}\"");
        let said = self.execute("human-monitor-command", json!({"command-line": line})).await;
        assert_eq!(said, "", "{line}");
    }

    /// Writes a region as a guest would, and flushes: the guest may rely on it.
    pub async fn write(&self, disk: &str, region: usize, pattern: u8) {
        self.io(disk, &format!("write -P {pattern} {} {REGION}", region as u64 * REGION)).await;
        self.io(disk, "flush").await;
        assert!(!self.said().contains("write failed"), "{}", self.said());
    }

    /// Reads every region as a guest would.
    pub async fn expect(&self, disk: &str, view: &View) {
        for (region, pattern) in view.iter().enumerate() {
            self.io(disk, &format!("read -P {pattern} {} {REGION}", region as u64 * REGION)).await;
        }
        let said = self.said();
        assert!(!said.contains("verification failed") && !said.contains("read failed"), "{disk} reads wrong:\n{said}");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            // A test that fails must leave no QEMU behind.
            drop(process.kill());
            drop(process.wait());
        }
    }
}

/// The format that an image's name says.
pub fn format_of(image: &Path) -> &'static str {
    match image.extension().and_then(|end| end.to_str()) {
        Some("qcow2") => "qcow2",
        Some("qed") => "qed",
        Some("img") => "raw",
        _ if image.starts_with("/dev") && !is_qcow2(image) => "raw",
        // A snapshot's image of a qcow2 disk.
        _ => "qcow2",
    }
}

fn is_qcow2(device: &Path) -> bool {
    let mut magic = [0; 4];
    File::open(device).and_then(|mut device| device.read_exact(&mut magic)).unwrap();
    magic == *b"QFI\xfb"
}

/// What an image and its backing files say, read from outside.
pub fn view(image: &Path) -> View {
    view_as(format_of(image), image)
}

pub fn view_as(format: &str, image: &Path) -> View {
    let raw = tempfile::NamedTempFile::new().unwrap();
    run("qemu-img", &["convert", "-U", "-f", format, "-O", "raw", path(image), path(raw.path())]);
    let bytes = std::fs::read(raw.path()).unwrap();
    let mut view = [0; REGIONS];
    for (at, region) in bytes.chunks(usize::try_from(REGION).unwrap()).enumerate() {
        assert!(region.iter().all(|byte| *byte == region[0]), "a torn region in {}", image.display());
        view[at] = region[0];
    }
    view
}

pub fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An empty image of `REGIONS` regions.
pub fn make_image(image: &Path, backing: Option<&str>) {
    let size = (REGION * REGIONS as u64).to_string();
    match backing {
        None => run("qemu-img", &["create", "-q", "-f", "qcow2", path(image), &size]),
        Some(backing) => {
            run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing, path(image), &size]);
        }
    }
}
