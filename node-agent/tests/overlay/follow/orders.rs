//! Deleting in every order, whatever the VM does meanwhile.

use std::path::PathBuf;

use freezeframe_api::conditions::{find, types};
use freezeframe_api::v1alpha1::ContentPhase;
use tempfile::TempDir;

use crate::lab::{Lab, Snapshot, images};
use crate::machine::{Drive, REGION, REGIONS, path, run};
use crate::orders::orders;

use super::{Base, check, follow, lab, layer, write_target_file};

async fn take_three(lab: &mut Lab, base: Base) -> Vec<u32> {
    let mut taken = vec![];
    for _ in 0..3 {
        taken.push(lab.take().await);
        check(lab, base).await;
    }
    taken
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_of_a_disk_that_is_not_qcow2_are_deleted_in_every_order_and_leave_it_as_it_was() {
    for base in [Base::Raw, Base::Qed] {
        let mut lab = lab(base).await;
        for order in orders(&[0, 1, 2]) {
            println!("{base:?} {order:?}");
            let taken = take_three(&mut lab, base).await;
            for at in order {
                lab.delete(taken[at]).await;
                check(&mut lab, base).await;
                lab.write().await;
            }
        }
        // Nothing but the old command line.
        lab.restart().await;
        check(&mut lab, base).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_are_deleted_in_every_order_while_the_vm_is_stopped() {
    for base in [Base::Raw, Base::Qed] {
        let mut lab = lab(base).await;
        for order in orders(&[0, 1, 2]) {
            println!("{base:?} {order:?}");
            let taken = take_three(&mut lab, base).await;
            lab.machine.kill();
            for at in order {
                lab.delete(taken[at]).await;
                check(&mut lab, base).await;
            }
            lab.machine.start().await;
            check(&mut lab, base).await;
            lab.write().await;
        }
    }
}

/// Which of the restarts come before which snapshot and deletion differs from order to order.
#[tokio::test(flavor = "multi_thread")]
async fn a_vm_whose_owner_follows_loses_nothing_in_any_order() {
    for base in [Base::Raw, Base::Qed] {
        let mut lab = lab(base).await;
        for (number, order) in orders(&[0, 1, 2]).into_iter().enumerate() {
            println!("{base:?} {order:?}");
            let mut taken = vec![];
            for at in 0..3 {
                if number & (1 << at) != 0 {
                    follow(&mut lab, base).await;
                }
                taken.push(lab.take().await);
                check(&mut lab, base).await;
            }
            for (step, at) in order.into_iter().enumerate() {
                if (number + step) % 3 != 0 {
                    follow(&mut lab, base).await;
                }
                lab.delete(taken[at]).await;
                check(&mut lab, base).await;
                lab.write().await;
            }
            // What the command line had may be gone by now.
            follow(&mut lab, base).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_of_a_stopped_vm_are_found_by_what_its_file_said_before_them() {
    for base in [Base::Raw, Base::Qed] {
        let mut lab = lab(base).await;
        write_target_file(&lab, &base.image(&lab));
        lab.machine.kill();
        for order in orders(&[0, 1, 2]) {
            println!("{base:?} {order:?}");
            let mut taken = vec![];
            for at in 0..3 {
                let (number, order) = lab.order();
                let status = lab.advance(&order).await;
                assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
                let told = status.disks[0].start_with.as_ref().map(|now| PathBuf::from(&now.path));
                assert_eq!(told, (at == 0).then(|| layer(&lab, base)), "the first cut makes another image of it");
                let views = lab.views();
                lab.snapshots.insert(number, Snapshot { order, views });
                taken.push(number);
                check(&mut lab, base).await;
                if at == 1 {
                    follow(&mut lab, base).await;
                    lab.write().await;
                    lab.machine.kill();
                }
            }
            for at in order {
                lab.delete(taken[at]).await;
                check(&mut lab, base).await;
            }
        }
    }
}

/// QEMU named the nodes of a `-drive` itself, so nothing is written to its image while it runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_a_legacy_drive_is_deleted_once_the_vm_is_stopped() {
    let directory = TempDir::new().unwrap();
    let image = images(&directory).join("vda.img");
    run("qemu-img", &["create", "-q", "-f", "raw", path(&image), &(REGION * REGIONS as u64).to_string()]);
    let legacy = format!("if=none,id=drive-vda,file={},format=raw", image.display());
    let arguments = vec!["-drive".into(), legacy];
    let legacy = Drive { id: "vda".into(), image, arguments, device: "drive=drive-vda".into() };
    let mut lab = Lab::start(directory, &[], vec![legacy]).await;
    lab.parameters.insert("follow".into(), "true".into());
    let (first, second) = (lab.take().await, lab.take().await);
    check(&mut lab, Base::Raw).await;
    let order = lab.snapshots[&first].order.clone();
    let deletion = lab.sessions.delete(&order).await.unwrap();
    assert!(!deletion.over);
    assert!(find(&deletion.status.conditions, types::REMOVED).unwrap().message.contains("stopped"));
    check(&mut lab, Base::Raw).await;
    lab.machine.kill();
    for number in [first, second] {
        lab.delete(number).await;
        check(&mut lab, Base::Raw).await;
    }
    lab.machine.start().await;
    check(&mut lab, Base::Raw).await;
}
