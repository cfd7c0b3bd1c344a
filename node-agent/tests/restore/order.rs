//! An order to bring a snapshot back, as every suite that restores begins with.

use std::time::Duration;

use freezeframe_api::v1alpha1::{RestoreMode, RestoreStep, RestoreVerify};
use freezeframe_node_agent::restore::order::RestoreOrder;
use freezeframe_node_agent::session::order::Order;

/// An order to bring all disks of a snapshot back, in place.
pub fn order(number: u32, source: &Order) -> RestoreOrder {
    RestoreOrder {
        content: format!("vmrestore-{number}"),
        uid: format!("{number:08x}-2222-4222-8222-222222222222"),
        restore: ("shop".into(), format!("restore-{number}")),
        source: source.uid.clone(),
        vm: source.vm.clone(),
        new_vm: None,
        directory: None,
        step: RestoreStep::Restore,
        pre_restore: None,
        mode: RestoreMode::Linked,
        include: vec![],
        exclude: vec![],
        stop_vm: false,
        stop_timeout: Duration::from_millis(500),
        verify: RestoreVerify::Quick,
        generation: Some(1),
    }
}
