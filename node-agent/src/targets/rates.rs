//! How fast a VM's disks are written.

use std::time::Instant;

use freezeframe_api::v1alpha1::TargetDisk;
use freezeframe_qemu::BlockGraph;

use crate::hypervisor::{QMP_TIMEOUT, Vm, VmKey};
use crate::session::space_watch::SpaceWatch;

/// Less than this a second is nothing.
const LEAST: u64 = 4096;

/// Takes note of what QEMU has counted. What can't be learned now is at the next look.
pub async fn measure(vm: &Vm, key: &VmKey, graph: &BlockGraph, watch: &SpaceWatch) {
    let Ok(written) = vm.qmp().query_written_bytes(QMP_TIMEOUT).await else { return };
    let disks = graph.disks().iter().filter_map(|disk| {
        let counted = if disk.qdev.is_empty() { &disk.device } else { &disk.qdev };
        Some((disk.name(), *written.get(counted)?))
    });
    watch.learn(key, Instant::now(), disks);
}

/// Says in a VM's status how fast its disks are written.
pub fn tell(key: &VmKey, watch: &SpaceWatch, disks: &mut [TargetDisk]) {
    for disk in disks {
        disk.write_bytes_per_second = watch.rate(key, &disk.name.0).map(rounded);
    }
}

fn rounded(rate: u64) -> i64 {
    let step = if rate < LEAST { 0 } else { rate.checked_next_power_of_two().unwrap_or(rate) };
    i64::try_from(step).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_told_in_powers_of_two() {
        assert_eq!([0, 4095, 4096, 5000, 1 << 20, (1 << 20) + 1].map(rounded), [0, 0, 4096, 8192, 1 << 20, 2 << 20]);
        assert_eq!(rounded(u64::MAX), i64::MAX);
    }
}
