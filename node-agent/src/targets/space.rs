//! Whether the file systems that a VM's disks grow on have room left, and whether QEMU found that one hasn't.

use std::path::Path;

use freezeframe_api::conditions::{condition, find, reasons, set, types};
use freezeframe_api::v1alpha1::VMTargetStatus;
use freezeframe_qemu::BlockGraph;
use k8s_openapi::jiff::Timestamp;

use crate::drivers::Writers;
use crate::hypervisor::disks::FoundDisk;
use crate::hypervisor::filesystem::Room;

/// The file systems of a VM's disks that have less than `percent` free, in words. In whole percents, so that not every write of a
/// guest is news.
#[must_use]
pub fn low(disks: &[FoundDisk], percent: u64) -> Vec<String> {
    let writable = disks.iter().filter(|disk| disk.facts.writers != Writers::Nobody);
    let said = writable.filter_map(|disk| {
        let directory = disk.facts.path.as_ref().ok()?.parent()?;
        Some(format!("disk {}: {}", disk.name, nearly_full(directory, &Room::of(directory)?, percent)?))
    });
    said.collect()
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

/// Nothing is said of space until it was low for the first time.
pub fn report(status: &mut VMTargetStatus, low: &[String]) {
    if low.is_empty() && find(&status.conditions, types::SPACE_LOW).is_none() {
        return;
    }
    let reason = if low.is_empty() { reasons::ENOUGH_SPACE } else { reasons::SPACE_LOW };
    let condition = condition(types::SPACE_LOW, !low.is_empty(), reason, low.join("; "), None, Timestamp::now());
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
    fn that_space_is_enough_is_told_only_after_it_was_low() {
        let mut status = VMTargetStatus::default();
        report(&mut status, &[]);
        assert_eq!(status.conditions, []);
        report(&mut status, &["disk vda".into()]);
        report(&mut status, &[]);
        assert_eq!(find(&status.conditions, types::SPACE_LOW).unwrap().reason, reasons::ENOUGH_SPACE);
    }
}
