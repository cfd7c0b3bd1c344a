//! The clients and the block graph against a real QEMU; no guest runs in it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod vm;

use std::fs::File;
use std::os::fd::AsFd;
use std::time::Duration;

use freezeframe_qemu::{BlockGraph, Error, Job, Qmp};
use serde_json::{Value, json};

use vm::{Vm, image, overlay};

const SOON: Duration = Duration::from_secs(30);
const MIB: u64 = 1 << 20;

fn chain(graph: &BlockGraph, node: &str) -> Vec<String> {
    graph.chain(node).iter().map(|node| node.file.rsplit('/').next().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn disks_of_all_kinds_are_named_and_their_top_node_found() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path(), "base.qcow2", "qcow2", 8);
    overlay(dir.path(), "mid.qcow2", "base.qcow2");
    overlay(dir.path(), "top.qcow2", "mid.qcow2");
    image(dir.path(), "raw.img", "raw", 4);
    image(dir.path(), "legacy.qcow2", "qcow2", 2);
    let vm = Vm::start(
        dir,
        &[
            "-object throttle-group,id=tg",
            "-blockdev driver=file,node-name=f0,filename=top.qcow2,cache.direct=on",
            "-blockdev driver=qcow2,node-name=d0,file=f0,cache.direct=on,detect-zeroes=on",
            "-blockdev driver=throttle,node-name=th0,throttle-group=tg,file=d0",
            "-blockdev driver=copy-on-read,node-name=cor0,file=th0",
            "-device virtio-blk-pci,drive=cor0,id=vd0",
            "-blockdev driver=file,node-name=f1,filename=raw.img",
            "-blockdev driver=raw,node-name=d1,file=f1,read-only=on",
            "-device virtio-scsi-pci,id=s0",
            "-device scsi-hd,drive=d1,id=sd0,bus=s0.0",
            "-drive file=legacy.qcow2,format=qcow2,if=none,id=leg1",
            "-device virtio-blk-pci,drive=leg1",
            "-device scsi-cd,id=cd1,bus=s0.0",
        ],
    );
    let qmp = vm.qmp().await;
    let graph = BlockGraph::read(&qmp, SOON).await.unwrap();
    let disk = |name: &str| graph.disks().iter().find(|disk| disk.name() == name).unwrap();

    let vd0 = disk("vd0");
    assert_eq!(vd0.qdev, "/machine/peripheral/vd0/virtio-backend");
    assert_eq!((vd0.root.as_deref(), vd0.top.as_deref()), (Some("cor0"), Some("d0")));
    assert_eq!(chain(&graph, "cor0"), ["top.qcow2", "mid.qcow2", "base.qcow2"]);
    let top = graph.node("d0").unwrap();
    assert_eq!((top.file_child.as_deref(), top.virtual_size, top.backing_depth), (Some("f0"), 8 * MIB, 2));
    assert!(top.cache.direct && top.cache.writeback && !top.read_only && !top.auto_named);
    assert_eq!(top.detect_zeroes, "on");
    let mid = graph.node(top.backing.as_deref().unwrap()).unwrap();
    assert!(mid.auto_named && mid.read_only && mid.driver == "qcow2");

    let legacy = disk("leg1");
    assert_eq!((legacy.device.as_str(), legacy.empty), ("leg1", false));
    assert!(graph.node(legacy.top.as_deref().unwrap()).unwrap().auto_named);
    let raw = disk("sd0");
    assert_eq!((raw.top.as_deref(), raw.read_only), (Some("d1"), true));
    assert_eq!(graph.node("d1").unwrap().file_child.as_deref(), Some("f1"));
    let cd = disk("cd1");
    assert!(cd.empty && cd.removable && cd.root.is_none() && cd.top.is_none());
    assert_eq!(graph.disks().len(), 4);
}

/// Opens `file` through a set of two descriptors, so that QEMU never opens it by name.
async fn add_by_descriptor(qmp: &Qmp, vm: &Vm, file: &str, fdset: i64) {
    let path = vm.path(file);
    let writable = File::options().read(true).write(true).open(&path).unwrap();
    qmp.add_fd(fdset, "rdwr", writable.as_fd(), SOON).await.unwrap();
    qmp.add_fd(fdset, "rdonly", File::open(&path).unwrap().as_fd(), SOON).await.unwrap();
}

/// The overlay's name is a temporary one and its backing string says what the base will be called.
async fn snapshot(qmp: &Qmp, vm: &Vm, node: &str, n: i64) {
    let name = format!("overlay-{n}.qcow2");
    overlay(vm.dir(), &name, "disk.qcow2");
    add_by_descriptor(qmp, vm, &name, 10 + n).await;
    let protocol =
        json!({ "driver": "file", "node-name": format!("of{n}"), "filename": format!("/dev/fdset/{}", 10 + n) });
    qmp.blockdev_add(&protocol, SOON).await.unwrap();
    let format = json!({ "driver": "qcow2", "node-name": format!("o{n}"), "file": format!("of{n}"), "backing": null });
    qmp.blockdev_add(&format, SOON).await.unwrap();
    let action = json!({ "type": "blockdev-snapshot", "data": { "node": node, "overlay": format!("o{n}") } });
    qmp.transaction(&[action], SOON).await.unwrap();
}

async fn wait_until_gone(qmp: &Qmp, job: &str) {
    for _ in 0..600 {
        let jobs: Vec<Job> = qmp.query_jobs(SOON).await.unwrap();
        if jobs.iter().all(|other| other.id != job) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("job {job} does not end");
}

fn names(graph: &BlockGraph, node: &str) -> Vec<String> {
    graph.chain(node).iter().map(|node| node.name.clone()).collect()
}

#[tokio::test]
async fn a_snapshot_onto_descriptors_goes_below_the_filter_and_its_layers_can_be_merged() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path(), "disk.qcow2", "qcow2", 8);
    let vm = Vm::start(
        dir,
        &[
            "-object throttle-group,id=tg",
            "-blockdev driver=file,node-name=f0,filename=disk.qcow2",
            "-blockdev driver=qcow2,node-name=d0,file=f0",
            "-blockdev driver=throttle,node-name=th0,throttle-group=tg,file=d0",
            "-device virtio-blk-pci,drive=th0,id=vd0",
        ],
    );
    let qmp = vm.qmp().await;
    snapshot(&qmp, &vm, "d0", 1).await;
    let graph = BlockGraph::read(&qmp, SOON).await.unwrap();
    let disk = &graph.disks()[0];
    assert_eq!((disk.root.as_deref(), disk.top.as_deref()), (Some("th0"), Some("o1")));
    assert_eq!(names(&graph, "th0"), ["o1", "d0"]);
    assert_eq!(graph.node("of1").unwrap().file, "/dev/fdset/11");
    assert!(graph.node("d0").unwrap().read_only);

    add_by_descriptor(&qmp, &vm, "disk.qcow2", 20).await;
    let base = json!({ "driver": "file", "node-name": "bf", "filename": "/dev/fdset/20", "auto-read-only": true });
    qmp.blockdev_add(&base, SOON).await.unwrap();
    let reopened = json!({ "driver": "qcow2", "node-name": "d0", "file": "bf", "backing": null, "read-only": true });
    qmp.blockdev_reopen(&[reopened], SOON).await.unwrap();
    snapshot(&qmp, &vm, "o1", 2).await;
    let graph = BlockGraph::read(&qmp, SOON).await.unwrap();
    assert_eq!(names(&graph, "th0"), ["o2", "o1", "d0"]);
    assert_eq!(graph.node("d0").unwrap().file_child.as_deref(), Some("bf"));

    // `device` must be the root, here the filter: "Need a root block node".
    let commit = json!({ "job-id": "c1", "device": "th0", "base-node": "d0", "top-node": "o1" });
    qmp.block_commit(&commit, SOON).await.unwrap();
    wait_until_gone(&qmp, "c1").await;
    let graph = BlockGraph::read(&qmp, SOON).await.unwrap();
    assert_eq!(names(&graph, "th0"), ["o2", "d0"]);
    let sets: Vec<i64> = qmp.query_fdsets(SOON).await.unwrap().iter().map(|set| set.id).collect();
    assert!(sets.contains(&12) && sets.contains(&20), "{sets:?}");
}

#[tokio::test]
async fn a_commit_in_progress_does_not_hide_the_chain() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path(), "base.qcow2", "qcow2", 64);
    vm::fill(dir.path(), "base.qcow2", "0 1M");
    overlay(dir.path(), "mid.qcow2", "base.qcow2");
    vm::fill(dir.path(), "mid.qcow2", "0 32M");
    overlay(dir.path(), "top.qcow2", "mid.qcow2");
    let node = |name: &str, backing: &str| {
        format!("-blockdev driver=qcow2,node-name={name},file.driver=file,file.filename={name}.qcow2{backing}")
    };
    let (base, mid, top) = (node("base", ""), node("mid", ",backing=base"), node("top", ",backing=mid"));
    let vm = Vm::start(dir, &[&base, &mid, &top, "-device virtio-blk-pci,drive=top,id=vd0"]);
    let qmp = vm.qmp().await;
    // A byte a second: the job stands still while we look.
    let commit = json!({ "job-id": "c", "device": "top", "base-node": "base", "top-node": "mid", "speed": 1 });
    qmp.block_commit(&commit, SOON).await.unwrap();
    let jobs = qmp.query_jobs(SOON).await.unwrap();
    assert_eq!((jobs[0].id.as_str(), jobs[0].kind.as_str(), jobs[0].error.as_deref()), ("c", "commit", None));
    let graph = BlockGraph::read(&qmp, SOON).await.unwrap();
    assert_eq!(graph.disks()[0].top.as_deref(), Some("top"));
    assert_eq!(names(&graph, "top"), ["top", "mid", "base"]);
    qmp.job_cancel("c", SOON).await.unwrap();
    wait_until_gone(&qmp, "c").await;
}

#[tokio::test]
async fn the_layers_of_a_node_that_no_device_uses_are_found() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path(), "base.qcow2", "qcow2", 4);
    overlay(dir.path(), "top.qcow2", "base.qcow2");
    let vm = Vm::start(dir, &[]);
    let qmp = vm.qmp().await;
    let top =
        json!({ "driver": "qcow2", "node-name": "t", "file": { "driver": "file", "filename": vm.path("top.qcow2") } });
    qmp.blockdev_add(&top, SOON).await.unwrap();
    let graph = BlockGraph::read(&qmp, SOON).await.unwrap();
    assert_eq!(chain(&graph, "t"), ["top.qcow2", "base.qcow2"]);
    qmp.blockdev_del("t", SOON).await.unwrap();
    assert!(BlockGraph::read(&qmp, SOON).await.unwrap().node("t").is_none());
}

#[tokio::test]
async fn a_chain_of_a_hundred_and_thirty_layers_is_read_whole() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path(), "0.qcow2", "qcow2", 1);
    for n in 1..130 {
        overlay(dir.path(), &format!("{n}.qcow2"), &format!("{}.qcow2", n - 1));
    }
    let vm = Vm::start(
        dir,
        &[
            "-blockdev driver=qcow2,node-name=d,file.driver=file,file.filename=129.qcow2",
            "-device virtio-blk-pci,drive=d,id=vd0",
        ],
    );
    let graph = BlockGraph::read(&vm.qmp().await, SOON).await.unwrap();
    assert_eq!(graph.chain("d").len(), 130);
    assert_eq!(graph.chain("d")[129].file, "0.qcow2");
}

#[tokio::test]
async fn stop_and_cont_are_told_as_events_with_times() {
    let vm = Vm::start(tempfile::tempdir().unwrap(), &[]);
    let qmp = vm.qmp().await;
    let mut events = qmp.events();
    assert_eq!(qmp.query_status(SOON).await.unwrap().status, "prelaunch");
    qmp.cont(SOON).await.unwrap();
    assert!(qmp.query_status(SOON).await.unwrap().running);
    qmp.stop(SOON).await.unwrap();
    assert_eq!(qmp.query_status(SOON).await.unwrap().status, "paused");
    let (resumed, stopped) = (events.recv().await.unwrap(), events.recv().await.unwrap());
    assert_eq!((resumed.name.as_str(), stopped.name.as_str()), ("RESUME", "STOP"));
    assert!(stopped.micros > resumed.micros && resumed.micros > 1_600_000_000_000_000);
    qmp.quit(SOON).await.unwrap();
    while !qmp.is_closed() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn the_machine_describes_itself() {
    let vm = Vm::start(
        tempfile::tempdir().unwrap(),
        &[
            "-name db-1",
            "-object iothread,id=io0",
            "-device virtio-serial-pci",
            "-chardev socket,id=qga0,path=qga.sock,server=on,wait=off",
            "-device virtserialport,chardev=qga0,name=org.qemu.guest_agent.0",
        ],
    );
    let qmp = vm.qmp().await;
    assert!(qmp.version().split('.').count() == 3, "{}", qmp.version());
    assert_eq!(qmp.query_name(SOON).await.unwrap().as_deref(), Some("db-1"));
    assert_eq!(qmp.query_iothreads(SOON).await.unwrap()[0].id, "io0");
    assert_eq!(qmp.query_migrate_status(SOON).await.unwrap(), None);
    let chardevs = qmp.query_chardevs(SOON).await.unwrap();
    assert!(!chardevs.iter().find(|chardev| chardev.label == "qga0").unwrap().frontend_open);
    assert!(qmp.query_schema_has("blockdev-reopen", SOON).await.unwrap());
    assert!(!qmp.query_schema_has("make-coffee", SOON).await.unwrap());
    let unknown = qmp.execute::<Value>("make-coffee", (), SOON).await.unwrap_err();
    assert!(unknown.is_command_not_found(), "{unknown:?}");
    let refused = qmp.blockdev_del("nothing", SOON).await.unwrap_err();
    assert_eq!(refused.class(), Some("GenericError"));
}

#[tokio::test]
async fn a_second_client_finds_the_monitor_busy_until_the_first_has_gone() {
    let vm = Vm::start(tempfile::tempdir().unwrap(), &[]);
    let first = vm.qmp().await;
    let second = Qmp::connect(vm.connect().await, Duration::from_millis(300)).await;
    assert!(matches!(second, Err(Error::Busy)), "{second:?}");
    drop(first);
    vm.qmp().await;
}

#[tokio::test]
async fn calls_fail_at_once_when_qemu_dies() {
    let mut vm = Vm::start(tempfile::tempdir().unwrap(), &[]);
    let qmp = vm.qmp().await;
    vm.kill();
    assert!(matches!(qmp.query_status(SOON).await, Err(Error::Closed)));
    assert!(qmp.is_closed());
}
