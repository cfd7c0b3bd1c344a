//! Numbers that change with every write of a guest: what is published of them changes seldom.

use freezeframe_api::v1alpha1::{TargetDisk, VMTargetStatus};

/// Less than this is no news, however much it is of the whole.
const GRAIN: i64 = 64 << 20;

/// A rate below this is told as 0.
const LEAST_RATE: i64 = 4096;

/// Takes numbers from what was published before, where they are still near enough.
pub fn keep(before: Option<&VMTargetStatus>, status: &mut VMTargetStatus) {
    let Some(before) = before else { return };
    for disk in &mut status.disks {
        if let Some(known) = before.disks.iter().find(|known| known.name == disk.name) {
            keep_disk(known, disk);
        }
    }
}

fn keep_disk(before: &TargetDisk, disk: &mut TargetDisk) {
    // Where layers came or went the numbers are others' anyway, and a chain without layers has none.
    let same_chain = before.chain_depth == disk.chain_depth && disk.overlay_bytes > 0;
    let near = (before.overlay_bytes - disk.overlay_bytes).abs() <= GRAIN.max(before.overlay_bytes / 8);
    if same_chain && near && before.overlay_bytes > 0 {
        disk.overlay_bytes = before.overlay_bytes;
    }
    if let (Some(known), Some(rate)) = (before.write_bytes_per_second, disk.write_bytes_per_second) {
        // One step of two is no news.
        if rate.max(LEAST_RATE) <= known.max(LEAST_RATE) * 2 && known.max(LEAST_RATE) <= rate.max(LEAST_RATE) * 2 {
            disk.write_bytes_per_second = Some(known);
        }
    }
}

#[cfg(test)]
mod tests {
    use freezeframe_api::names::DiskName;

    use super::*;

    fn status(overlay_bytes: i64, chain_depth: i32) -> VMTargetStatus {
        let disk = TargetDisk {
            name: DiskName("vda".into()),
            format: "qcow2".into(),
            source: "/vda".into(),
            size_bytes: 1 << 40,
            read_only: false,
            chain_depth,
            overlay_bytes,
            write_bytes_per_second: None,
            start_with: None,
            drivers: vec![],
        };
        VMTargetStatus { disks: vec![disk], ..VMTargetStatus::default() }
    }

    fn published(before: i64, now: (i64, i32)) -> i64 {
        let mut now = status(now.0, now.1);
        keep(Some(&status(before, 1)), &mut now);
        now.disks[0].overlay_bytes
    }

    #[test]
    fn a_number_changes_only_when_it_is_an_eighth_or_a_grain_off() {
        let gib = 1 << 30;
        assert_eq!(published(gib, (gib + GRAIN, 1)), gib);
        assert_eq!(published(16 * gib, (18 * gib, 1)), 16 * gib);
        assert_eq!(published(16 * gib, (18 * gib + 1, 1)), 18 * gib + 1);
        assert_eq!(published(gib, (gib - GRAIN, 1)), gib);
    }

    #[test]
    fn a_rate_changes_by_two_steps_at_once_and_goes_when_it_is_not_known() {
        let told = |known: Option<i64>, rate: Option<i64>| {
            let (mut before, mut now) = (status(0, 0), status(0, 0));
            before.disks[0].write_bytes_per_second = known;
            now.disks[0].write_bytes_per_second = rate;
            keep(Some(&before), &mut now);
            now.disks[0].write_bytes_per_second
        };
        assert_eq!(told(Some(8192), Some(4096)), Some(8192));
        assert_eq!(told(Some(8192), Some(16384)), Some(8192));
        assert_eq!(told(Some(8192), Some(32768)), Some(32768));
        assert_eq!(told(Some(0), Some(4096)), Some(0));
        assert_eq!(told(Some(1 << 20), Some(0)), Some(0));
        assert_eq!(told(Some(4096), None), None);
        assert_eq!(told(None, Some(4096)), Some(4096));
    }

    #[test]
    fn another_chain_has_its_own_number_at_once() {
        assert_eq!(published(1 << 30, ((1 << 30) + 1, 2)), (1 << 30) + 1);
        assert_eq!(published(1 << 20, (0, 1)), 0);
        assert_eq!(published(0, (1 << 20, 1)), 1 << 20);
    }
}
