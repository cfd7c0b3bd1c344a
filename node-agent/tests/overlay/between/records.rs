//! Deletions beside records of other VMs, and beside ones that can't be read.

use freezeframe_api::conditions::{find, types};
use freezeframe_api::v1alpha1::ContentPhase;
use freezeframe_node_agent::hypervisor::VmKey;
use freezeframe_node_agent::session::order::Order;

use super::{begun, name};
use crate::lab::{Lab, Snapshot};
use crate::shapes::{Shape, lab};

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_a_vm_that_has_another_name_now_is_told_where_its_data_went() {
    let mut lab = lab(Shape::Blockdev, 1).await;
    let lower = lab.take().await;
    std::fs::rename(lab.sessions.vm_root.join("shop/db"), lab.sessions.vm_root.join("shop/renamed")).unwrap();
    lab.write().await;
    let (upper, mut order) = lab.order();
    order.vm = VmKey { namespace: "shop".into(), name: "renamed".into() };
    let status = lab.advance(&order).await;
    assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
    lab.snapshots.insert(upper, Snapshot { order, views: lab.views() });
    lab.write().await;
    lab.machine.kill();
    // Half done, it goes before the other's.
    begun(&lab, &lab.order_of(lower)).await;
    let left = lab.sessions.delete(&lab.order_of(upper)).await.unwrap();
    let why = &find(&left.status.conditions, types::REMOVED).unwrap().message;
    assert!(!left.over && why.contains("deleted first"), "{why}");
    lab.delete(lower).await;
    lab.check().await;
    lab.delete(upper).await;
    lab.check().await;
}

/// Takes a snapshot of one disk, of a VM of that name.
async fn take_of(lab: &mut Lab, vm: &str, disk: &str) -> Order {
    lab.write().await;
    let (_, mut order) = lab.order();
    order.vm = VmKey { namespace: "shop".into(), name: vm.into() };
    order.include = vec![disk.into()];
    let status = lab.advance(&order).await;
    assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
    order
}

#[tokio::test(flavor = "multi_thread")]
async fn a_half_deleted_snapshot_of_another_vm_holds_up_no_chain_but_its_own() {
    let mut lab = lab(Shape::Blockdev, 2).await;
    let lower = take_of(&mut lab, "db", "vda").await;
    take_of(&mut lab, "db", "vda").await;
    std::fs::rename(lab.sessions.vm_root.join("shop/db"), lab.sessions.vm_root.join("shop/other")).unwrap();
    let beside = take_of(&mut lab, "other", "vdb").await;
    lab.machine.kill();
    begun(&lab, &lower).await;
    let deletion = lab.sessions.delete(&beside).await.unwrap();
    assert!(deletion.over, "{:?}", deletion.status.conditions);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_that_merges_waits_while_a_record_cannot_be_read() {
    let mut lab = lab(Shape::Blockdev, 1).await;
    let (lower, upper) = (lab.take().await, lab.take().await);
    let record = lab.sessions.vm_root.join(format!("../journal/{}.json", lab.order_of(upper).uid));
    let text = std::fs::read(&record).unwrap();
    std::fs::write(&record, "{").unwrap();
    let deletion = lab.sessions.delete(&lab.order_of(lower)).await.unwrap();
    let why = &find(&deletion.status.conditions, types::REMOVED).unwrap().message;
    assert!(!deletion.over && why.contains("can't be read") && why.contains(name(&record)), "{why}");
    std::fs::write(&record, text).unwrap();
    lab.check().await;
    lab.delete(lower).await;
    lab.check().await;
}
