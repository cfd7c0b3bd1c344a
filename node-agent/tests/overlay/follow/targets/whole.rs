//! Taken, followed, deleted, restored.

use freezeframe_api::conditions::{find, types};
use freezeframe_api::v1alpha1::ContentPhase;

use super::Lent;
use crate::follow::restores::come_back_as_a_new_vms_alone;
use crate::follow::{Base, write_target_file};
use crate::lab::Snapshot;
use crate::machine::{path, run};
use crate::orders::orders;

/// While it runs, while it is stopped, and restarted as its owner is told.
#[tokio::test(flavor = "multi_thread")]
async fn snapshots_with_a_layer_in_the_users_file_are_deleted_in_every_order() {
    for base in [Base::Raw, Base::Qed, Base::Device] {
        let mut lent = Lent::start(base).await;
        for (number, order) in orders(&[0, 1, 2]).into_iter().enumerate() {
            println!("{base:?} {order:?}");
            let mut taken = vec![];
            for at in 0..3 {
                if number & (1 << at) != 0 {
                    lent.follow().await;
                }
                taken.push(lent.take().await);
            }
            for (step, at) in order.into_iter().enumerate() {
                match (number + step) % 3 {
                    0 => lent.lab.machine.kill(),
                    1 => lent.follow().await,
                    _ => {}
                }
                lent.delete(taken[at]).await;
                if lent.lab.machine.is_running() {
                    lent.lab.write().await;
                } else {
                    lent.follow().await;
                }
            }
            lent.follow().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_two_file_systems_with_one_inode_number_are_told_apart() {
    let mut lent = Lent::with_one_inode_number().await;
    let taken = [lent.take().await, lent.take().await];
    for number in taken {
        lent.delete(number).await;
    }
    lent.follow().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_comes_back_as_a_new_vms_disk_and_not_in_place() {
    let mut lent = Lent::start(Base::Raw).await;
    let taken = [lent.take().await, lent.take().await];
    come_back_as_a_new_vms_alone(&lent.lab, taken).await;
    lent.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_says_to_start_the_vm_with_the_users_file() {
    let mut lent = Lent::start(Base::Raw).await;
    let (number, order) = lent.order();
    let status = lent.lab.advance(&order).await;
    assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
    let told = status.disks[0].start_with.as_ref().unwrap();
    assert_eq!((told.path.as_str(), told.format.as_str()), (path(&lent.target()), "qcow2"));
    assert_eq!(lent.below().as_deref(), Some(path(&lent.base.image(&lent.lab))));
    let views = lent.lab.views();
    lent.lab.snapshots.insert(number, Snapshot { order, views });
    lent.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_vm_is_found_by_the_records_of_its_snapshots() {
    let mut lent = Lent::start(Base::Raw).await;
    write_target_file(&lent.lab, &lent.base.image(&lent.lab));
    lent.lab.machine.kill();
    let mut taken = vec![];
    for _ in 0..2 {
        let (number, order) = lent.order();
        let status = lent.lab.advance(&order).await;
        assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
        let views = lent.lab.views();
        lent.lab.snapshots.insert(number, Snapshot { order, views });
        taken.push(number);
        lent.check().await;
        lent.follow().await;
        lent.lab.write().await;
        lent.lab.machine.kill();
    }
    for number in taken {
        lent.delete(number).await;
    }
    lent.follow().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_somebody_made_on_the_former_disk_keeps_it_as_it_is() {
    let mut lent = Lent::start(Base::Raw).await;
    let taken = lent.take().await;
    let clone = lent.lab.images().join("clone.qcow2");
    run("qemu-img", &["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "vda.img", path(&clone), "786432"]);
    lent.lab.others.push("clone.qcow2".into());
    for running in [true, false] {
        if !running {
            lent.lab.machine.kill();
        }
        let deletion = lent.lab.sessions.delete(&lent.lab.snapshots[&taken].order).await.unwrap();
        let said = &find(&deletion.status.conditions, types::REMOVED).unwrap().message;
        assert!(!deletion.over && said.contains(path(&clone)), "{said}");
        lent.check().await;
    }
    std::fs::remove_file(&clone).unwrap();
    lent.lab.others.pop();
    lent.delete(taken).await;
}
