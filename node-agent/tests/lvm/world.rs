//! A VM on logical volumes, a guard and an agent's sessions, all of one test's own.

use std::path::Path;
use std::time::{Duration, Instant};

use freezeframe_api::v1alpha1::VMSnapshotContentStatus;
use freezeframe_guard::client::Guard;
use freezeframe_guard::{Server, StateDir, Timing};
use freezeframe_node_agent::boot::{Accelerator, Boots};
use freezeframe_node_agent::drivers::lvm::Lvm;
use freezeframe_node_agent::drivers::{DiskTask, Drivers, Env, Pace, Removal, SnapshotDriver};
use freezeframe_node_agent::hypervisor::disks::disks;
use freezeframe_node_agent::hypervisor::image::ImageRoots;
use freezeframe_node_agent::hypervisor::target_file::{self, KnownDisk, TargetFile};
use freezeframe_node_agent::hypervisor::{Vm, VmKey};
use freezeframe_node_agent::session::journal::Journal;
use freezeframe_node_agent::session::machine::StoppedVms;
use freezeframe_node_agent::session::order::Order;
use freezeframe_node_agent::session::space_watch::SpaceWatch;
use freezeframe_node_agent::session::{Progress, Sessions, Turn};
use tempfile::TempDir;
use tokio::sync::watch;

use crate::content::Content;
use crate::counting;
use crate::machine::Machine;
use crate::node::{GROUP, Lv, lvm};
use crate::snapshot_order::snapshot_order;

/// LVM's commands take seconds where they are emulated on a busy machine.
const SOON: Duration = Duration::from_secs(60);
const MOST_STEPS: usize = 8;
/// A session, with what has to be tried again.
const ADVANCED: Duration = Duration::from_secs(240);

pub struct World {
    machine: Option<Machine>,
    pub sessions: Sessions,
    volumes: Vec<Lv>,
    pub contents: Vec<Content>,
    epoch: u8,
    _guard: watch::Sender<bool>,
    run: TempDir,
}

/// Where an agent of this world lets images be.
pub fn roots(run: &Path) -> ImageRoots {
    ImageRoots::new(vec![run.join("images"), run.join("vms"), Path::new("/dev").join(GROUP)])
}

/// A snapshot that is complete.
pub struct Snapshot {
    pub tasks: Vec<DiskTask>,
    pub pause: Duration,
    contents: Vec<Content>,
}

impl Snapshot {
    /// Its artifacts read as the disks did at its cut.
    pub fn check(&self) {
        for (task, content) in self.tasks.iter().zip(&self.contents) {
            let artifact = task.artifact.as_ref().unwrap();
            content.check(&artifact.handle, &artifact.format).unwrap();
        }
    }
}

struct NeverCancelled;

impl Progress for NeverCancelled {
    fn cancelled(&self) -> bool {
        false
    }
}

impl World {
    /// A running VM on new volumes that read as zeros.
    pub async fn new(volumes: &[Lv]) -> Self {
        volumes.iter().for_each(Lv::create);
        Self::on(volumes).await
    }

    /// A VM on new volumes whose guest writes to the first two by turns, for ever.
    pub async fn counting(volumes: &[Lv]) -> Self {
        volumes.iter().for_each(Lv::create);
        counting::install(Path::new(&volumes[0].path()), "raw");
        Self::on(volumes).await
    }

    async fn on(volumes: &[Lv]) -> Self {
        let mut world = Self::without_vm();
        world.machine = Some(Machine::start(&world.sessions.vm_root.join("shop/db-1"), volumes).await);
        world.contents = vec![Content::default(); volumes.len()];
        world.volumes = volumes.to_vec();
        world
    }

    /// A guard and an agent's sessions, for a VM `shop/db-1` that the test starts itself.
    pub fn without_vm() -> Self {
        let run = tempfile::tempdir().unwrap();
        let vm_root = run.path().join("vms");
        let directory = vm_root.join("shop/db-1");
        std::fs::create_dir_all(&directory).unwrap();
        let (stop, stopping) = watch::channel(false);
        let state = StateDir::open(&run.path().join("guard")).unwrap();
        let socket = run.path().join("guard.sock");
        let timing = Timing { silence: Duration::from_secs(30), ..Timing::default() };
        tokio::spawn(Server::bind(&socket, state, timing, stopping).unwrap().run());
        let sessions = Sessions {
            roots: roots(run.path()),
            vm_root,
            guard: Guard::new(socket),
            journal: Journal::open(run.path().join("contents")).unwrap(),
            restores: Journal::open(run.path().join("restores")).unwrap(),
            drivers: Drivers::default(),
            stopped: StoppedVms::with_files_only(),
            space: SpaceWatch::default(),
            boots: std::sync::Arc::new(Boots::new(64, Duration::from_secs(20), 1, Accelerator::Tcg)),
        };
        Self { machine: None, sessions, volumes: vec![], contents: vec![], epoch: 0, _guard: stop, run }
    }

    /// Where the test may put files.
    pub fn directory(&self) -> &Path {
        self.run.path()
    }

    pub fn machine(&self) -> &Machine {
        self.machine.as_ref().unwrap()
    }

    /// Ends QEMU, and says in the VM's directory what its disks are.
    pub fn quit(&mut self) {
        self.machine = None;
        let names: Vec<_> = (0..self.volumes.len()).map(|at| format!("vd{at}")).collect();
        self.say_disks(&names.iter().map(String::as_str).collect::<Vec<_>>(), &self.volumes);
    }

    /// Says in the VM's directory what its disks are.
    pub fn say_disks(&self, names: &[&str], volumes: &[Lv]) {
        let disk = |(name, volume): (&&str, &Lv)| KnownDisk {
            name: (*name).to_owned(),
            path: volume.path().into(),
            format: "raw".into(),
            read_only: false,
        };
        let disks = names.iter().zip(volumes).map(disk).collect();
        let file = TargetFile { disks, ..TargetFile::default() };
        let path = self.sessions.vm_root.join("shop/db-1").join(target_file::FILE);
        std::fs::write(path, serde_json::to_vec(&file).unwrap()).unwrap();
    }

    /// Starts QEMU again, with the command line that it always had.
    pub async fn start(&mut self) {
        self.machine = Some(Machine::start(&self.sessions.vm_root.join("shop/db-1"), &self.volumes).await);
    }

    /// Starts QEMU again, on other devices.
    pub async fn start_on(&mut self, devices: &[(String, &str)]) {
        self.machine = None;
        self.machine = Some(Machine::start_on(&self.sessions.vm_root.join("shop/db-1"), devices).await);
    }

    /// What is to be read of the volumes themselves.
    pub fn check_volumes(&self, contents: &[Content]) {
        for (volume, content) in self.volumes.iter().zip(contents) {
            content.check(Path::new(&volume.path()), "raw").unwrap();
        }
    }

    /// The VM of every test.
    pub fn key() -> VmKey {
        VmKey { namespace: "shop".into(), name: "db-1".into() }
    }

    /// The agent's connection to the VM.
    pub async fn vm(&self) -> Vm {
        Vm::open(&self.sessions.vm_root, &Self::key()).await.unwrap()
    }

    /// The guest writes something new to every disk.
    pub async fn write(&mut self) {
        self.epoch += 1;
        for at in 0..self.volumes.len() {
            let pattern = self.epoch * 3 + u8::try_from(at).unwrap();
            for command in self.contents[at].write(pattern) {
                self.machine().io(&format!("vd{at}"), &command).await;
            }
            self.machine().flush(&format!("vd{at}")).await;
        }
    }

    /// The guest reads what it wrote last.
    pub async fn check_guest(&self) {
        for (at, content) in self.contents.iter().enumerate() {
            for command in content.reads() {
                self.machine().io(&format!("vd{at}"), &command).await;
            }
        }
    }

    /// An order for all disks with `lvm` alone.
    pub fn order(number: u32) -> Order {
        let parameters = [("size".to_owned(), "100%ORIGIN".to_owned())].into();
        snapshot_order(number, Self::key(), "lvm", parameters, SOON)
    }

    /// Takes a snapshot to its end, good or bad.
    pub async fn advance(&self, order: &Order) -> VMSnapshotContentStatus {
        let end = Instant::now() + ADVANCED;
        loop {
            match self.sessions.advance(order, &NeverCancelled).await.unwrap() {
                Turn::Over(status) => return *status,
                Turn::Report(status) => {
                    assert!(Instant::now() < end, "the session of {} comes to no end: {status:?}", order.content);
                }
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Takes a snapshot step by step, and returns its tasks, how long the virtual CPUs stood still, and what the disks
    /// read at the cut. Without a session: its window lets the virtual CPUs stand still for a second and a half at
    /// most, and LVM that is emulated on a busy machine needs longer.
    pub async fn snapshot(&self, number: u32) -> Snapshot {
        let mut tasks = self.steps(number, &[]).await;
        let pause = self.cut(&tasks).await;
        let vm = self.vm().await;
        for task in &mut tasks {
            Lvm.complete(&vm, &self.sessions.roots, task).await.unwrap();
        }
        Snapshot { tasks, pause, contents: self.contents.clone() }
    }

    /// The driver's tasks for all disks, planned and prepared.
    pub async fn steps(&self, number: u32, parameters: &[(&str, &str)]) -> Vec<DiskTask> {
        let vm = self.vm().await;
        let found = disks(&vm, &self.sessions.roots).await.unwrap();
        let mut tasks = vec![];
        for (index, disk) in found.found.into_iter().enumerate() {
            let mut all = Self::order(1).drivers[0].parameters.clone();
            all.extend(parameters.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
            let mut task = DiskTask {
                disk: disk.name,
                driver: "lvm".into(),
                reason: String::new(),
                parameters: all,
                id: Self::order(number).id(),
                index,
                node: disk.node,
                format: disk.facts.format,
                size: disk.size,
                path: None,
                chain: vec![],
                vm: Self::key(),
                snapshot: format!("snapshot-{number}"),
                target: None,
                start_with: None,
                state: serde_json::Value::Null,
                artifact: None,
            };
            Lvm.plan(&mut task, &found.graph, &self.sessions.roots).unwrap();
            Lvm.prepare(&vm, &self.sessions.roots, &mut task).await.unwrap();
            tasks.push(task);
        }
        tasks
    }

    /// What the window does, without one; returns how long the virtual CPUs stood still.
    pub async fn cut(&self, tasks: &[DiskTask]) -> Duration {
        let cut = Lvm.cut(&tasks.iter().collect::<Vec<_>>(), &self.sessions.roots).unwrap();
        let stopped = Instant::now();
        self.machine().monitor.stop(SOON).await.unwrap();
        for host in &cut.host {
            (host.run)().unwrap();
        }
        self.machine().monitor.cont(SOON).await.unwrap();
        stopped.elapsed()
    }

    /// Takes back what tasks made, until nothing is left.
    pub async fn remove(&self, tasks: &mut [DiskTask]) {
        let vm = self.vm().await;
        let env = Env { vm: Some(&vm), roots: &self.sessions.roots, siblings: &[], pace: &Pace::default() };
        for task in tasks {
            let mut steps = 0..MOST_STEPS;
            while !matches!(Lvm.remove(&env, task).await.unwrap(), Removal::Done) {
                assert!(steps.next().is_some(), "disk {} is not removed", task.disk);
            }
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // QEMU first, or its volumes are in use.
        self.machine = None;
        if !std::thread::panicking() {
            for volume in &self.volumes {
                lvm(&format!("lvremove -qq -f {}", volume.path().trim_start_matches("/dev/")));
            }
        }
    }
}
