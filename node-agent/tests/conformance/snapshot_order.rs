//! An order for a snapshot, as every suite begins with.

use std::collections::BTreeMap;
use std::time::Duration;

use freezeframe_api::names::DriverName;
use freezeframe_api::v1alpha1::{ClassDriver, ConsistencyLevel, DeletionPolicy, Fallback, Limits, Pause, Verify};
use freezeframe_node_agent::hypervisor::VmKey;
use freezeframe_node_agent::session::order::Order;
use k8s_openapi::jiff::{SignedDuration, Timestamp};

/// An order for all disks of a VM with one driver; `patience` is what every wait for the VM may take.
pub fn snapshot_order(
    number: u32,
    vm: VmKey,
    driver: &str,
    parameters: BTreeMap<String, String>,
    patience: Duration,
) -> Order {
    Order {
        content: format!("vmsnap-{number}"),
        uid: format!("{number:08x}-1111-4111-8111-111111111111"),
        snapshot: (vm.namespace.clone(), format!("snapshot-{number}")),
        vm,
        drivers: vec![ClassDriver { name: DriverName(driver.into()), parameters }],
        required: ConsistencyLevel::Crash,
        fallback: Fallback::Fail,
        agent_timeout: patience,
        freeze_timeout: patience,
        max_hold: patience,
        mountpoints: vec![],
        pause: Pause::Auto,
        include: vec![],
        exclude: vec![],
        targets: BTreeMap::new(),
        verify: Verify::Quick,
        limits: Limits::default(),
        deadline: Timestamp::now() + SignedDuration::from_secs(600),
        deletion_policy: DeletionPolicy::Delete,
        generation: Some(1),
    }
}
