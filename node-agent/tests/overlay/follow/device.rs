//! Disks that are block devices.

use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::ContentPhase;

use crate::lab::Snapshot;
use crate::orders::orders;

use super::{Base, check, follow, lab_on_device, write_target_file};

/// While it runs, while it is stopped, and restarted as its owner is told.
#[tokio::test(flavor = "multi_thread")]
async fn snapshots_of_a_block_device_are_deleted_in_every_order() {
    let base = Base::Device;
    let (mut lab, _device) = lab_on_device().await;
    for (number, order) in orders(&[0, 1, 2]).into_iter().enumerate() {
        println!("{order:?}");
        let mut taken = vec![];
        for at in 0..3 {
            if number & (1 << at) != 0 {
                follow(&mut lab, base).await;
            }
            taken.push(lab.take().await);
            check(&mut lab, base).await;
        }
        for (step, at) in order.into_iter().enumerate() {
            match (number + step) % 3 {
                0 => lab.machine.kill(),
                1 => follow(&mut lab, base).await,
                _ => {}
            }
            lab.delete(taken[at]).await;
            check(&mut lab, base).await;
            if lab.machine.is_running() {
                lab.write().await;
            } else {
                follow(&mut lab, base).await;
            }
        }
        follow(&mut lab, base).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_vm_on_a_block_device_is_found_by_the_records_of_its_snapshots() {
    let base = Base::Device;
    let (mut lab, device) = lab_on_device().await;
    write_target_file(&lab, &device.0);
    lab.machine.kill();
    for _ in 0..2 {
        let (number, order) = lab.order();
        let status = lab.advance(&order).await;
        assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
        let views = lab.views();
        lab.snapshots.insert(number, Snapshot { order, views });
        check(&mut lab, base).await;
        follow(&mut lab, base).await;
        lab.write().await;
        lab.machine.kill();
    }
    for number in [2, 1] {
        lab.delete(number).await;
        check(&mut lab, base).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_device_is_refused_without_a_directory_for_its_layer_or_with_one_elsewhere() {
    let (mut lab, _device) = lab_on_device().await;
    lab.parameters.insert("directory".into(), "/tmp".into());
    let (_, order) = lab.order();
    let status = lab.advance(&order).await;
    assert_eq!(find(&status.conditions, types::READY).unwrap().reason, reasons::INVALID_PARAMETER);
    lab.parameters.remove("directory");
    let (_, order) = lab.order();
    let status = lab.advance(&order).await;
    let accepted = find(&status.conditions, types::ACCEPTED).unwrap();
    assert_eq!(accepted.reason, reasons::DISK_NOT_SUPPORTED);
    assert!(accepted.message.contains("`directory`"), "{}", accepted.message);
    check(&mut lab, Base::Device).await;
}
