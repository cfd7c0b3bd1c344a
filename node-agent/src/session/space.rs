//! Whether what a snapshot takes at once fits, and leaves as much as the class wants for what comes after.

use std::collections::BTreeMap;
use std::path::PathBuf;

use freezeframe_api::conditions::reasons;

use super::outcome::Failure;
use crate::drivers::quantity::{bytes, digits};
use crate::drivers::{Drivers, Need};
use crate::hypervisor::filesystem::Room;
use crate::session::journal::SessionRecord;

/// What must stay free on a file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MinFree {
    /// Nothing.
    #[default]
    Nothing,
    /// So much of its size.
    Percent(u64),
    /// So many bytes.
    Bytes(u64),
}

impl MinFree {
    /// Reads a limit. The API's pattern lets nothing else through.
    #[must_use]
    pub fn parse(text: Option<&str>) -> Self {
        let Some(text) = text else { return Self::Nothing };
        let percent = text.strip_suffix('%').and_then(digits).map(Self::Percent);
        percent.or_else(|| bytes(text).map(Self::Bytes)).unwrap_or_default()
    }

    fn of(self, total: u64) -> u64 {
        match self {
            Self::Nothing => 0,
            Self::Percent(percent) => (total / 100).saturating_mul(percent),
            Self::Bytes(bytes) => bytes,
        }
    }
}

/// All needs on one file system.
struct Demand {
    directory: PathBuf,
    room: Room,
    needed: u64,
}

/// Refuses a snapshot that doesn't fit, with the numbers.
pub fn check(record: &SessionRecord, drivers: &Drivers) -> Result<(), Failure> {
    let keep = MinFree::parse(record.order.limits.min_free.as_deref());
    let needs = record.tasks.iter().filter_map(|task| drivers.find(&task.driver)?.needs(task));
    for demand in by_filesystem(needs) {
        fits(&demand, keep)?;
    }
    Ok(())
}

fn by_filesystem(needs: impl Iterator<Item = Need>) -> Vec<Demand> {
    let mut demands: BTreeMap<u64, Demand> = BTreeMap::new();
    for Need { directory, bytes } in needs {
        // A directory that can't be examined is refused by its driver, which knows what it is for.
        let Some(room) = Room::of(&directory) else { continue };
        let demand = demands.entry(room.device).or_insert(Demand { directory, room, needed: 0 });
        demand.needed = demand.needed.saturating_add(bytes);
    }
    demands.into_values().collect()
}

fn fits(demand: &Demand, keep: MinFree) -> Result<(), Failure> {
    let Demand { directory, room, needed } = demand;
    let keep = keep.of(room.total);
    if room.free >= needed.saturating_add(keep) {
        return Ok(());
    }
    let message = format!(
        "not enough space on the file system of {}: the snapshot takes {needed} bytes at once and the class wants {keep} \
         left, but only {} of {} are free",
        directory.display(),
        room.free,
        room.total
    );
    Err(Failure::new(reasons::NO_SPACE, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demand(needed: u64) -> Demand {
        Demand { directory: "/images".into(), room: Room { device: 1, free: 300, total: 1000 }, needed }
    }

    #[test]
    fn what_is_needed_and_what_must_stay_free_have_to_fit_together() {
        assert!(fits(&demand(300), MinFree::Nothing).is_ok());
        assert!(fits(&demand(200), MinFree::Percent(10)).is_ok());
        let refused = fits(&demand(201), MinFree::Bytes(100)).unwrap_err();
        assert_eq!(refused.reason, reasons::NO_SPACE);
        for number in ["201", "100", "300", "1000", "/images"] {
            assert!(refused.message.contains(number), "{number}: {}", refused.message);
        }
    }

    #[test]
    fn a_limit_is_a_part_or_bytes() {
        assert_eq!(MinFree::parse(Some("5%")), MinFree::Percent(5));
        assert_eq!(MinFree::parse(Some("10Gi")), MinFree::Bytes(10 << 30));
        assert_eq!(MinFree::parse(None), MinFree::Nothing);
    }

    #[test]
    fn the_needs_of_one_file_system_are_added_up() {
        let directory = tempfile::tempdir().unwrap();
        let need = |bytes| Need { directory: directory.path().into(), bytes };
        let all = by_filesystem([need(1), need(2)].into_iter());
        assert_eq!(all.iter().map(|demand| demand.needed).collect::<Vec<_>>(), [3]);
    }
}
