//! The guard against a real QEMU: no guest runs in it, so there is no agent, but a monitor, disks and a process.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use freezeframe_guard::{Endpoint, Exchange, Kind, Record};
use freezeframe_qemu::{Qmp, connect_beneath};
use serde_json::json;
use tempfile::TempDir;
use tokio::process::Child;

use crate::harness::{Harness, until};

const SOON: Duration = Duration::from_secs(30);

struct Vm {
    dir: TempDir,
    process: Child,
}

impl Vm {
    async fn start() -> Self {
        let dir = TempDir::new().unwrap();
        create_image(dir.path(), &["disk", "1M"]);
        // Its base is named as it will be after the exchange; `qemu-img` makes no image that names itself.
        create_image(dir.path(), &["unnamed", "-u", "-b", "disk.new", "-F", "qcow2", "1M"]);
        std::fs::rename(dir.path().join("unnamed"), dir.path().join("disk.new")).unwrap();
        let process = tokio::process::Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-display", "none", "-accel", "tcg", "-m", "16"])
            .args(["-qmp", "unix:qmp.sock,server=on,wait=off"])
            .args(["-chardev", "socket,id=qga,path=qga.sock,server=on,wait=off", "-device", "virtio-serial"])
            .args(["-device", "virtserialport,chardev=qga,name=org.qemu.guest_agent.0"])
            .args(["-object", "throttle-group,id=limits"])
            .args(["-blockdev", "driver=qcow2,node-name=disk0,file.driver=file,file.filename=disk"])
            .args(["-blockdev", "driver=throttle,node-name=limited0,throttle-group=limits,file=disk0"])
            .args(["-device", "virtio-blk-pci,drive=limited0,id=vda"])
            .current_dir(&dir)
            .kill_on_drop(true)
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let listens = || dir.path().join("qmp.sock").exists() && dir.path().join("qga.sock").exists();
        until("QEMU listens", listens).await;
        Self { dir, process }
    }

    async fn monitor(&self) -> (Qmp, Endpoint) {
        let name = Path::new("qmp.sock");
        let (stream, identity) = connect_beneath(self.dir.path(), name, SOON).await.unwrap();
        (Qmp::connect(stream, SOON).await.unwrap(), Endpoint::new(name, &identity))
    }

    async fn agent(&self) -> Endpoint {
        let name = Path::new("qga.sock");
        let (_, identity) = connect_beneath(self.dir.path(), name, SOON).await.unwrap();
        Endpoint::new(name, &identity)
    }
}

fn create_image(directory: &Path, arguments: &[&str]) {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]).args(arguments).current_dir(directory);
    assert!(command.status().unwrap().success());
}

#[tokio::test]
async fn a_wedged_agent_loses_the_monitor_and_cut_and_pause_are_finished() {
    let (vm, harness) = (Vm::start().await, Harness::start());
    let (qmp, monitor) = vm.monitor().await;
    let inode = |name: &str| std::fs::metadata(vm.dir.path().join(name)).unwrap().ino();
    let (old_layer, new_layer) = (inode("disk"), inode("disk.new"));
    let exchange = Exchange {
        directory: vm.dir.path().to_owned(),
        a: "disk".into(),
        b: "disk.new".into(),
        a_inode: old_layer,
        when_active: "overlay0".into(),
        kind: Kind::Swap,
    };
    let record = Record {
        id: "real".into(),
        vm: "shop/real".into(),
        vm_root: vm.dir.path().to_owned(),
        qmp: Some(monitor),
        agent: None,
        may_resume: true,
        freeze: false,
        deadline_millis: 60_000,
        exchanges: vec![exchange],
        job: None,
    };
    let window = harness.guard().arm(record, &[qmp.stream_fd()]).await.unwrap();
    let overlay = json!({"driver": "qcow2", "node-name": "overlay0", "backing": null,
        "file": {"driver": "file", "filename": vm.dir.path().join("disk.new")}});
    qmp.blockdev_add(&overlay, SOON).await.unwrap();
    qmp.stop(SOON).await.unwrap();
    let cut = json!({"type": "blockdev-snapshot", "data": {"node": "disk0", "overlay": "overlay0"}});
    qmp.transaction(&[cut], SOON).await.unwrap();

    // The agent is silent from here on, and its monitor connection stays open.
    window.abandon();
    harness.settled().await;
    assert!(qmp.query_status(SOON).await.is_err(), "the agent's connection is dead");
    let (qmp, _) = vm.monitor().await;
    assert_eq!(qmp.query_status(SOON).await.unwrap().status, "running");
    assert_eq!((inode("disk"), inode("disk.new")), (new_layer, old_layer));
}

#[tokio::test]
async fn a_guest_without_an_agent_is_owed_until_its_qemu_ends() {
    let (mut vm, harness) = (Vm::start().await, Harness::start());
    let record = Record {
        id: "real".into(),
        vm: "shop/real".into(),
        vm_root: vm.dir.path().to_owned(),
        qmp: Some(vm.monitor().await.1),
        agent: Some(vm.agent().await),
        may_resume: true,
        freeze: true,
        deadline_millis: 60_000,
        exchanges: Vec::new(),
        job: None,
    };
    let (qmp, _) = vm.monitor().await;
    qmp.stop(SOON).await.unwrap();
    drop(qmp);
    harness.guard().arm(record, &[]).await.unwrap().abandon();
    let resumed = async { while vm.monitor().await.0.query_status(SOON).await.unwrap().status != "running" {} };
    tokio::time::timeout(SOON, resumed).await.unwrap();
    assert!(harness.guard().owed("shop/real").await.unwrap());
    vm.process.kill().await.unwrap();
    harness.settled().await;
}
