//! A real QEMU with no guest but its BIOS and volumes as disks; the test writes through the guest's own device.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use freezeframe_qemu::{Qmp, connect_beneath};
use serde_json::{Value, json};

use crate::node::Lv;

/// Emulated twice over, on a busy machine.
const SOON: Duration = Duration::from_secs(120);

/// A running QEMU; it is killed when this is dropped.
pub struct Machine {
    process: Child,
    output: File,
    /// A monitor of the test's own: the other one serves one client, and that is the agent.
    pub monitor: Qmp,
}

impl Machine {
    /// Starts QEMU with its sockets in `directory`; its disks are called `vd0`, `vd1` and so on.
    pub async fn start(directory: &Path, volumes: &[Lv]) -> Self {
        let raw: Vec<_> = volumes.iter().map(|volume| (volume.path(), "raw")).collect();
        Self::start_on(directory, &raw).await
    }

    /// The same on devices with images of other formats.
    pub async fn start_on(directory: &Path, devices: &[(String, &str)]) -> Self {
        // What its `qemu-io` says goes to QEMU's own output, and must not wait in a buffer there.
        let mut command = Command::new("stdbuf");
        command.args(["-oL", "qemu-system-x86_64"]).args("-M q35,accel=tcg -m 64 -nodefaults -display none".split(' '));
        for socket in ["qmp.sock", "test.sock"] {
            command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", directory.join(socket).display()));
        }
        for (at, (path, format)) in devices.iter().enumerate() {
            let file = format!("driver=host_device,node-name=vd{at}-file,filename={path}");
            command.args(["-blockdev", &file]);
            command.args(["-blockdev", &format!("driver={format},node-name=vd{at}-node,file=vd{at}-file")]);
            command.args(["-device", &format!("virtio-blk-pci,drive=vd{at}-node,id=vd{at},bootindex={at}")]);
        }
        let output = directory.join("output");
        command.stdin(Stdio::null()).stdout(File::create(&output).unwrap());
        let mut process = command.spawn().unwrap();
        let monitor = connect(directory, &mut process).await;
        Self { process, output: File::open(output).unwrap(), monitor }
    }

    /// Runs one `qemu-io` command on a disk as its device does; panics with what it says if it fails.
    pub async fn io(&self, disk: &str, command: &str) {
        let said = self.said_to(disk, command).await;
        assert!(said.contains("ops") && !said.contains("fail") && !said.contains("rror"), "{disk}, {command}: {said}");
    }

    /// Has what was written to a disk survive this QEMU, as a guest does that relies on it.
    pub async fn flush(&self, disk: &str) {
        let said = self.said_to(disk, "flush").await;
        assert!(!said.contains("fail") && !said.contains("rror"), "{disk}, flush: {said}");
    }

    async fn said_to(&self, disk: &str, command: &str) -> String {
        let line = format!("qemu-io -d /machine/peripheral/{disk}/virtio-backend \"{command}\"");
        let answer: Value =
            self.monitor.execute("human-monitor-command", json!({"command-line": line}), SOON).await.unwrap();
        let mut said = answer.as_str().unwrap().to_owned();
        (&self.output).read_to_string(&mut said).unwrap();
        said
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // One that has ended has nothing to kill.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

async fn connect(directory: &Path, process: &mut Child) -> Qmp {
    let end = Instant::now() + SOON;
    loop {
        match connect_beneath(directory, Path::new("test.sock"), SOON).await {
            Ok((stream, _)) => return Qmp::connect(stream, SOON).await.unwrap(),
            Err(error) => assert!(Instant::now() < end, "QEMU does not listen: {error:?}"),
        }
        assert!(process.try_wait().unwrap().is_none(), "QEMU ended");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
