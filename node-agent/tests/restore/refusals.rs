//! What a restore refuses, and that a refusal leaves everything as it was.

use std::path::Path;

use freezeframe_api::conditions::reasons;
use freezeframe_api::v1alpha1::{RestoreContentPhase, RestoreMode, RestoreStep};
use freezeframe_node_agent::restore::order::RestoreOrder;
use freezeframe_node_agent::session::journal::SessionRecord;

use crate::cases::Case;
use crate::lab::{CASES, Lab, Wish, why};
use crate::storage::{Kind, run};

async fn with_snapshots(case: Case) -> (Lab, RestoreOrder) {
    let mut lab = Lab::of(case).await;
    lab.world.write().await;
    let (old, _) = lab.snapshot(case.driver, 1).await;
    lab.world.write().await;
    let (before, _) = lab.snapshot(case.driver, 2).await;
    let order = lab.order_in_place(&old, &before);
    (lab, order)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_runs_is_not_restored_over() {
    for case in CASES {
        let (lab, order) = with_snapshots(*case).await;
        lab.refused(&RestoreOrder { step: RestoreStep::Stop, ..order.clone() }, reasons::VM_RUNNING).await;
        lab.refused(&order, reasons::VM_RUNNING).await;
        lab.world.check_guest().await;
    }
}

/// Its monitor is elsewhere, but it has the images open.
#[tokio::test(flavor = "multi_thread")]
async fn a_vm_whose_monitor_is_out_of_reach_is_seen_by_its_locks() {
    let (lab, order) = with_snapshots(CASES[0]).await;
    let socket = lab.world.sessions.vm_root.join("shop/db-1/qmp.sock");
    std::fs::rename(&socket, socket.with_extension("away")).unwrap();
    let said = lab.refused(&order, reasons::VM_RUNNING).await;
    assert!(said.contains("open in another process"), "{said}");
    lab.world.check_guest().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_after_the_state_was_kept_is_not_overwritten() {
    for case in CASES {
        let mut lab = Lab::of(*case).await;
        lab.world.write().await;
        let (old, _) = lab.snapshot(case.driver, 1).await;
        lab.world.write().await;
        let (before, _) = lab.stop_and_keep(case.driver, 2).await;
        lab.world.start().await;
        lab.world.write().await;
        lab.world.quit().await;
        // As by a clock that was set back, or that isn't ours.
        for disk in &lab.world.disks {
            run("touch -d 2001-01-01", &[&disk.file]);
        }
        let order = lab.order_in_place(&old, &before);
        lab.refused(&order, reasons::VM_CHANGED).await;
        lab.world.check_images();
    }
}

/// It may have written after the cut, and ended since.
#[tokio::test(flavor = "multi_thread")]
async fn the_state_of_a_vm_that_ran_is_not_taken_for_what_it_is_at_rest() {
    let (mut lab, order) = with_snapshots(CASES[0]).await;
    lab.world.quit().await;
    lab.refused(&order, reasons::VM_CHANGED).await;
    lab.world.check_images();
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_replaced_unless_its_state_is_kept() {
    let (mut lab, order) = with_snapshots(CASES[0]).await;
    lab.world.quit().await;
    for (number, pre_restore) in (0..).zip([None, Some("no such".to_owned()), Some(order.source.clone())]) {
        let uid = format!("{number:08x}-3333-4333-8333-333333333333");
        lab.refused(&RestoreOrder { uid, pre_restore, ..order.clone() }, reasons::PRE_RESTORE_FAILED).await;
    }
    lab.world.check_images();
}

/// Its images may have been merged into since.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_whose_removal_was_begun_is_neither_brought_back_nor_relied_upon() {
    let (mut lab, order) = with_snapshots(CASES[0]).await;
    lab.world.quit().await;
    let journal = &lab.world.sessions.journal;
    let set_removing = |uid: &str, removing| {
        let record = journal.load(uid).unwrap().unwrap();
        journal.save(&SessionRecord { removing, ..record }).unwrap();
    };
    let before = order.pre_restore.clone().unwrap();
    set_removing(&before, true);
    lab.refused(&order, reasons::PRE_RESTORE_FAILED).await;
    set_removing(&before, false);
    set_removing(&order.source, true);
    let uid = "00000009-2222-4222-8222-222222222222".to_owned();
    lab.refused(&RestoreOrder { uid, ..order.clone() }, reasons::SNAPSHOT_NOT_READY).await;
    lab.world.check_images();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_vm_overwrites_neither_a_vm_nor_a_file() {
    let (mut lab, _) = with_snapshots(CASES[0]).await;
    let source = lab.world.order("overlay", 1);
    let order = lab.order_to_new(&source, "db-1", RestoreMode::Linked);
    lab.refused(&order, reasons::VM_EXISTS).await;
    let image = lab.world.storage.images().join("new-vd1.qcow2");
    std::fs::write(&image, "somebody else's").unwrap();
    let order = lab.order_to_new(&source, "new", RestoreMode::Linked);
    let said = lab.refused(&order, reasons::VM_EXISTS).await;
    assert!(said.contains("new-vd1.qcow2"), "{said}");
    assert_eq!(std::fs::read_to_string(&image).unwrap(), "somebody else's");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_or_a_snapshot_that_is_not_there_is_named() {
    let (mut lab, order) = with_snapshots(CASES[0]).await;
    lab.world.quit().await;
    let said =
        lab.refused(&RestoreOrder { include: vec!["nvme".into()], ..order.clone() }, reasons::DISK_NOT_FOUND).await;
    assert!(said.contains("`nvme`") && said.contains("vd0, vd1"), "{said}");
    lab.refused(&RestoreOrder { exclude: vec!["vd0".into(), "vd1".into()], ..order.clone() }, reasons::NO_DISKS).await;
    lab.refused(&RestoreOrder { source: "other".into(), ..order.clone() }, reasons::SNAPSHOT_NOT_FOUND).await;
    let gone = lab.world.order("overlay", 2);
    assert_eq!(lab.delete(&gone).await, None);
    lab.refused(&RestoreOrder { source: gone.uid, ..order }, reasons::SNAPSHOT_NOT_READY).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn space_is_looked_at_before_anything_is_made() {
    let case = Case { driver: "overlay", storage: Kind::Xfs, format: "qcow2" };
    let (mut lab, order) = with_snapshots(case).await;
    let filler = lab.world.storage.images().join("filler");
    let free = free(&lab.world.storage.images());
    run(&format!("fallocate -l {}", free - (600 << 10)), &[&filler]);
    let source = lab.world.order("overlay", 2);
    let new = lab.order_to_new(&source, "new", RestoreMode::Full);
    let said = lab.refused(&new, reasons::NO_SPACE).await;
    assert!(said.contains("bytes are needed in") && said.contains("are free"), "{said}");
    lab.world.quit().await;
    lab.refused(&order, reasons::NO_SPACE).await;
    lab.world.check_images();
}

fn free(path: &Path) -> u64 {
    run("stat -f -c %a*%S", &[path]).trim().split('*').map(|n| n.parse::<u64>().unwrap()).product()
}

/// An image that says it backs onto a file of the host, as a QEMU that was taken over could write it.
#[tokio::test(flavor = "multi_thread")]
async fn a_backing_file_outside_the_roots_is_not_read() {
    for (number, backing) in
        (1..).zip(["/etc/hostname", "../../../../../../etc/hostname", "nbd://localhost/x", "json:{}"])
    {
        let mut lab = Lab::of(CASES[2]).await;
        lab.world.write().await;
        let (snapshot, _) = lab.snapshot("copy", number).await;
        let image = lab.world.artifacts(&snapshot)[0].handle.clone();
        run(&format!("qemu-img rebase -u -f qcow2 -F raw -b {backing}"), &[&image]);
        let order = lab.order_to_new(&snapshot, "new", RestoreMode::Full);
        lab.refused(&order, reasons::RESTORE_FAILED).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_is_cancelled_leaves_nothing() {
    let (mut lab, order) = with_snapshots(CASES[0]).await;
    let source = lab.world.order("overlay", 2);
    let new = lab.order_to_new(&source, "new", RestoreMode::Full);
    lab.world.quit().await;
    let before = lab.files();
    for order in [order, new] {
        let wish = Wish::default();
        wish.cancel();
        let status = lab.advance_wanted(&order, &wish).await;
        assert_eq!((status.phase, why(&status).0.as_str()), (Some(RestoreContentPhase::Failed), reasons::CANCELLED));
        let deletion = lab.restores.delete(&order, Some(&status)).await.unwrap();
        assert!(deletion.over);
        assert_eq!(lab.files(), before);
    }
    lab.world.check_images();
}
