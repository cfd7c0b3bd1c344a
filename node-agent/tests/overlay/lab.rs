//! One VM with its sessions, and what every view must read at any moment.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use freezeframe_api::names::DriverName;
use freezeframe_api::v1alpha1::{
    ClassDriver, ConsistencyLevel, ContentPhase, DeletionPolicy, Fallback, Limits, Pause, VMSnapshotContentStatus,
    Verify,
};
use freezeframe_guard::client::Guard;
use freezeframe_guard::{Server, StateDir, Timing};
use freezeframe_node_agent::boot::{Accelerator, Boots};
use freezeframe_node_agent::drivers::Drivers;
use freezeframe_node_agent::hypervisor::VmKey;
use freezeframe_node_agent::hypervisor::image::ImageRoots;
use freezeframe_node_agent::session::journal::Journal;
use freezeframe_node_agent::session::machine::StoppedVms;
use freezeframe_node_agent::session::order::Order;
use freezeframe_node_agent::session::space_watch::SpaceWatch;
use freezeframe_node_agent::session::{Progress, Sessions, Turn};
use k8s_openapi::jiff::Timestamp;
use serde_json::json;
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use crate::machine::{Drive, Machine, REGIONS, View, view};

const PATIENCE: Duration = Duration::from_secs(30);

pub struct Disk {
    pub id: String,
    pub image: PathBuf,
    pub now: View,
}

pub struct Snapshot {
    pub order: Order,
    pub views: Vec<View>,
}

pub struct Lab {
    pub machine: Machine,
    pub disks: Vec<Disk>,
    pub snapshots: BTreeMap<u32, Snapshot>,
    /// Files that are there from the start beside the disks.
    pub others: Vec<String>,
    pub sessions: Sessions,
    /// Those of every order that is made.
    pub limits: Limits,
    /// The class's parameters for every order that is made.
    pub parameters: BTreeMap<String, String>,
    /// The files that every order that is made names for disks.
    pub targets: BTreeMap<String, String>,
    /// Driver of each disk's inserted node, and images below the disk's own, as they were at the start.
    start: Vec<(String, usize)>,
    /// Whether the disk stays a layer when all snapshots are gone.
    pub stays_layered: bool,
    /// Images of retained snapshots that are beside the chains.
    pub left_out: usize,
    /// Snapshots that are gone while their images are kept, in random lives: there they may be beside the chains.
    pub retained: BTreeSet<u32>,
    taken: u32,
    written: u8,
    _stop: watch::Sender<bool>,
    directory: TempDir,
}

pub struct Wanted;

impl Progress for Wanted {
    fn cancelled(&self) -> bool {
        false
    }
}

pub fn images(directory: &TempDir) -> PathBuf {
    let images = directory.path().join("images");
    std::fs::create_dir_all(&images).unwrap();
    images
}

impl Lab {
    /// Starts QEMU on drives whose images are in `images(&directory)`, and a guard.
    pub async fn start(directory: TempDir, extra: &[String], drives: Vec<Drive>) -> Self {
        let root = directory.path();
        let state = StateDir::open(&root.join("guard")).unwrap();
        let timing =
            Timing { retry: Duration::from_millis(20), confirm: Duration::from_millis(20), ..Timing::default() };
        let (stop, stopping) = watch::channel(false);
        tokio::spawn(Server::bind(&root.join("guard.sock"), state, timing, stopping).unwrap().run());
        let sessions = Sessions {
            drivers: Drivers::default(),
            stopped: StoppedVms::with_files_only(),
            space: SpaceWatch::default(),
            boots: std::sync::Arc::new(Boots::new(64, Duration::from_secs(20), 1, Accelerator::Tcg)),
            vm_root: root.join("vms"),
            roots: ImageRoots::new(vec![root.join("images")]),
            guard: Guard::new(root.join("guard.sock")),
            journal: Journal::open(root.join("journal")).unwrap(),
        };
        let mut machine = Machine::new(root, &root.join("vms/shop/db"), extra, &drives);
        machine.start().await;
        let disk = |drive: &Drive| Disk { id: drive.id.clone(), image: drive.image.clone(), now: view(&drive.image) };
        let disks: Vec<_> = drives.iter().map(disk).collect();
        let mut lab = Self {
            machine,
            disks,
            snapshots: BTreeMap::new(),
            others: vec![],
            sessions,
            limits: Limits::default(),
            parameters: BTreeMap::new(),
            targets: BTreeMap::new(),
            start: vec![],
            stays_layered: false,
            left_out: 0,
            retained: BTreeSet::new(),
            taken: 0,
            written: 0,
            _stop: stop,
            directory,
        };
        lab.others = lab
            .files()
            .into_iter()
            .filter(|name| !lab.disks.iter().any(|disk| file_name(&disk.image) == *name))
            .collect();
        lab.start = lab.shape().await;
        lab.write().await;
        lab
    }

    async fn shape(&self) -> Vec<(String, usize)> {
        let graph = self.machine.graph().await;
        let roots = graph.disks().iter().filter_map(|disk| disk.root.as_deref());
        roots.map(|root| (graph.node(root).unwrap().driver.clone(), graph.chain(root).len())).collect()
    }

    pub fn images(&self) -> PathBuf {
        images(&self.directory)
    }

    fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.images()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Writes some regions of each disk: some over what is there, some new, some half a cluster.
    pub async fn write(&mut self) {
        for disk in &mut self.disks {
            for step in 0..4 {
                self.written = self.written.wrapping_add(1).max(1);
                let region = (usize::from(self.written) * 7 + step * 5) % REGIONS;
                self.machine.write(&disk.id, region, self.written).await;
                disk.now[region] = self.written;
            }
        }
    }

    pub fn order(&mut self) -> (u32, Order) {
        self.taken += 1;
        let order = Order {
            content: format!("vmsnap-{}", self.taken),
            uid: format!("{:012x}-0000-4000-8000-000000000000", self.taken),
            snapshot: ("shop".into(), format!("s{}", self.taken)),
            vm: VmKey { namespace: "shop".into(), name: "db".into() },
            drivers: vec![ClassDriver { name: DriverName("overlay".into()), parameters: self.parameters.clone() }],
            required: ConsistencyLevel::Crash,
            fallback: Fallback::Fail,
            agent_timeout: Duration::from_secs(5),
            freeze_timeout: Duration::from_secs(5),
            max_hold: Duration::from_secs(5),
            mountpoints: vec![],
            pause: Pause::Auto,
            include: vec![],
            exclude: vec![],
            targets: self.targets.clone(),
            verify: Verify::Quick,
            limits: self.limits.clone(),
            deadline: Timestamp::now() + Duration::from_secs(300),
            deletion_policy: DeletionPolicy::Delete,
            generation: Some(1),
        };
        (self.taken, order)
    }

    /// The views that a cut at this moment has.
    pub fn views(&self) -> Vec<View> {
        self.disks.iter().map(|disk| disk.now).collect()
    }

    /// Advances until nothing more comes of it.
    pub async fn advance(&self, order: &Order) -> VMSnapshotContentStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            match Box::pin(self.sessions.advance(order, &Wanted)).await.unwrap() {
                Turn::Over(status) => return *status,
                Turn::Report(status) if Instant::now() > end => {
                    let why = self.sessions.delete(order).await.unwrap().status.conditions;
                    panic!("never over: {status:?}; {why:?}");
                }
                Turn::Report(_) => {}
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Writes, takes a snapshot that must become Ready, and writes again.
    pub async fn take(&mut self) -> u32 {
        self.write().await;
        let (number, order) = self.order();
        let status = self.advance(&order).await;
        assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
        assert!(self.machine.is_running(), "QEMU died: {}", self.machine.said());
        let views = self.views();
        self.snapshots.insert(number, Snapshot { order, views });
        self.write().await;
        number
    }

    /// Deletes until it is over.
    pub async fn delete_order(&self, order: &Order) -> VMSnapshotContentStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            let deletion = Box::pin(self.sessions.delete(order)).await.unwrap();
            if deletion.over {
                return deletion.status;
            }
            println!("not yet: {:?}", deletion.status.conditions.iter().map(|c| &c.message).collect::<Vec<_>>());
            assert!(Instant::now() < end, "never deleted: {:?}", deletion.status.conditions);
            sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn delete(&mut self, number: u32) {
        println!("deleting {number}");
        let order = self.snapshots[&number].order.clone();
        let was_running = self.machine.is_running();
        self.delete_order(&order).await;
        assert_eq!(self.machine.is_running(), was_running, "QEMU died: {}", self.machine.said());
        self.snapshots.remove(&number);
    }

    pub async fn restart(&mut self) {
        self.machine.kill();
        self.machine.start().await;
    }

    /// Where a snapshot's images are by its record.
    pub fn handles(&self, number: u32) -> Vec<PathBuf> {
        self.handles_of(&self.snapshots[&number].order)
    }

    pub fn handles_of(&self, order: &Order) -> Vec<PathBuf> {
        let record = self.sessions.journal.load(&order.uid).unwrap().unwrap();
        let told: Vec<_> = record
            .status
            .iter()
            .flat_map(|status| &status.disks)
            .map(|disk| PathBuf::from(&disk.handle.as_ref().unwrap().0))
            .collect();
        let kept: Vec<_> = record.tasks.iter().map(|task| task.artifact.as_ref().unwrap().handle.clone()).collect();
        assert_eq!(told, kept, "what is reported is not where it is");
        told
    }

    /// Every view reads what it must, and nothing is there that nobody needs.
    pub async fn check(&mut self) {
        let mut expected = self.others.clone();
        for disk in &self.disks {
            expected.extend(disk.image.starts_with(self.images()).then(|| file_name(&disk.image)));
            assert_eq!(view(&disk.image), disk.now, "the VM's own image {} reads wrong", disk.id);
        }
        for (number, snapshot) in &self.snapshots {
            for (handle, wanted) in self.handles(*number).iter().zip(&snapshot.views) {
                assert_eq!(view(handle), *wanted, "snapshot {number}, {}", handle.display());
                expected.extend(handle.starts_with(self.images()).then(|| file_name(handle)));
            }
        }
        expected.sort();
        assert_eq!(self.files(), expected, "files");
        if self.machine.is_running() {
            self.check_qemu().await;
        }
    }

    async fn check_qemu(&self) {
        for disk in &self.disks {
            self.machine.expect(&disk.id, &disk.now).await;
        }
        let shape = self.shape().await;
        assert_eq!(shape.len(), self.start.len());
        for ((driver, depth), (at_first, below)) in shape.into_iter().zip(&self.start) {
            let layered =
                (!self.snapshots.is_empty() || self.stays_layered) && ["raw", "qed"].contains(&at_first.as_str());
            assert_eq!(driver, if layered { "qcow2" } else { at_first }, "filters");
            let most = below + self.snapshots.len() - self.left_out;
            assert!((most - self.retained.len()..=most).contains(&depth), "{depth} layers, not {most}");
        }
        let graph = self.machine.graph().await;
        let mut used = vec![];
        for disk in graph.disks() {
            let mut next =
                disk.root.as_deref().and_then(|root| graph.node(root)).map(|node| vec![node]).unwrap_or_default();
            while let Some(node) = next.pop() {
                used.push(node.name.clone());
                let below = node.backing.iter().chain(&node.file_child);
                next.extend(below.filter_map(|name| graph.node(name)));
            }
        }
        let unused: Vec<_> =
            graph.nodes().filter(|node| !used.contains(&node.name)).map(|n| (&n.name, &n.file)).collect();
        assert!(unused.is_empty(), "QEMU has nodes that no disk uses: {unused:?}");
        let sets = self.machine.execute("query-fdsets", json!({})).await;
        for set in sets.as_array().unwrap() {
            let name = format!("/dev/fdset/{}", set["fdset-id"]);
            assert!(graph.nodes().any(|node| node.file == name), "QEMU has descriptors that no node uses: {set}");
        }
        assert_eq!(self.machine.execute("query-jobs", json!({})).await, json!([]), "jobs");
        let status = self.machine.execute("query-status", json!({})).await;
        assert_eq!(status["status"], "running");
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}
