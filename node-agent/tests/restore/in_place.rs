//! A stopped VM's disks put back, and the restore undone by another.

use freezeframe_api::conditions::reasons;
use freezeframe_api::v1alpha1::{RestoreContentPhase, RestoreMode, RestoreStep};
use freezeframe_node_agent::restore::order::RestoreOrder;

use crate::cases::{drivers, for_every};
use crate::lab::{CASES, Lab};
use crate::machine::Machine;
use crate::storage::{Kind, Storage, run};
use crate::world::{World, disk};

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_is_put_back_and_the_restore_is_undone_by_restoring_what_was_kept() {
    for_every(CASES.iter().copied(), |case| async move {
        for mode in [RestoreMode::Linked, RestoreMode::Full] {
            let mut lab = Lab::of(case).await;
            lab.world.write().await;
            let (old, old_data) = lab.snapshot(case.driver, 1).await;
            lab.world.write().await;
            let (later, later_data) = lab.snapshot(case.driver, 2).await;
            lab.world.write().await;
            let (before, before_data) = lab.stop_and_keep(case.driver, 3).await;

            let order = RestoreOrder { mode, ..lab.order_in_place(&old, &before) };
            lab.restore(&order).await;
            lab.check_disks(&old_data);
            lab.world.contents.clone_from(&old_data);
            // The same command line; and what was taken before is what it was.
            lab.world.start().await;
            lab.world.check_guest().await;
            lab.world.write().await;
            for (snapshot, data) in [(&old, &old_data), (&later, &later_data), (&before, &before_data)] {
                lab.world.check_artifacts(snapshot, data);
            }

            let (undone, undone_data) = lab.stop_and_keep(case.driver, 4).await;
            let undo = RestoreOrder { mode, ..lab.order_in_place(&before, &undone) };
            lab.restore(&undo).await;
            lab.check_disks(&before_data);
            lab.world.contents.clone_from(&before_data);
            lab.world.start().await;
            lab.world.check_guest().await;
            lab.world.write().await;
            for (snapshot, data) in
                [(&old, &old_data), (&later, &later_data), (&before, &before_data), (&undone, &undone_data)]
            {
                lab.world.check_artifacts(snapshot, data);
            }
            let left: Vec<_> =
                lab.files().into_iter().filter(|f| f.contains("vmrestore-") || f.contains("vmreplaced-")).collect();
            assert!(left.is_empty(), "{left:?}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_disk_alone_is_put_back_and_the_other_stays() {
    for_every(CASES.iter().copied(), |case| async move {
        let mut lab = Lab::of(case).await;
        lab.world.write().await;
        let (old, old_data) = lab.snapshot(case.driver, 1).await;
        lab.world.write().await;
        let (before, before_data) = lab.stop_and_keep(case.driver, 2).await;
        let order = RestoreOrder { include: vec!["vd1".into()], ..lab.order_in_place(&old, &before) };
        lab.restore(&order).await;
        lab.check_disks(&[before_data[0].clone(), old_data[1].clone()]);
    })
    .await;
}

/// QEMU writes such bitmaps when it closes the image: after the cut.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_whose_bitmaps_are_stored_when_it_is_closed_is_put_back() {
    for case in [CASES[5], CASES[2]] {
        let mut lab = Lab::of(case).await;
        lab.world.write().await;
        lab.world.quit().await;
        for disk in &lab.world.disks {
            run(&format!("qemu-img bitmap --add -f qcow2 {} b0", disk.file.display()), &[]);
        }
        lab.world.start().await;
        let (old, old_data) = lab.snapshot(case.driver, 1).await;
        lab.world.write().await;
        let (before, _) = lab.stop_and_keep(case.driver, 2).await;
        let order = lab.order_in_place(&old, &before);
        lab.restore(&order).await;
        lab.check_disks(&old_data);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_may_be_stopped_is_shut_down_and_by_force_if_its_guest_does_nothing() {
    let case = CASES[0];
    let mut lab = Lab::of(case).await;
    lab.world.write().await;
    let (old, _) = lab.snapshot(case.driver, 1).await;
    let order = RestoreOrder { step: RestoreStep::Stop, stop_vm: true, ..lab.order(&old) };
    let status = lab.advance(&order).await;
    assert_eq!(status.phase, Some(RestoreContentPhase::Stopped), "{:?}", status.conditions);
    assert!(!lab.world.sessions.vm_root.join("shop/db-1/qmp.sock").exists(), "QEMU has ended in good order");
    lab.world.check_images();
    // Again: it is stopped.
    let status = lab.advance(&order).await;
    assert_eq!(status.phase, Some(RestoreContentPhase::Stopped));
    assert!(status.disks.iter().all(|disk| disk.message.as_ref().unwrap().contains("kept")));
    // Again, after somebody started it: that is theirs to do, and is noticed before anything is replaced.
    lab.world.start().await;
    let status = lab.advance(&order).await;
    assert_eq!(status.phase, Some(RestoreContentPhase::Stopped));
    lab.world.check_guest().await;
    lab.refused(&RestoreOrder { step: RestoreStep::Restore, generation: Some(2), ..order }, reasons::VM_RUNNING).await;
    lab.world.check_guest().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_could_not_be_stopped_is_not_shut_down_later() {
    let case = CASES[0];
    let mut lab = Lab::of(case).await;
    lab.world.write().await;
    let (old, _) = lab.snapshot(case.driver, 1).await;
    let order = RestoreOrder { step: RestoreStep::Stop, ..lab.order(&old) };
    lab.refused(&order, reasons::VM_RUNNING).await;
    lab.refused(&RestoreOrder { stop_vm: true, ..order }, reasons::VM_RUNNING).await;
    lab.world.check_guest().await;
}

/// What manages it starts it again whenever it ends: shutting it down once more would not help.
#[tokio::test(flavor = "multi_thread")]
async fn a_vm_whose_manager_starts_it_again_is_not_restored_over() {
    let case = CASES[0];
    let mut lab = Lab::of(case).await;
    lab.world.write().await;
    let (old, _) = lab.snapshot(case.driver, 1).await;
    lab.world.quit().await;
    let (directory, disks) = (lab.world.directory(), lab.world.disks.clone());
    let first = Machine::start(&directory, &disks).await;
    let manager = tokio::spawn(async move {
        first.ended().await;
        Machine::start(&directory, &disks).await
    });
    let order = RestoreOrder { step: RestoreStep::Stop, stop_vm: true, ..lab.order(&old) };
    let said = lab.refused(&order, reasons::VM_RUNNING).await;
    assert!(said.contains("started again") && said.contains("what manages it"), "{said}");
    lab.world.adopt(manager.await.unwrap());
    lab.world.check_guest().await;
    // Asked again, it is not shut down a second time.
    lab.refused(&order, reasons::VM_RUNNING).await;
    lab.world.check_guest().await;
}

/// The images below the restored disk's own would be in a read-only subvolume: `reflink` could make no clones beside them,
/// and `btrfs` takes one subvolume.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_chain_came_back_from_a_subvolume_every_driver_takes_it_that_did_before() {
    let storage = Storage::new(Kind::Btrfs);
    let vd0 = disk(&storage, "vd0", "qcow2");
    let base = vd0.file.with_file_name("base.qcow2");
    std::fs::rename(&vd0.file, &base).unwrap();
    run("qemu-img create -q -f qcow2 -F qcow2 -b base.qcow2", &[&vd0.file]);
    let mut lab = Lab::with(World::with(storage, vec![vd0], drivers()).await);
    lab.world.write().await;
    let (old, old_data) = lab.snapshot("btrfs", 1).await;
    lab.world.write().await;
    let (before, _) = lab.stop_and_keep("btrfs", 2).await;
    let order = lab.order_in_place(&old, &before);
    lab.restore(&order).await;
    lab.check_disks(&old_data);
    lab.world.contents.clone_from(&old_data);
    lab.world.start().await;
    for (number, driver) in [(3, "btrfs"), (4, "reflink")] {
        lab.snapshot(driver, number).await;
    }
}
