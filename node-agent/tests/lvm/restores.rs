//! Snapshots that are volumes, brought back: as new volumes of a new VM, and in place of the VM's own. The agent is killed
//! on the way, in a process of its own.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::{
    ContentPhase, RestoreContentPhase, RestoreMode, VMRestoreContentStatus, VMSnapshotContentStatus,
};
use freezeframe_guard::client::Guard;
use freezeframe_node_agent::boot::{Accelerator, Boots};
use freezeframe_node_agent::drivers::Drivers;
use freezeframe_node_agent::hypervisor::VmKey;
use freezeframe_node_agent::restore::order::RestoreOrder;
use freezeframe_node_agent::restore::{Restores, Turn};
use freezeframe_node_agent::session::journal::Journal;
use freezeframe_node_agent::session::machine::StoppedVms;
use freezeframe_node_agent::session::order::Order;
use freezeframe_node_agent::session::space_watch::SpaceWatch;
use freezeframe_node_agent::session::{Progress, Sessions};
use tokio::sync::watch;

use crate::content::{Content, qemu_io};
use crate::node::{GROUP, lvm, names, run, thick, thin};
use crate::restore_order;
use crate::world::{World, roots};

const ORDER: &str = "FREEZEFRAME_TEST_ORDER";
const RUN: &str = "FREEZEFRAME_TEST_RUN";

struct NeverCancelled;

impl Progress for NeverCancelled {
    fn cancelled(&self) -> bool {
        false
    }
}

/// A snapshot that its node has on record, and what it must read as.
pub struct Taken {
    order: Order,
    contents: Vec<Content>,
    pub handles: Vec<PathBuf>,
}

impl Taken {
    pub fn new(world: &World, order: Order, status: &VMSnapshotContentStatus) -> Self {
        assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
        let handles = status.disks.iter().map(|disk| PathBuf::from(&disk.handle.as_ref().unwrap().0)).collect();
        Self { order, contents: world.contents.clone(), handles }
    }

    fn check(&self) {
        for (handle, content) in self.handles.iter().zip(&self.contents) {
            content.check(handle, "raw").unwrap();
        }
    }
}

/// Takes a snapshot by a whole session, of the VM as it is: running, or stopped.
pub async fn take(world: &World, number: u32) -> Taken {
    let order = World::order(number);
    let status = world.advance(&order).await;
    let taken = Taken::new(world, order, &status);
    taken.check();
    taken
}

pub async fn delete(world: &World, taken: &Taken) {
    let deletion = world.sessions.delete(&taken.order).await.unwrap();
    assert!(deletion.over, "{:?}", deletion.status.conditions);
}

/// The restores of the node whose files are in `run`.
pub fn restores(run: &Path) -> Restores {
    let boots = Arc::new(Boots::new(64, Duration::from_secs(20), 1, Accelerator::Tcg));
    let sessions = Sessions {
        vm_root: run.join("vms"),
        roots: roots(run),
        guard: Guard::new(run.join("guard.sock")),
        journal: Journal::open(run.join("contents")).unwrap(),
        restores: Journal::open(run.join("restores")).unwrap(),
        drivers: Drivers::default(),
        stopped: StoppedVms::with_files_only(),
        boots: boots.clone(),
        space: SpaceWatch::default(),
    };
    let journal = sessions.restores.clone();
    Restores { sessions: Arc::new(sessions), journal, boots }
}

pub fn order(number: u32, source: &Taken, kept: Option<&Taken>) -> RestoreOrder {
    let pre_restore = kept.map(|kept| kept.order.uid.clone());
    RestoreOrder { pre_restore, ..restore_order::order(number, &source.order) }
}

pub fn to_new(number: u32, source: &Taken, name: &str, mode: RestoreMode) -> RestoreOrder {
    let new_vm = Some(VmKey { namespace: "shop".into(), name: name.into() });
    RestoreOrder { new_vm, mode, ..order(number, source, None) }
}

pub async fn advance(restores: &Restores, order: &RestoreOrder) -> VMRestoreContentStatus {
    match restores.advance(order, &NeverCancelled, &watch::Sender::new(None)).await.unwrap() {
        Turn::Over(status) => *status,
        Turn::Again(status) => panic!("not over: {status:?}"),
    }
}

pub async fn restore(restores: &Restores, order: &RestoreOrder) -> Vec<PathBuf> {
    let status = advance(restores, order).await;
    assert_eq!(status.phase, Some(RestoreContentPhase::Succeeded), "{:?}", status.conditions);
    status.disks.iter().map(|disk| PathBuf::from(&disk.path.0)).collect()
}

async fn refused(restores: &Restores, order: &RestoreOrder, reason: &str) {
    let before = names();
    let status = advance(restores, order).await;
    let ready = find(&status.conditions, types::READY).unwrap();
    assert_eq!((status.phase, ready.reason.as_str()), (Some(RestoreContentPhase::Failed), reason), "{}", ready.message);
    println!("refused: {}", ready.message);
    assert_eq!(names(), before);
}

fn check(images: &[(PathBuf, Content)]) {
    for (image, content) in images {
        content.check(image, "raw").unwrap();
    }
}

/// Volumes that a restore has not settled.
fn left() -> Vec<String> {
    names().into_iter().filter(|name| name.contains("vmrestore-") || name.contains("vmreplaced-")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_vm_gets_volumes_that_outlive_the_snapshot_they_are_of() {
    let mut world = World::new(&[thin("new-a"), thick("new-b")]).await;
    let before = names();
    world.write().await;
    let taken = take(&world, 1).await;
    world.write().await;
    let restores = restores(world.directory());
    let mut made = vec![];
    for (number, name, mode) in [(1, "linked", RestoreMode::Linked), (2, "full", RestoreMode::Full)] {
        let paths = restore(&restores, &to_new(number, &taken, name, mode)).await;
        assert_eq!(paths, [0, 1].map(|at| PathBuf::from(format!("/dev/{GROUP}/{name}-vd{at}"))));
        made.extend(paths.into_iter().zip(taken.contents.clone()));
    }
    refused(&restores, &to_new(3, &taken, "linked", RestoreMode::Full), reasons::VM_EXISTS).await;
    std::fs::remove_dir_all(world.sessions.vm_root.join("shop/linked")).unwrap();
    // The VM's directory is gone, its volumes aren't.
    refused(&restores, &to_new(4, &taken, "linked", RestoreMode::Full), reasons::VM_EXISTS).await;
    check(&made);
    for (path, content) in &mut made {
        qemu_io(path, "raw", &[], &content.write(200)).unwrap();
    }
    taken.check();
    world.check_guest().await;
    delete(&world, &taken).await;
    check(&made);
    for (path, _) in &made {
        lvm(&format!("lvremove -qq -f {}", path.strip_prefix("/dev").unwrap().display()));
    }
    assert_eq!(names(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_vms_volumes_are_put_back_and_the_restore_is_undone() {
    let mut world = World::new(&[thin("back-a"), thick("back-b")]).await;
    let before = names();
    world.write().await;
    let old = take(&world, 1).await;
    world.write().await;
    let later = take(&world, 2).await;
    world.write().await;
    let restores = restores(world.directory());
    refused(&restores, &order(1, &old, Some(&later)), reasons::VM_RUNNING).await;

    world.quit();
    let early = take(&world, 3).await;
    // One block as it was: a write all the same.
    let volume = format!("/dev/{GROUP}/back-a");
    run("dd", &[format!("if={volume}"), format!("of={volume}"), "bs=4k".into(), "count=1".into()]);
    refused(&restores, &order(2, &old, Some(&early)), reasons::VM_CHANGED).await;
    let kept = take(&world, 4).await;
    let paths = restore(&restores, &order(3, &old, Some(&kept))).await;
    assert_eq!(paths, ["back-a", "back-b"].map(|name| PathBuf::from(format!("/dev/{GROUP}/{name}"))));
    world.check_volumes(&old.contents);
    world.contents.clone_from(&old.contents);
    world.start().await;
    world.check_guest().await;
    world.write().await;
    for taken in [&old, &later, &early, &kept] {
        taken.check();
    }
    // The thick one is what its snapshots need.
    assert_eq!(left().len(), 1, "{:?}", left());

    world.quit();
    let undone = take(&world, 5).await;
    restore(&restores, &order(4, &kept, Some(&undone))).await;
    world.check_volumes(&kept.contents);
    world.contents.clone_from(&kept.contents);
    world.start().await;
    world.check_guest().await;
    world.write().await;
    for (gone, taken) in [&later, &undone, &old, &kept, &early].into_iter().enumerate() {
        delete(&world, taken).await;
        [&later, &undone, &old, &kept, &early][gone + 1..].iter().for_each(|taken| taken.check());
    }
    assert_eq!(names(), before, "what was replaced goes with the last snapshot that needs it");
    world.check_guest().await;
}

/// The process that is killed. Run as a test it has nothing to do.
#[tokio::test(flavor = "multi_thread")]
async fn the_agent_that_is_killed() {
    let Ok(order) = std::env::var(ORDER) else { return };
    let order: RestoreOrder = serde_json::from_str(&order).unwrap();
    let restores = restores(Path::new(&std::env::var(RUN).unwrap()));
    drop(restores.advance(&order, &NeverCancelled, &watch::Sender::new(None)).await.unwrap());
}

fn killed_at(world: &World, order: &RestoreOrder, point: &str) {
    let ended = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "restores::the_agent_that_is_killed"])
        .env(ORDER, serde_json::to_string(order).unwrap())
        .env(RUN, world.directory())
        .env("FREEZEFRAME_CRASH_AT", point)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ended.stdout);
    assert_eq!(ended.status.signal(), Some(9), "not killed at {point}: {said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_in_place_that_is_killed_goes_on_or_back_and_never_leaves_a_mixed_set() {
    let mut world = World::new(&[thin("kill-a"), thick("kill-b")]).await;
    let before = names();
    for (number, point, deleted) in [
        (1, "restore-made", true),
        (2, "restore-made", false),
        (3, "restore-away", true),
        (4, "restore-switched-one", false),
        (5, "restore-switched", false),
    ] {
        world.write().await;
        let old = take(&world, 2 * number).await;
        world.write().await;
        world.quit();
        let kept = take(&world, 2 * number + 1).await;
        let order = order(number, &old, Some(&kept));
        killed_at(&world, &order, point);
        let goes_back = deleted && point != "restore-away";
        let is_there = |name: &str| Path::new(&format!("/dev/{GROUP}/{name}")).exists();
        match point {
            "restore-away" | "restore-switched-one" => {
                assert!(!is_there("kill-a") || !is_there("kill-b"), "a VM could start at {point}");
            }
            "restore-switched" => world.check_volumes(&old.contents),
            _ => world.check_volumes(&kept.contents),
        }
        let restores = restores(world.directory());
        if deleted {
            let deletion = restores.delete(&order, None).await.unwrap();
            assert!(deletion.over, "{point}: {:?}", deletion.status.conditions);
        } else {
            restore(&restores, &order).await;
        }
        let now = if goes_back { &kept } else { &old };
        world.check_volumes(&now.contents);
        world.contents.clone_from(&now.contents);
        old.check();
        kept.check();
        world.start().await;
        world.check_guest().await;
        delete(&world, &old).await;
        delete(&world, &kept).await;
        assert_eq!(names(), before, "killed at {point}, {deleted}");
        println!("killed at {point}, then {}: good", if deleted { "deleted" } else { "gone on with" });
    }
}
