//! Snapshots of a VM that doesn't run, by every driver.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;

use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::{ConsistencyLevel, ContentPhase, VMSnapshotContentStatus};
use freezeframe_node_agent::drivers::Drivers;
use freezeframe_node_agent::drivers::overlay::Overlay;
use freezeframe_node_agent::session::Turn;
use freezeframe_node_agent::session::order::Order;
use serde_json::json;

use crate::cases::for_every_case;
use crate::loopcopy::Loopcopy;
use crate::machine::{Disk, Machine};
use crate::storage::{Kind, Storage};
use crate::world::{NeverCancelled, World, disk};

/// Writes the file that names the VM's disks.
fn name_disks(world: &World) {
    let disk = |disk: &Disk| json!({"name": disk.name, "path": disk.file, "format": disk.format});
    let disks: Vec<_> = world.disks.iter().map(disk).collect();
    // JSON is YAML.
    std::fs::write(world.directory().join("target.yaml"), json!({"disks": disks}).to_string()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_vm_is_snapshotted_by_every_driver_and_starts_as_before() {
    for_every_case(|case| async move {
        let mut world = World::of(case).await;
        world.write().await;
        let before = world.footprint().await;
        world.quit().await;
        name_disks(&world);
        let (first, second) = (world.order(case.driver, 1), world.order(case.driver, 2));
        let taken = world.snapshot(&first).await;
        world.check_artifacts(&first, &taken);
        world.check_images();
        world.start().await;
        world.check_guest().await;
        world.write().await;
        world.check_artifacts(&first, &taken);
        world.quit().await;
        let later = world.snapshot(&second).await;
        world.delete(&first).await;
        world.check_artifacts(&second, &later);
        world.check_images();
        world.start().await;
        world.write().await;
        world.check_artifacts(&second, &later);
        world.delete(&second).await;
        world.check_tidy(&before).await;
        world.check_guest().await;
        world.quit().await;
        world.check_images();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_vms_snapshot_says_that_nothing_was_frozen() {
    let world = stopped(|| {}).await;
    let status = world.advance(&order(&world)).await;
    let evidence = status.consistency.unwrap();
    assert_eq!((evidence.level, evidence.pause_millis), (ConsistencyLevel::Crash, 0));
    assert_eq!((evidence.frozen_filesystems, evidence.hold_millis), (None, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_somebody_has_open_refuses_every_driver_and_nothing_is_made() {
    for_every_case(|case| async move {
        let mut world = World::of(case).await;
        world.write().await;
        world.quit().await;
        name_disks(&world);
        // The VM elsewhere: its monitor isn't ours to find, its locks are.
        let elsewhere = tempfile::tempdir().unwrap();
        let machine = Machine::start(elsewhere.path(), &world.disks).await;
        let before = world.files();
        let order = world.order(case.driver, 1);
        let status = world.advance(&order).await;
        let accepted = find(&status.conditions, types::ACCEPTED).unwrap();
        assert_eq!(accepted.reason, reasons::VM_BUSY, "{accepted:?}");
        assert_eq!(world.files(), before);
        machine.quit().await;
        world.check_images();
    })
    .await;
}

async fn stopped(while_cutting: fn()) -> World {
    let storage = Storage::new(Kind::Plain);
    let disks = vec![disk(&storage, "vd0", "qcow2"), disk(&storage, "vd1", "raw")];
    let drivers = Drivers::new(vec![Box::new(Overlay), Box::new(Loopcopy(while_cutting))]);
    let mut world = World::with(storage, disks, drivers).await;
    world.write().await;
    world.quit().await;
    name_disks(&world);
    world
}

/// An order for both of its disks.
fn order(world: &World) -> Order {
    let mut order = world.order("overlay", 1);
    order.drivers.extend(world.order("loopcopy", 1).drivers);
    order
}

fn check_noticed(status: &VMSnapshotContentStatus) {
    let ready = find(&status.conditions, types::READY).unwrap();
    assert_eq!((status.phase, ready.reason.as_str()), (Some(ContentPhase::Failed), reasons::VM_CHANGED), "{ready:?}");
    assert!(ready.message.contains("started while"), "{}", ready.message);
}

static MONITOR: Mutex<Option<PathBuf>> = Mutex::new(None);
static LISTENING: Mutex<Option<UnixListener>> = Mutex::new(None);

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_whose_monitor_appears_during_the_cut_fails_it_and_gets_its_disks_back() {
    let world = stopped(|| {
        let socket = MONITOR.lock().unwrap().take().unwrap();
        drop(std::fs::remove_file(&socket));
        *LISTENING.lock().unwrap() = Some(UnixListener::bind(socket).unwrap());
    })
    .await;
    *MONITOR.lock().unwrap() = Some(world.directory().join("qmp.sock"));
    let (order, before) = (order(&world), world.files());
    let Turn::Report(status) = world.sessions.advance(&order, &NeverCancelled).await.unwrap() else {
        panic!("it can't know what such a VM needs");
    };
    check_noticed(&status);
    *LISTENING.lock().unwrap() = None;
    check_noticed(&world.advance(&order).await);
    assert_eq!(world.files(), before);
    world.check_images();
}

static DISKS: Mutex<Option<(PathBuf, Vec<Disk>)>> = Mutex::new(None);
static STARTED: Mutex<Option<Machine>> = Mutex::new(None);

/// A VM that respects no locks runs on the old files before their names change hands: the names must stay.
#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_starts_without_locks_during_the_cut_goes_on_and_nothing_is_left() {
    let mut world = stopped(|| {
        let (directory, disks) = DISKS.lock().unwrap().take().unwrap();
        let machine = tokio::runtime::Handle::current().block_on(Machine::start_without_locks(&directory, &disks));
        *STARTED.lock().unwrap() = Some(machine);
    })
    .await;
    *DISKS.lock().unwrap() = Some((world.directory(), world.disks.clone()));
    let (order, before) = (order(&world), world.files());
    let status = world.advance(&order).await;
    // First, so that it ends with the test.
    world.adopt(STARTED.lock().unwrap().take().unwrap());
    check_noticed(&status);
    assert_eq!(world.files(), before);
    world.write().await;
    world.check_guest().await;
    world.restart().await;
    world.check_guest().await;
}

/// A stopped VM of which a copy is under way that takes a minute.
async fn copied() -> (World, Order) {
    let mut world = World::on(Kind::Plain, "qcow2").await;
    world.write().await;
    world.quit().await;
    name_disks(&world);
    let mut order = world.order("copy", 1);
    order.drivers[0].parameters.insert("speed".into(), "128Ki".into());
    let turn = world.sessions.advance(&order, &NeverCancelled).await.unwrap();
    assert!(matches!(turn, Turn::Report(_)), "a copy is reported before it is complete");
    (world, order)
}

fn is_locked(disk: &Disk) -> bool {
    let info = Command::new("qemu-img").args(["info", "-f", &disk.format]).arg(&disk.file).output().unwrap();
    !info.status.success()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_is_started_while_it_is_copied_ends_the_copy_and_can_be_started_then() {
    let (mut world, order) = copied().await;
    assert!(world.disks.iter().all(is_locked), "between two turns nothing keeps the VM from starting");
    let socket = world.directory().join("qmp.sock");
    let listening = UnixListener::bind(&socket).unwrap();
    let Turn::Report(status) = world.sessions.advance(&order, &NeverCancelled).await.unwrap() else {
        panic!("it can't know what such a VM needs");
    };
    check_noticed(&status);
    drop(listening);
    check_noticed(&world.advance(&order).await);
    world.start().await;
    world.check_guest().await;
    assert!(world.files().iter().all(|file| !file.contains("/shop.db-1/")), "{:?}", world.files());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_a_stopped_vm_that_is_deleted_lets_go_of_its_disks() {
    let (mut world, order) = copied().await;
    world.delete(&order).await;
    assert!(!world.disks.iter().any(is_locked));
    world.start().await;
    world.check_guest().await;
    assert!(world.files().iter().all(|file| !file.contains("/shop.db-1/")), "{:?}", world.files());
}
