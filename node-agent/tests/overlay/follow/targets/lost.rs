//! A VM that isn't started with the user's file, and a file that isn't there.

use std::collections::BTreeMap;

use freezeframe_api::conditions::reasons;
use freezeframe_api::v1alpha1::ContentPhase;

use super::{FILE, Lent, said};
use crate::follow::{Base, drive, write_target_file};
use crate::lab::Snapshot;
use crate::machine::{make_image, path, view};

#[tokio::test(flavor = "multi_thread")]
async fn a_file_the_owner_was_told_of_goes_though_nothing_was_written_to_it_running_or_not() {
    for running in [true, false] {
        let mut lent = Lent::start(Base::Raw).await;
        write_target_file(&lent.lab, &lent.base.image(&lent.lab));
        let (number, order) = lent.order();
        assert_eq!(lent.lab.advance(&order).await.phase, Some(ContentPhase::Ready));
        let views = lent.lab.views();
        lent.lab.snapshots.insert(number, Snapshot { order, views });
        // With its old command line.
        lent.lab.machine.kill();
        if running {
            lent.lab.machine.start().await;
        }
        lent.delete(number).await;
        assert!(!lent.target().exists(), "a VM started with it would find an empty disk");
        if !running {
            lent.lab.machine.start().await;
        }
        let again = lent.take().await;
        lent.delete(again).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_whose_file_system_is_not_there_is_not_taken_for_merged() {
    let mut lent = Lent::start(Base::Raw).await;
    let taken = lent.take().await;
    lent.lab.write().await;
    lent.lab.machine.kill();
    let order = lent.lab.snapshots[&taken].order.clone();
    let away = lent.targets.0.join("away");
    std::fs::rename(lent.target(), &away).unwrap();
    for (others, why) in [(false, "nothing at all is in"), (true, FILE)] {
        let other = lent.target().with_file_name("other");
        if others {
            std::fs::write(&other, "").unwrap();
        }
        let deletion = lent.lab.sessions.delete(&order).await.unwrap();
        assert!(!deletion.over, "others {others}");
        let told = format!("{:?}", deletion.status.conditions);
        assert!(told.contains(why), "{told}");
        drop(std::fs::remove_file(other));
    }
    std::fs::rename(&away, lent.target()).unwrap();
    lent.delete(taken).await;
    lent.follow().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_started_without_the_users_file_is_noticed_and_nothing_is_touched() {
    for base in [Base::Raw, Base::Device] {
        let mut lent = Lent::start(base).await;
        let taken = [lent.take().await, lent.take().await];
        let image = base.image(&lent.lab);
        lent.lab.machine.kill();
        lent.lab.machine.set_drives(&[drive(&image)]);
        lent.lab.machine.start().await;
        lent.lab.disks[0].now = lent.lab.snapshots[&taken[0]].views[0];
        lent.lab.write().await;
        let before = std::fs::read(lent.target()).unwrap();

        // Another file, so that it isn't the name that is in the way.
        make_image(&lent.target().with_file_name("other.qcow2"), None);
        lent.lab.targets = BTreeMap::from([("vda".into(), "other.qcow2".into())]);
        let (_, order) = lent.lab.order();
        let (reason, message) = said(&lent.lab.advance(&order).await);
        assert_eq!(reason, reasons::DISK_NOT_SUPPORTED);
        assert!(message.contains(path(&lent.target())), "{message}");

        for (running, at) in [(true, 0), (true, 1), (false, 0)] {
            if !running {
                lent.lab.machine.kill();
            }
            let order = lent.lab.snapshots[&taken[at]].order.clone();
            let record = lent.lab.sessions.journal.load(&order.uid).unwrap().unwrap();
            let told = lent.lab.sessions.overwritten(&record.tasks[0]).unwrap();
            // The kernel doesn't tell when a device was written to.
            assert_eq!(told.is_some_and(|why| why.contains(path(&image))), base == Base::Raw, "running {running} {at}");
            if base == Base::Raw || running {
                let deletion = lent.lab.sessions.delete(&order).await.unwrap();
                assert!(!deletion.over, "running {running} {at}");
                assert_eq!(std::fs::read(lent.target()).unwrap(), before, "the layer was touched");
                assert_eq!(view(&image), lent.lab.disks[0].now, "the VM's disk was touched");
            }
        }
    }
}
