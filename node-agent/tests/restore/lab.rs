//! A VM with snapshots, and the restores of its node.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use freezeframe_api::conditions::{find, types};
use freezeframe_api::v1alpha1::{RestoreContentPhase, RestoreMode, VMRestoreContentStatus};
use freezeframe_node_agent::hypervisor::VmKey;
use freezeframe_node_agent::hypervisor::image::ImageRoots;
use freezeframe_node_agent::hypervisor::target_file::{self, KnownDisk, TargetFile};
use freezeframe_node_agent::restore::order::RestoreOrder;
use freezeframe_node_agent::restore::{Restores, Turn};
use freezeframe_node_agent::session::Progress;
use freezeframe_node_agent::session::order::Order;
use tokio::sync::watch;

use crate::cases::Case;
use crate::content::Content;
use crate::machine::Disk;
use crate::node;
use crate::order::order;
use crate::storage::Kind;
use crate::world::World;

/// Every driver whose snapshots can be brought back on a host without device-mapper.
pub const CASES: &[Case] = &[
    Case { driver: "overlay", storage: Kind::Plain, format: "qcow2" },
    Case { driver: "overlay", storage: Kind::Xfs, format: "qcow2" },
    Case { driver: "copy", storage: Kind::Plain, format: "qcow2" },
    Case { driver: "copy", storage: Kind::Plain, format: "raw" },
    Case { driver: "reflink", storage: Kind::Xfs, format: "raw" },
    Case { driver: "reflink", storage: Kind::Btrfs, format: "qcow2" },
    Case { driver: "btrfs", storage: Kind::Btrfs, format: "raw" },
    Case { driver: "btrfs", storage: Kind::Btrfs, format: "qcow2" },
];

pub struct Lab {
    pub world: World,
    pub restores: Restores,
    restored: u32,
}

/// Wanted until it is said not to be.
#[derive(Default)]
pub struct Wish(AtomicBool);

impl Wish {
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Progress for Wish {
    fn cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Lab {
    pub async fn of(case: Case) -> Self {
        Self::with(Box::pin(World::of(case)).await)
    }

    pub fn with(world: World) -> Self {
        let restores = Self::restores(&world);
        Self { world, restores, restored: 0 }
    }

    /// The restores of the world's node, as they are once its agent was started.
    pub fn restores(world: &World) -> Restores {
        let sessions = &world.sessions;
        node::restores(Self::run(world), sessions.roots.clone(), sessions.drivers.clone())
    }

    /// The same where the class's directory for copies is beneath an image root too, so that images may link to them.
    pub async fn with_copies_in_reach(case: Case) -> Self {
        let mut world = World::of(case).await;
        let roots = [world.storage.root(), world.sessions.vm_root.clone(), world.copies.path().to_owned()];
        world.sessions.roots = ImageRoots::new(roots.into());
        Self::with(world)
    }

    /// The directory that has all of the node's own files.
    pub fn run(world: &World) -> &Path {
        world.sessions.vm_root.parent().unwrap()
    }

    /// An order to bring all disks of a snapshot back, in place.
    pub fn order(&mut self, source: &Order) -> RestoreOrder {
        self.restored += 1;
        order(self.restored, source)
    }

    pub fn order_in_place(&mut self, source: &Order, before: &Order) -> RestoreOrder {
        RestoreOrder { pre_restore: Some(before.uid.clone()), ..self.order(source) }
    }

    pub fn order_to_new(&mut self, source: &Order, name: &str, mode: RestoreMode) -> RestoreOrder {
        let new_vm = Some(VmKey { namespace: "shop".into(), name: name.into() });
        RestoreOrder { new_vm, mode, ..self.order(source) }
    }

    pub async fn advance(&self, order: &RestoreOrder) -> VMRestoreContentStatus {
        self.advance_wanted(order, &Wish::default()).await
    }

    pub async fn advance_wanted(&self, order: &RestoreOrder, wish: &Wish) -> VMRestoreContentStatus {
        match self.restores.advance(order, wish, &watch::Sender::new(None)).await.unwrap() {
            Turn::Over(status) => *status,
            Turn::Again(status) => panic!("not over: {status:?}"),
        }
    }

    /// A restore that must succeed; returns where the images are.
    pub async fn restore(&self, order: &RestoreOrder) -> Vec<PathBuf> {
        let status = self.advance(order).await;
        assert_eq!(status.phase, Some(RestoreContentPhase::Succeeded), "{:?}", status.conditions);
        status.disks.iter().map(|disk| PathBuf::from(&disk.path.0)).collect()
    }

    /// A restore that must fail for a reason, and leave nothing but what was there.
    pub async fn refused(&self, order: &RestoreOrder, reason: &str) -> String {
        let before = self.files();
        let status = self.advance(order).await;
        let (found, message) = why(&status);
        assert_eq!((status.phase, found.as_str()), (Some(RestoreContentPhase::Failed), reason), "{message}");
        assert_eq!(self.files(), before, "{message}");
        message
    }

    /// Takes a snapshot of what the guest has now, and lets it write on.
    pub async fn snapshot(&mut self, driver: &str, number: u32) -> (Order, Vec<Content>) {
        let order = self.world.order(driver, number);
        let taken = Box::pin(self.world.snapshot(&order)).await;
        (order, taken)
    }

    /// Ends QEMU and keeps the stopped VM's state, as an operator does before a restore in place.
    pub async fn stop_and_keep(&mut self, driver: &str, number: u32) -> (Order, Vec<Content>) {
        self.world.quit().await;
        let disk = |disk: &Disk| KnownDisk {
            name: disk.name.clone(),
            path: disk.file.clone(),
            format: disk.format.clone(),
            read_only: false,
        };
        let disks = self.world.disks.iter().map(disk).collect();
        let file = TargetFile { disks, ..TargetFile::default() };
        let path = self.world.sessions.vm_root.join("shop/db-1").join(target_file::FILE);
        std::fs::write(path, serde_json::to_vec(&file).unwrap()).unwrap();
        self.snapshot(driver, number).await
    }

    /// All files of images, and of VMs but for sockets.
    pub fn files(&self) -> Vec<String> {
        let mut files: Vec<_> = self.world.files().into_iter().collect();
        for namespace in std::fs::read_dir(&self.world.sessions.vm_root).unwrap() {
            let vms = std::fs::read_dir(namespace.unwrap().path()).unwrap();
            files.extend(vms.map(|vm| vm.unwrap().path().display().to_string()));
        }
        files
    }

    /// The disks' own images read so, in the format that the VM's command line names.
    pub fn check_disks(&self, contents: &[Content]) {
        for (disk, content) in self.world.disks.iter().zip(contents) {
            content.check(&disk.file, &disk.format).unwrap();
        }
    }

    /// Deletes a snapshot; what keeps it, if something does.
    pub async fn delete(&self, order: &Order) -> Option<String> {
        let deletion = self.world.sessions.delete(order).await.unwrap();
        let why = find(&deletion.status.conditions, types::REMOVED).unwrap().message.clone();
        (!deletion.over).then_some(why)
    }
}

/// Reason and message of condition Ready.
pub fn why(status: &VMRestoreContentStatus) -> (String, String) {
    let ready = find(&status.conditions, types::READY).unwrap();
    (ready.reason.clone(), ready.message.clone())
}
