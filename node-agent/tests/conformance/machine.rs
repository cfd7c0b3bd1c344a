//! A real QEMU with no guest but its BIOS; the test writes and reads through the guest's own device.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use freezeframe_qemu::{Qmp, connect_beneath};
use serde_json::{Value, json};

const START: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(30);

/// A disk on a command line.
#[derive(Clone, Debug)]
pub struct Disk {
    pub name: String,
    pub file: PathBuf,
    pub format: String,
    /// More of its `-blockdev`, with a comma before.
    pub options: String,
}

/// A running QEMU; it is killed when this is dropped.
pub struct Machine {
    process: Child,
    output: File,
    /// A monitor of the test's own: the other one serves one client, and that is the agent.
    pub monitor: Qmp,
}

impl Machine {
    /// Starts QEMU with its sockets in `directory`; the same disks make the same command line.
    pub async fn start(directory: &Path, disks: &[Disk]) -> Self {
        Self::start_with(directory, disks, "").await
    }

    /// Starts QEMU on image files that it neither locks nor finds locked.
    pub async fn start_without_locks(directory: &Path, disks: &[Disk]) -> Self {
        Self::start_with(directory, disks, ",locking=off").await
    }

    async fn start_with(directory: &Path, disks: &[Disk], locking: &str) -> Self {
        let sockets = ["qmp.sock", "test.sock"];
        for socket in sockets {
            // The one of a QEMU that was killed.
            drop(std::fs::remove_file(directory.join(socket)));
        }
        // What its `qemu-io` says goes to QEMU's own output, and must not wait in a buffer there.
        let mut command = Command::new("stdbuf");
        command.args(["-oL", "qemu-system-x86_64"]).args("-M q35,accel=tcg -m 64 -nodefaults -display none".split(' '));
        for socket in sockets {
            command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", directory.join(socket).display()));
        }
        for (index, disk) in disks.iter().enumerate() {
            let (name, options) = (&disk.name, &disk.options);
            command.arg("-blockdev").arg(format!("node-name={name}-file,{}{locking}", protocol(&disk.file)));
            let format = &disk.format;
            command.arg("-blockdev").arg(format!("driver={format},node-name={name}-node,file={name}-file{options}"));
            command.arg("-device").arg(format!("virtio-blk-pci,drive={name}-node,id={name},bootindex={index}"));
        }
        let output = directory.join("output");
        command.stdin(Stdio::null()).stdout(File::create(&output).unwrap());
        let process = command.spawn().expect("these tests need qemu-system-x86_64");
        let mut machine = Started(Some(process));
        let monitor = machine.connect(directory).await;
        Self { process: machine.0.take().unwrap(), output: File::open(output).unwrap(), monitor }
    }

    /// Runs one `qemu-io` command on a disk as its device does; panics with what it says if it fails.
    pub async fn io(&self, disk: &str, command: &str) {
        let line = format!("qemu-io -d /machine/peripheral/{disk}/virtio-backend \"{command}\"");
        let answer: Value =
            self.monitor.execute("human-monitor-command", json!({"command-line": line}), SOON).await.unwrap();
        let mut said = answer.as_str().unwrap().to_owned();
        (&self.output).read_to_string(&mut said).unwrap();
        let good = said.contains("65536/65536") && !said.contains("fail") && !said.contains("rror");
        assert!(good, "disk {disk}, {command}: {said}");
    }

    pub async fn stop(&self) {
        self.monitor.stop(SOON).await.unwrap();
    }

    pub async fn cont(&self) {
        self.monitor.cont(SOON).await.unwrap();
    }

    pub async fn is_running(&self) -> bool {
        self.monitor.query_status(SOON).await.unwrap().running
    }

    /// Ends QEMU as `quit` does.
    pub async fn quit(self) {
        self.monitor.quit(SOON).await.unwrap();
        self.ended().await;
    }

    /// Waits until somebody has ended QEMU.
    pub async fn ended(mut self) {
        let end = Instant::now() + SOON;
        while self.process.try_wait().unwrap().is_none() {
            assert!(Instant::now() < end, "QEMU doesn't end");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // One that has ended has nothing to kill.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

/// How QEMU opens what a disk is: a file, a block device, or what an NBD server exports on a socket.
fn protocol(disk: &Path) -> String {
    let (kind, path) = (std::fs::metadata(disk).unwrap().file_type(), disk.display());
    match () {
        () if kind.is_socket() => format!("driver=nbd,server.type=unix,server.path={path}"),
        () if kind.is_block_device() => format!("driver=host_device,filename={path}"),
        () => format!("driver=file,filename={path}"),
    }
}

/// A process that isn't a [`Machine`] yet.
struct Started(Option<Child>);

impl Started {
    async fn connect(&mut self, directory: &Path) -> Qmp {
        let end = Instant::now() + START;
        loop {
            match connect_beneath(directory, Path::new("test.sock"), START).await {
                Ok((stream, _)) => return Qmp::connect(stream, START).await.unwrap(),
                Err(error) => assert!(Instant::now() < end, "QEMU does not listen: {error:?}"),
            }
            if let Some(ended) = self.0.as_mut().unwrap().try_wait().unwrap() {
                panic!("QEMU ended: {ended}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(process) = &mut self.0 {
            drop(process.kill());
            drop(process.wait());
        }
    }
}
