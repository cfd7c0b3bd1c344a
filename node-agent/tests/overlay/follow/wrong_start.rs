//! A VM that isn't started as its owner was told, or loses its disk: nothing is touched.

use std::time::Duration;

use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::ContentPhase;
use serde_json::json;

use crate::crashes::cut_off;
use crate::lab::{Lab, Snapshot};
use crate::machine::{path, view};

use super::{Base, check, drive, lab, layer, start_with_old_command_line, write_target_file};

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_started_with_its_old_command_line_is_noticed_and_nothing_is_touched() {
    for base in [Base::Raw, Base::Qed] {
        let mut lab = lab(base).await;
        let taken = lab.take().await;
        let (image, layer) = (base.image(&lab), layer(&lab, base));
        let overwritten = |lab: &Lab| {
            let record = lab.sessions.journal.load(&lab.snapshots[&taken].order.uid).unwrap().unwrap();
            lab.sessions.drivers.find("overlay").unwrap().overwritten(&record.tasks[0], &lab.sessions.roots)
        };
        assert_eq!(overwritten(&lab), None);
        start_with_old_command_line(&mut lab, base, taken).await;
        assert!(overwritten(&lab).is_some_and(|why| why.contains(path(&image))));
        let left = std::fs::read(&layer).unwrap();

        let (_, order) = lab.order();
        let refused = lab.advance(&order).await;
        let accepted = find(&refused.conditions, types::ACCEPTED).unwrap();
        assert_eq!(accepted.reason, reasons::DISK_NOT_SUPPORTED);
        assert!(accepted.message.contains(path(&layer)), "{}", accepted.message);

        let order = lab.snapshots[&taken].order.clone();
        for running in [true, false] {
            if !running {
                lab.machine.kill();
            }
            let deletion = lab.sessions.delete(&order).await.unwrap();
            let said = &find(&deletion.status.conditions, types::REMOVED).unwrap().message;
            assert!(!deletion.over && said.contains(path(&layer)), "running {running}: {said}");
            assert_eq!(std::fs::read(&layer).unwrap(), left, "the layer was touched");
            assert_eq!(view(&image), lab.disks[0].now, "the VM's disk was touched");
        }
        // Its owner goes on without what was left behind.
        std::fs::remove_file(&layer).unwrap();
        lab.delete(taken).await;
        lab.machine.start().await;
        check(&mut lab, base).await;
        let taken = lab.take().await;
        check(&mut lab, base).await;
        lab.delete(taken).await;
        check(&mut lab, base).await;
    }
}

/// Deletes a snapshot, which must be refused now.
async fn refused(lab: &Lab, snapshot: u32) -> String {
    let deletion = Box::pin(lab.sessions.delete(&lab.snapshots[&snapshot].order)).await.unwrap();
    assert!(!deletion.over, "{:?}", deletion.status.conditions);
    find(&deletion.status.conditions, types::REMOVED).unwrap().message.clone()
}

/// Takes a disk from the running VM, whose guest has no say: a reset unplugs what is waiting for it.
async fn unplug(lab: &Lab) {
    lab.machine.execute("device_del", json!({"id": "vda"})).await;
    lab.machine.execute("system_reset", json!({})).await;
    let end = tokio::time::Instant::now() + Duration::from_secs(10);
    while !lab.machine.graph().await.disks().is_empty() {
        assert!(tokio::time::Instant::now() < end, "never unplugged");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_layer_of_a_disk_that_was_unplugged_keeps_what_was_written_since_the_snapshot() {
    for base in [Base::Raw, Base::Qed] {
        let mut lab = lab(base).await;
        let taken = lab.take().await;
        unplug(&lab).await;
        println!("{}", refused(&lab, taken).await);
        assert_eq!(view(&layer(&lab, base)), lab.disks[0].now, "the disk's newest data");
        lab.machine.kill();
        check(&mut lab, base).await;
        lab.delete(taken).await;
        check(&mut lab, base).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_layer_is_not_unlinked_over_one_that_has_data() {
    let base = Base::Raw;
    let mut lab = lab(base).await;
    write_target_file(&lab, &base.image(&lab));
    let first = lab.take().await;
    lab.machine.kill();
    let (second, order) = lab.order();
    assert_eq!(lab.advance(&order).await.phase, Some(ContentPhase::Ready));
    let views = lab.views();
    lab.snapshots.insert(second, Snapshot { order, views: views.clone() });
    // With its old command line.
    lab.machine.start().await;
    for snapshot in [first, second, first] {
        println!("{}", refused(&lab, snapshot).await);
        assert_eq!(view(&layer(&lab, base)), views[0], "the disk's newest data");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_that_was_begun_merges_nothing_over_what_a_vm_started_wrongly_wrote() {
    let base = Base::Raw;
    let mut lab = lab(base).await;
    let taken = lab.take().await;
    let order = lab.snapshots[&taken].order.clone();
    let is_begun = || lab.sessions.journal.load(&order.uid).unwrap().unwrap().tasks[0].state["begun"] == true;
    let mut polls = 1;
    while !is_begun() {
        assert!(cut_off(Box::pin(lab.sessions.delete(&order)), polls).await.is_none(), "never begun");
        polls += 1;
    }
    let left = std::fs::read(layer(&lab, base)).unwrap();
    start_with_old_command_line(&mut lab, base, taken).await;
    refused(&lab, taken).await;
    lab.machine.kill();
    refused(&lab, taken).await;
    assert_eq!(view(&base.image(&lab)), lab.disks[0].now, "the VM's disk was touched");
    assert_eq!(std::fs::read(layer(&lab, base)).unwrap(), left, "the layer was touched");
    // Its owner thinks better of it: what the layer has goes with what is below it.
    lab.machine.set_drives(&[drive(&layer(&lab, base))]);
    lab.machine.start().await;
    lab.disks[0].now = view(&layer(&lab, base));
    lab.delete(taken).await;
    check(&mut lab, base).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_snapshot_over_an_image_that_was_written_to_is_overwritten() {
    for base in [Base::Raw, Base::Qed] {
        let mut lab = lab(base).await;
        let taken = [lab.take().await, lab.take().await, lab.take().await];
        let told = |lab: &Lab| {
            taken.map(|number| {
                let record = lab.sessions.journal.load(&lab.snapshots[&number].order.uid).unwrap().unwrap();
                lab.sessions.overwritten(&record.tasks[0]).unwrap()
            })
        };
        assert_eq!(told(&lab), [None, None, None]);
        start_with_old_command_line(&mut lab, base, taken[0]).await;
        let image = base.image(&lab);
        assert!(told(&lab).iter().flatten().filter(|why| why.contains(path(&image))).count() == taken.len());
    }
}
