//! A VM with its storage, a guard and an agent's sessions, all of one test's own.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use freezeframe_api::v1alpha1::{ContentPhase, VMSnapshotContentStatus};
use freezeframe_guard::client::Guard;
use freezeframe_guard::{Server, StateDir, Timing};
use freezeframe_node_agent::boot::{Accelerator, Boots};
use freezeframe_node_agent::drivers::{Artifact, Drivers};
use freezeframe_node_agent::hypervisor::image::ImageRoots;
use freezeframe_node_agent::hypervisor::{Vm, VmKey};
use freezeframe_node_agent::session::journal::Journal;
use freezeframe_node_agent::session::machine::StoppedVms;
use freezeframe_node_agent::session::order::Order;
use freezeframe_node_agent::session::space_watch::SpaceWatch;
use freezeframe_node_agent::session::{Progress, Sessions, Turn};
use tempfile::TempDir;
use tokio::sync::watch;

use crate::cases::{Case, drivers, parameters};
use crate::content::{Content, SIZE};
use crate::machine::{Disk, Machine};
use crate::snapshot_order::snapshot_order;
use crate::storage::{Kind, Storage, run};

/// A busy machine must not break a window.
const SOON: Duration = Duration::from_secs(30);

pub struct World {
    // Dropped in this order: QEMU before the file system it uses.
    machine: Option<Machine>,
    pub sessions: Sessions,
    pub disks: Vec<Disk>,
    pub contents: Vec<Content>,
    epoch: u8,
    _guard: watch::Sender<bool>,
    run: TempDir,
    pub copies: TempDir,
    pub storage: Storage,
}

/// What a VM's QEMU and storage have that a driver could leave behind.
#[derive(Debug, PartialEq, Eq)]
pub struct Footprint {
    pub files: BTreeSet<String>,
    pub nodes: BTreeSet<String>,
    pub descriptors: BTreeSet<String>,
    pub jobs: Vec<String>,
}

pub struct NeverCancelled;

impl Progress for NeverCancelled {
    fn cancelled(&self) -> bool {
        false
    }
}

/// The case's disks: two, so that a group is always more than one.
pub fn two_disks(storage: &Storage, format: &str) -> Vec<Disk> {
    ["vd0", "vd1"].map(|name| disk(storage, name, format)).into()
}

/// An empty image, and the disk that it is.
pub fn disk(storage: &Storage, name: &str, format: &str) -> Disk {
    let file = storage.images().join(format!("{name}.{format}"));
    run(&format!("qemu-img create -q -f {format}"), &[&file, Path::new(&SIZE.to_string())]);
    Disk { name: name.into(), file, format: format.into(), options: String::new() }
}

impl World {
    /// A running VM with two empty disks.
    pub async fn of(case: Case) -> Self {
        let storage = Storage::new(case.storage);
        let disks = two_disks(&storage, case.format);
        Self::with(storage, disks, drivers()).await
    }

    pub async fn on(kind: Kind, format: &str) -> Self {
        let storage = Storage::new(kind);
        let disks = two_disks(&storage, format);
        Self::with(storage, disks, drivers()).await
    }

    pub async fn with(storage: Storage, disks: Vec<Disk>, drivers: Drivers) -> Self {
        let (run, copies) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let vm_root = run.path().join("vms");
        std::fs::create_dir_all(vm_root.join("shop/db-1")).unwrap();
        let (stop, stopping) = watch::channel(false);
        let state = StateDir::open(&run.path().join("guard")).unwrap();
        let socket = run.path().join("guard.sock");
        let timing = Timing { silence: Duration::from_secs(15), ..Timing::default() };
        tokio::spawn(Server::bind(&socket, state, timing, stopping).unwrap().run());
        let sessions = Sessions {
            roots: ImageRoots::new(vec![storage.root(), vm_root.clone()]),
            vm_root,
            guard: Guard::new(socket),
            journal: Journal::open(run.path().join("contents")).unwrap(),
            restores: Journal::open(run.path().join("restores")).unwrap(),
            drivers,
            stopped: StoppedVms::with_files_only(),
            space: SpaceWatch::default(),
            boots: std::sync::Arc::new(Boots::new(64, Duration::from_secs(20), 1, Accelerator::Tcg)),
        };
        let contents = vec![Content::default(); disks.len()];
        let mut world = Self { machine: None, sessions, disks, contents, epoch: 0, _guard: stop, run, copies, storage };
        world.start().await;
        world
    }

    pub fn key() -> VmKey {
        VmKey { namespace: "shop".into(), name: "db-1".into() }
    }

    /// Starts QEMU, always with the same command line.
    pub async fn start(&mut self) {
        self.machine = Some(Machine::start(&self.directory(), &self.disks).await);
    }

    /// The VM's directory, with its sockets.
    pub fn directory(&self) -> PathBuf {
        self.run.path().join("vms/shop/db-1")
    }

    /// Takes over a QEMU that was started elsewhere.
    pub fn adopt(&mut self, machine: Machine) {
        self.machine = Some(machine);
    }

    pub async fn quit(&mut self) {
        self.machine.take().unwrap().quit().await;
    }

    pub async fn restart(&mut self) {
        self.quit().await;
        self.start().await;
    }

    pub fn machine(&self) -> &Machine {
        self.machine.as_ref().unwrap()
    }

    /// The agent's connection to the VM.
    pub async fn vm(&self) -> Vm {
        Vm::open(&self.sessions.vm_root, &Self::key()).await.unwrap()
    }

    /// The guest writes something new to every disk.
    pub async fn write(&mut self) {
        self.epoch += 1;
        for (at, disk) in self.disks.iter().enumerate() {
            let pattern = self.epoch * 2 + u8::try_from(at).unwrap();
            for command in self.contents[at].write(pattern) {
                self.machine.as_ref().unwrap().io(&disk.name, &command).await;
            }
        }
    }

    /// The guest reads what it wrote last.
    pub async fn check_guest(&self) {
        for (disk, content) in self.disks.iter().zip(&self.contents) {
            for command in content.reads() {
                self.machine().io(&disk.name, &command).await;
            }
        }
    }

    /// The stopped VM's own command line would open what the guest wrote last.
    pub fn check_images(&self) {
        for (disk, content) in self.disks.iter().zip(&self.contents) {
            content.check(&disk.file, &disk.format).unwrap();
        }
    }

    /// An order for all disks with one driver.
    pub fn order(&self, driver: &str, number: u32) -> Order {
        snapshot_order(number, Self::key(), driver, parameters(driver, self.copies.path()), SOON)
    }

    /// Takes a snapshot to its end, good or bad.
    pub async fn advance(&self, order: &Order) -> VMSnapshotContentStatus {
        for _ in 0..10 {
            match self.sessions.advance(order, &NeverCancelled).await.unwrap() {
                Turn::Over(status) => return *status,
                Turn::Report(_) => {}
            }
        }
        panic!("the session of {} comes to no end", order.content);
    }

    /// Takes a snapshot that must be good, and returns what the disks read at the cut.
    pub async fn snapshot(&self, order: &Order) -> Vec<Content> {
        let status = self.advance(order).await;
        assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
        self.contents.clone()
    }

    /// Where a snapshot's artifacts are now.
    pub fn artifacts(&self, order: &Order) -> Vec<Artifact> {
        let record = self.sessions.journal.load(&order.uid).unwrap().unwrap();
        record.tasks.into_iter().map(|task| task.artifact.unwrap()).collect()
    }

    /// A snapshot's artifacts are of the disk's size, in the format they claim, whole, and read as the disks did.
    pub fn check_artifacts(&self, order: &Order, contents: &[Content]) {
        let artifacts = self.artifacts(order);
        assert_eq!(artifacts.len(), contents.len());
        for (Artifact { handle, format }, content) in artifacts.iter().zip(contents) {
            let info = run(&format!("qemu-img info -U --output=json -f {format}"), &[handle]);
            let info: serde_json::Value = serde_json::from_str(&info).unwrap();
            assert_eq!(info["virtual-size"], SIZE, "{}", handle.display());
            content.check(handle, format).unwrap();
            if format == "qcow2" {
                run("qemu-img check -q -U -f qcow2", &[handle]);
            }
        }
    }

    /// Deletes a snapshot and expects it to be gone.
    pub async fn delete(&self, order: &Order) {
        let deletion = self.sessions.delete(order).await.unwrap();
        assert!(deletion.over, "{}: {:?}", order.content, deletion.status.conditions);
        assert_eq!(deletion.status.phase, Some(ContentPhase::Removed));
    }

    pub fn files(&self) -> BTreeSet<String> {
        let mut files = self.storage.contents();
        let copies = std::fs::read_dir(self.copies.path()).unwrap().flat_map(|entry| {
            let directory: PathBuf = entry.unwrap().path();
            std::fs::read_dir(directory).unwrap().map(|file| file.unwrap().path().display().to_string())
        });
        files.extend(copies);
        files
    }

    pub async fn footprint(&self) -> Footprint {
        let vm = self.vm().await;
        let graph = vm.graph().await.unwrap();
        let sets = vm.qmp().query_fdsets(SOON).await.unwrap();
        let jobs = vm.qmp().query_jobs(SOON).await.unwrap();
        Footprint {
            files: self.files(),
            nodes: graph.nodes().map(|node| format!("{} {}", node.name, node.file)).collect(),
            descriptors: sets.into_iter().map(|set| format!("/dev/fdset/{}", set.id)).collect(),
            jobs: jobs.into_iter().map(|job| job.id).collect(),
        }
    }

    /// Nothing is left but what the running VM itself uses: the files it started with, and no node, descriptor or job
    /// that no disk needs.
    pub async fn check_tidy(&self, before: &Footprint) {
        let after = self.footprint().await;
        assert_eq!(after.files, before.files);
        assert!(after.jobs.is_empty(), "jobs are left: {:?}", after.jobs);
        let graph = self.vm().await.graph().await.unwrap();
        let mut used: BTreeSet<String> = BTreeSet::new();
        for disk in graph.disks() {
            for node in graph.chain(disk.top.as_deref().unwrap_or_default()) {
                used.extend([node.name.clone(), node.file.clone()]);
                let file = node.file_child.as_deref().and_then(|child| graph.node(child));
                used.extend(file.into_iter().flat_map(|file| [file.name.clone(), file.file.clone()]));
            }
        }
        let ours: Vec<_> = graph.nodes().filter(|node| node.name.starts_with("ff-")).collect();
        let unused: Vec<_> = ours.iter().filter(|node| !used.contains(&node.name)).map(|node| &node.name).collect();
        assert!(unused.is_empty(), "nodes are left: {unused:?}");
        let unused: Vec<_> = after.descriptors.iter().filter(|set| !used.contains(*set)).collect();
        assert!(unused.is_empty(), "descriptors are left: {unused:?}, nodes: {:#?}", after.nodes);
    }
}
