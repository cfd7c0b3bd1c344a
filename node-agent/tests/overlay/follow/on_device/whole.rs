//! Taken, followed, deleted: running, restarted and stopped.

use super::*;
use crate::follow::write_target_file;

/// How the VM is when its snapshot is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Running,
    Restarted,
    Stopped,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_on_a_device_is_followed_and_is_the_disk_alone_once_its_snapshot_is_deleted() {
    for base in [Base::Raw, Base::Qed, Base::Device] {
        for way in [Way::Running, Way::Restarted, Way::Stopped] {
            println!("{base:?} {way:?}");
            let mut on = OnDevice::start(base).await;
            let taken = on.take().await;
            match way {
                Way::Running => {}
                Way::Restarted => on.follow().await,
                Way::Stopped => on.lab.machine.kill(),
            }
            if way != Way::Stopped {
                on.lab.write().await;
            }
            on.delete(taken).await;
            on.follow().await;
            on.lab.write().await;
            on.check().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_says_to_start_the_vm_with_the_device() {
    let mut on = OnDevice::start(Base::Raw).await;
    let (number, order) = on.lab.order();
    let status = on.lab.advance(&order).await;
    assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
    let told = status.disks[0].start_with.as_ref().unwrap();
    assert_eq!((told.path.as_str(), told.format.as_str()), (path(&on.device.0), "qcow2"));
    note(&mut on, number, order.clone());
    on.check().await;
    on.delete(number).await;
    let deletion = on.lab.sessions.delete(&order).await.unwrap();
    assert!(deletion.over);
    let record = on.lab.sessions.journal.load(&order.uid).unwrap().unwrap();
    assert!(!record.tasks[0].state.is_null(), "nobody could tell any more that the old image is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_whole_disk_fits_on_the_device_whatever_is_written() {
    let mut on = OnDevice::start(Base::Raw).await;
    let taken = on.take().await;
    for round in 1..3 {
        for region in 0..REGIONS {
            on.lab.machine.write("vda", region, round).await;
            on.lab.disks[0].now[region] = round;
        }
    }
    on.check().await;
    on.delete(taken).await;
    on.follow().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_vm_is_found_on_the_device_by_the_records_of_its_snapshot_and_after_it() {
    let mut on = OnDevice::start(Base::Raw).await;
    write_target_file(&on.lab, &on.image());
    on.lab.machine.kill();
    let (number, order) = on.lab.order();
    let status = on.lab.advance(&order).await;
    assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
    note(&mut on, number, order);
    on.check().await;
    on.follow().await;
    on.lab.write().await;
    on.lab.machine.kill();
    // Also with the owner's file as it was: the disk is the device.
    on.lab.parameters.remove("targets");
    on.lab.targets.clear();
    for deleted in [false, true] {
        if deleted {
            on.delete(number).await;
        }
        let (reason, message) = on.refusal().await;
        assert_eq!(reason, reasons::DISK_NOT_SUPPORTED, "{message}");
        assert!(message.contains("`directory`"), "{message}");
    }
    on.follow().await;
}
