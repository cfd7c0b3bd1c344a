//! Further layers over a qcow2 image that is on a block device.

use super::*;
use crate::follow::write_target_file;
use crate::machine::make_image;
use crate::orders::orders;

/// A class that says where layers over devices go, too.
async fn start(base: Base) -> OnDevice {
    let mut on = OnDevice::start(base).await;
    on.lab.parameters.insert("directory".into(), path(&on.lab.images()).into());
    on
}

/// While it runs, while it is stopped, and restarted as its owner is told.
#[tokio::test(flavor = "multi_thread")]
async fn snapshots_over_a_layer_on_a_device_are_deleted_in_every_order() {
    for base in [Base::Raw, Base::Qed, Base::Device] {
        for (number, order) in orders(&[0, 1, 2]).into_iter().enumerate() {
            println!("{base:?} {order:?}");
            let mut on = start(base).await;
            let mut taken = vec![];
            for at in 0..3 {
                if number & (1 << at) != 0 {
                    on.follow().await;
                }
                taken.push(on.take().await);
            }
            for (step, at) in order.into_iter().enumerate() {
                match (number + step) % 3 {
                    0 => on.lab.machine.kill(),
                    1 => on.follow().await,
                    _ => {}
                }
                on.delete(taken[at]).await;
                if on.lab.machine.is_running() {
                    on.lab.write().await;
                } else {
                    on.follow().await;
                }
            }
            on.follow().await;
        }
    }
}

/// A disk that was never a layer of ours.
#[tokio::test(flavor = "multi_thread")]
async fn a_qcow2_image_that_was_made_on_a_device_is_snapshotted_where_its_owner_follows() {
    let mut on = start(Base::Raw).await;
    on.moved.push(on.lab.order().1);
    on.lab.disks[0].now = [0; REGIONS];
    on.follow().await;
    let taken = [on.take().await, on.take().await];
    let told = on.lab.sessions.journal.load(&on.lab.snapshots[&taken[0]].order.uid).unwrap().unwrap();
    assert_eq!(told.tasks[0].start_with.as_ref().unwrap().path, on.disk());
    on.follow().await;
    for number in taken {
        on.delete(number).await;
    }
    on.follow().await;
    on.lab.parameters.insert("follow".into(), "false".into());
    let (reason, message) = on.refusal().await;
    assert_eq!(reason, reasons::DISK_NOT_SUPPORTED, "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_goes_on_to_another_device_once_it_is_on_its_own_alone() {
    let mut on = start(Base::Raw).await;
    let directory = on.lab.images().parent().unwrap().to_owned();
    let other = Loop::attach_as(&directory, "other", SIZE);
    run("cp", &["-a", path(&other.0), path(&directory.join("targets/shop/other"))]);
    make_image(&other.0, None);
    let taken = on.take().await;
    on.follow().await;
    on.lab.targets = [("vda".to_owned(), "other".to_owned())].into();
    let (reason, message) = on.refusal().await;
    assert_eq!(reason, reasons::INVALID_TARGET, "{message}");
    assert!(message.contains(path(&on.device.0)), "{message}");
    on.delete(taken).await;
    let (_, order) = on.lab.order();
    let status = on.lab.advance(&order).await;
    assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
    on.lab.write().await;
    let deletion = on.lab.delete_order(&order).await;
    assert_eq!(deletion.phase, Some(ContentPhase::Removed));
    // The disk is on the other one from now on.
    on.device = other;
    on.follow().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_vm_is_found_on_the_layer_over_its_device_in_whatever_order_its_records_are() {
    let mut on = start(Base::Raw).await;
    write_target_file(&on.lab, &on.image());
    on.lab.machine.kill();
    for begins in ["ff", "00", "77"] {
        let (number, mut order) = on.lab.order();
        order.uid.replace_range(..2, begins);
        let status = on.lab.advance(&order).await;
        assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
        let views = on.lab.views();
        on.lab.snapshots.insert(number, Snapshot { order, views });
        on.first = on.first.or(Some(number));
        on.lab.targets.clear();
        on.check().await;
    }
    on.follow().await;
    on.lab.write().await;
    for number in [2, 1, 3] {
        on.delete(number).await;
    }
    on.follow().await;
}
