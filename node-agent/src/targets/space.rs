//! Whether what a VM's disks grow on, file systems and thin pools, has room left, and whether QEMU found that one hasn't.

use std::path::Path;

use freezeframe_api::conditions::{condition, find, reasons, set, types};
use freezeframe_api::v1alpha1::VMTargetStatus;
use freezeframe_qemu::BlockGraph;
use k8s_openapi::jiff::Timestamp;

use super::pools::Pools;
use crate::drivers::lvm::volume::Volume;
use crate::drivers::{DiskFacts, PoolFree, Writers};
use crate::hypervisor::device::{BlockDevice, LogicalVolume};
use crate::hypervisor::disks::FoundDisk;
use crate::hypervisor::filesystem::Room;

/// Where a VM's disks have less than the watermark free.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Low {
    /// In words, and in whole percents, so that not every write of a guest is news.
    said: Vec<String>,
    /// Whether nothing is known yet of some pool.
    is_unsure: bool,
}

/// Looks at the file system, or the thin pool, of each disk that the guest can write to.
#[must_use]
pub fn low(disks: &[FoundDisk], pools: &Pools, percent: u64) -> Low {
    let mut low = Low::default();
    for disk in disks.iter().filter(|disk| disk.facts.writers != Writers::Nobody) {
        let what = match thin_volume(&disk.facts) {
            Some(volume) => {
                let pool = pools.of(volume);
                low.is_unsure |= pool.is_none();
                pool.and_then(|pool| pool_nearly_full(&pool, percent))
            }
            None => filesystem_nearly_full(&disk.facts, percent),
        };
        low.said.extend(what.map(|what| format!("disk {}: {what}", disk.name)));
    }
    low
}

fn thin_volume(facts: &DiskFacts) -> Option<&Volume> {
    match &facts.device {
        Ok(BlockDevice { volume: Some(LogicalVolume { volume, thin: true }), .. }) => Some(volume),
        _ => None,
    }
}

fn pool_nearly_full(pool: &PoolFree, low: u64) -> Option<String> {
    let parts = [("data", pool.data), ("metadata", pool.metadata)].into_iter().filter(|(_, free)| *free < low);
    let parts: Vec<_> = parts.map(|(part, free)| format!("{free} % of the {part} space")).collect();
    (!parts.is_empty()).then(|| format!("{} of thin pool {} are free", parts.join(" and "), pool.path.display()))
}

fn filesystem_nearly_full(facts: &DiskFacts, low: u64) -> Option<String> {
    let directory = facts.path.as_ref().ok()?.parent()?;
    nearly_full(directory, &Room::of(directory)?, low)
}

fn nearly_full(directory: &Path, room: &Room, low: u64) -> Option<String> {
    let percent = room.free_percent();
    let gib = room.total >> 30;
    let directory = directory.display();
    (percent < low).then(|| format!("{percent} % of the {gib} GiB of the file system of {directory} are free"))
}

/// The disks for which QEMU found no space left, so that it stopped the VM.
#[must_use]
pub fn exhausted(graph: &BlockGraph) -> Vec<String> {
    let full = graph.disks().iter().filter(|disk| disk.io_status.as_deref() == Some("nospace"));
    full.map(freezeframe_qemu::Disk::name).collect()
}

/// Nothing is said of space until it was low for the first time. What was said stays while there is a pool of which
/// nothing is known, or an agent's restart would take it back.
pub fn report(status: &mut VMTargetStatus, low: &Low) {
    let enough = low.said.is_empty();
    if enough && (low.is_unsure || find(&status.conditions, types::SPACE_LOW).is_none()) {
        return;
    }
    let reason = if enough { reasons::ENOUGH_SPACE } else { reasons::SPACE_LOW };
    let condition = condition(types::SPACE_LOW, !enough, reason, low.said.join("; "), None, Timestamp::now());
    set(&mut status.conditions, condition);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_is_low_from_the_watermark_down_and_the_numbers_are_told() {
        let at = |free| nearly_full(Path::new("/images"), &Room { device: 1, free, total: 100 << 30 }, 10);
        assert_eq!(at(10 << 30), None);
        let said = at(9 << 30).unwrap();
        assert!(said.contains("9 %") && said.contains("100 GiB") && said.contains("/images"), "{said}");
    }

    #[test]
    fn a_thin_pool_is_low_when_its_data_or_its_metadata_is_and_is_named_with_the_percents() {
        let at = |data, metadata| pool_nearly_full(&PoolFree { path: "/dev/vg0/pool".into(), data, metadata }, 10);
        assert_eq!(at(10, 10), None);
        assert_eq!(at(9, 10).unwrap(), "9 % of the data space of thin pool /dev/vg0/pool are free");
        assert_eq!(at(10, 0).unwrap(), "0 % of the metadata space of thin pool /dev/vg0/pool are free");
        let both = at(3, 9).unwrap();
        assert_eq!(both, "3 % of the data space and 9 % of the metadata space of thin pool /dev/vg0/pool are free");
    }

    fn low(said: &[&str], is_unsure: bool) -> Low {
        Low { said: said.iter().map(ToString::to_string).collect(), is_unsure }
    }

    fn reason(status: &VMTargetStatus) -> Option<&str> {
        find(&status.conditions, types::SPACE_LOW).map(|condition| condition.reason.as_str())
    }

    #[test]
    fn that_space_is_enough_is_told_only_after_it_was_low() {
        let mut status = VMTargetStatus::default();
        report(&mut status, &low(&[], false));
        assert_eq!(status.conditions, []);
        report(&mut status, &low(&["disk vda"], false));
        report(&mut status, &low(&[], false));
        assert_eq!(reason(&status), Some(reasons::ENOUGH_SPACE));
    }

    #[test]
    fn that_space_is_low_is_not_taken_back_while_a_pool_is_not_known() {
        let mut status = VMTargetStatus::default();
        report(&mut status, &low(&["disk vda"], true));
        assert_eq!(reason(&status), Some(reasons::SPACE_LOW));
        report(&mut status, &low(&[], true));
        assert_eq!(reason(&status), Some(reasons::SPACE_LOW));
        report(&mut status, &low(&[], false));
        assert_eq!(reason(&status), Some(reasons::ENOUGH_SPACE));
    }
}
