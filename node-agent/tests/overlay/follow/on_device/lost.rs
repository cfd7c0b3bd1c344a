//! A VM that isn't started with the device, and a device that isn't there.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_started_with_the_former_disk_is_noticed_before_and_after_the_snapshot_is_deleted() {
    let mut on = OnDevice::start(Base::Raw).await;
    let taken = on.take().await;
    let order = on.lab.snapshots[&taken].order.clone();
    on.lab.targets.clear();
    for deleted in [false, true] {
        println!("deleted {deleted}");
        if deleted {
            on.follow().await;
            on.delete(taken).await;
        }
        let before = on.bytes();
        let image = on.image();
        on.start_with(&image).await;
        let (reason, message) = on.refusal().await;
        assert_eq!(reason, reasons::DISK_NOT_SUPPORTED);
        assert!(message.contains(path(&on.device.0)), "{message}");
        if !deleted {
            let deletion = on.lab.sessions.delete(&order).await.unwrap();
            let said = &find(&deletion.status.conditions, types::REMOVED).unwrap().message;
            assert!(!deletion.over && said.contains("its beginning is cleared"), "{said}");
        }
        assert!(on.bytes() == before, "the device was touched");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_its_owner_cleared_is_let_go_and_the_vm_goes_on_with_the_former_disk() {
    for running in [true, false] {
        let mut on = OnDevice::start(Base::Raw).await;
        let taken = on.take().await;
        on.lab.machine.kill();
        on.clear();
        let Snapshot { order, views } = on.lab.snapshots.remove(&taken).unwrap();
        on.lab.disks[0].now = views[0];
        if running {
            let image = on.image();
            on.start_with(&image).await;
            on.lab.write().await;
        }
        on.lab.delete_order(&order).await;
        on.follow().await;
        on.format();
        let again = on.take().await;
        on.delete(again).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_the_owner_was_told_of_is_cleared_if_the_vm_went_on_without_it_and_nothing_is_on_it() {
    let mut on = OnDevice::start(Base::Raw).await;
    let (number, order) = on.lab.order();
    assert_eq!(on.lab.advance(&order).await.phase, Some(ContentPhase::Ready));
    note(&mut on, number, order.clone());
    let image = on.image();
    on.start_with(&image).await;
    on.lab.snapshots.clear();
    on.lab.delete_order(&order).await;
    assert!(on.bytes()[..1 << 20].iter().all(|byte| *byte == 0), "a VM started with it would find an empty disk");
    on.format();
    let again = on.take().await;
    on.delete(again).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_not_there_is_not_taken_for_done() {
    let mut on = OnDevice::start(Base::Raw).await;
    let taken = on.take().await;
    on.lab.machine.kill();
    on.lab.targets.clear();
    let order = on.lab.snapshots[&taken].order.clone();
    let data = on.lab.images().with_file_name("layer.data");
    run("losetup", &["-d", path(&on.device.0)]);
    let deletion = on.lab.sessions.delete(&order).await.unwrap();
    let said = format!("{:?}", deletion.status.conditions);
    assert!(!deletion.over && said.contains("no such device"), "{said}");
    // Its name is another device's.
    let other = data.with_file_name("other.data");
    std::fs::write(&other, vec![7; 2 << 20]).unwrap();
    run("losetup", &[path(&on.device.0), path(&other)]);
    let deletion = on.lab.sessions.delete(&order).await.unwrap();
    let said = format!("{:?}", deletion.status.conditions);
    assert!(!deletion.over && said.contains("something else"), "{said}");
    let image = on.image();
    on.start_with(&image).await;
    let (reason, message) = on.refusal().await;
    assert_eq!(reason, reasons::DISK_NOT_SUPPORTED, "{message}");
    on.lab.machine.kill();
    run("losetup", &["-d", path(&on.device.0)]);
    run("losetup", &[path(&on.device.0), path(&data)]);
    on.delete(taken).await;
    on.follow().await;
}
