//! Snapshots whose images the class names, beside the disks.

use freezeframe_api::conditions::{find, reasons, types};

use crate::crashes::take_cut_off_anywhere;
use crate::lab::Lab;
use crate::orders::orders;
use crate::shapes::{Shape, lab};

const TEMPLATE: &str = "{disk}.{snapshot}.of-{vm}.qcow2";

async fn named(disks: usize) -> Lab {
    let mut lab = lab(Shape::Blockdev, disks).await;
    lab.parameters.insert("outputTemplate".into(), TEMPLATE.into());
    lab
}

fn name(disk: &str, lab: &Lab, number: u32) -> String {
    let (_, snapshot) = &lab.snapshots[&number].order.snapshot;
    format!("{disk}.{snapshot}.of-db.qcow2")
}

#[tokio::test(flavor = "multi_thread")]
async fn images_that_the_class_names_are_deleted_in_every_order() {
    let mut lab = named(2).await;
    for (number, order) in orders(&[0, 1, 2]).into_iter().enumerate() {
        println!("{order:?}");
        let mut taken = vec![];
        for _ in 0..3 {
            let snapshot = lab.take().await;
            let handles: Vec<_> = lab
                .handles(snapshot)
                .into_iter()
                .map(|handle| handle.file_name().unwrap().to_str().unwrap().to_owned())
                .collect();
            let disks: Vec<_> = lab.disks.iter().map(|disk| name(&disk.id, &lab, snapshot)).collect();
            assert_eq!(handles, disks);
            lab.check().await;
            taken.push(snapshot);
        }
        for (step, at) in order.into_iter().enumerate() {
            match (number + step) % 3 {
                0 => lab.restart().await,
                1 => lab.machine.kill(),
                _ => {}
            }
            lab.delete(taken[at]).await;
            lab.check().await;
            if !lab.machine.is_running() {
                lab.machine.start().await;
            }
            lab.write().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_taken_refuses_the_snapshot_and_is_left() {
    let mut lab = named(1).await;
    lab.parameters.insert("outputTemplate".into(), "{disk}.kept".into());
    let kept = lab.images().join(format!("{}.kept", lab.disks[0].id));
    std::fs::write(&kept, "mine").unwrap();
    let (_, order) = lab.order();
    let status = lab.advance(&order).await;
    let told = find(&status.conditions, types::READY).unwrap();
    assert_eq!(told.reason, reasons::INVALID_PARAMETER);
    assert!(told.message.contains("is there already"), "{}", told.message);
    lab.delete_order(&order).await;
    assert_eq!(std::fs::read_to_string(&kept).unwrap(), "mine");
    std::fs::remove_file(&kept).unwrap();
    lab.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_that_leads_to_another_directory_refuses_the_class_by_its_key() {
    let mut lab = named(1).await;
    lab.parameters.insert("outputTemplate".into(), "{vm}/{disk}".into());
    let (_, order) = lab.order();
    let status = lab.advance(&order).await;
    let told = find(&status.conditions, types::ACCEPTED).unwrap();
    assert_eq!(told.reason, reasons::INVALID_PARAMETER);
    assert!(told.message.contains("outputTemplate") && told.message.contains("beside"), "{}", told.message);
    lab.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_named_snapshot_cut_off_anywhere_ends_ready_or_leaves_nothing() {
    take_cut_off_anywhere(&mut named(1).await).await;
}
