//! Whether what a snapshot takes at once fits, and leaves as much as the class wants for what comes after.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use freezeframe_api::conditions::reasons;

use super::outcome::Failure;
use super::space_watch::SpaceWatch;
use crate::drivers::quantity::MinFree;
use crate::drivers::{DiskTask, Drivers, Need};
use crate::hypervisor::filesystem::Room;
use crate::session::journal::SessionRecord;

/// All needs on one file system.
struct Demand {
    directory: PathBuf,
    room: Room,
    needed: u64,
    /// What the guest writes there a second, in bytes.
    rate: u64,
}

/// Refuses a snapshot that doesn't fit, with the numbers.
pub fn check(record: &SessionRecord, drivers: &Drivers, watch: &SpaceWatch) -> Result<(), Failure> {
    let keep = MinFree::parse(record.order.limits.min_free.as_deref());
    let need = |task: &DiskTask| {
        let driver = drivers.find(&task.driver)?;
        let rate = driver.grows_with_writes().then(|| watch.rate(&record.order.vm, &task.disk)).flatten();
        // What wasn't measured isn't guessed.
        Some((driver.needs(task)?, rate.unwrap_or(0)))
    };
    for demand in by_filesystem(record.tasks.iter().filter_map(need)) {
        fits(&demand, keep, horizon(record))?;
    }
    Ok(())
}

/// Refuses a snapshot that would overflow within the class's horizon, once it is known how much may change.
pub fn check_areas(record: &SessionRecord, drivers: &Drivers, watch: &SpaceWatch) -> Result<(), Failure> {
    for task in &record.tasks {
        let area = drivers.find(&task.driver).and_then(|driver| driver.area(task));
        let rate = watch.rate(&record.order.vm, &task.disk);
        if let (Some(area), Some(rate)) = (area, rate) {
            lasts(&task.disk, area, rate, horizon(record))?;
        }
    }
    Ok(())
}

fn horizon(record: &SessionRecord) -> Duration {
    record.order.limits.space_horizon.map(Into::into).unwrap_or_default()
}

fn by_filesystem(needs: impl Iterator<Item = (Need, u64)>) -> Vec<Demand> {
    let mut demands: BTreeMap<u64, Demand> = BTreeMap::new();
    for (Need { directory, bytes }, rate) in needs {
        // A directory that can't be examined is refused by its driver, which knows what it is for.
        let Some(room) = Room::of(&directory) else { continue };
        let demand = demands.entry(room.device).or_insert(Demand { directory, room, needed: 0, rate: 0 });
        demand.needed = demand.needed.saturating_add(bytes);
        demand.rate = demand.rate.saturating_add(rate);
    }
    demands.into_values().collect()
}

fn fits(demand: &Demand, keep: MinFree, horizon: Duration) -> Result<(), Failure> {
    let Demand { directory, room, needed, rate } = demand;
    let (keep, written) = (keep.of(room.total), rate.saturating_mul(horizon.as_secs()));
    if room.free >= needed.saturating_add(keep).saturating_add(written) {
        return Ok(());
    }
    let mut message = format!(
        "not enough space on the file system of {}: the snapshot takes {needed} bytes at once and the class wants {keep} \
         left, but only {} of {} are free",
        directory.display(),
        room.free,
        room.total
    );
    if written > 0 {
        let seconds = horizon.as_secs();
        message =
            format!("{message}; at {rate} bytes a second the guest writes {written} within the class's {seconds} s");
    }
    Err(Failure::new(reasons::NO_SPACE, message))
}

fn lasts(disk: &str, area: u64, rate: u64, horizon: Duration) -> Result<(), Failure> {
    let (written, seconds) = (rate.saturating_mul(horizon.as_secs()), horizon.as_secs());
    if area >= written {
        return Ok(());
    }
    let message = format!(
        "the space that the class sets apart for changes of disk {disk} is {area} bytes, but at {rate} bytes a second the \
         guest writes {written} within the class's {seconds} s"
    );
    Err(Failure::new(reasons::NO_SPACE, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demand(needed: u64) -> Demand {
        Demand { directory: "/images".into(), room: Room { device: 1, free: 300, total: 1000 }, needed, rate: 2 }
    }

    #[test]
    fn what_is_needed_and_what_must_stay_free_have_to_fit_together() {
        assert!(fits(&demand(300), MinFree::Nothing, Duration::ZERO).is_ok());
        assert!(fits(&demand(200), MinFree::Percent(10), Duration::ZERO).is_ok());
        let refused = fits(&demand(201), MinFree::Bytes(100), Duration::ZERO).unwrap_err();
        assert_eq!(refused.reason, reasons::NO_SPACE);
        for number in ["201", "100", "300", "1000", "/images"] {
            assert!(refused.message.contains(number), "{number}: {}", refused.message);
        }
    }

    #[test]
    fn what_the_guest_writes_until_the_horizon_has_to_fit_too() {
        let minute = Duration::from_secs(60);
        assert!(fits(&demand(180), MinFree::Nothing, minute).is_ok());
        let refused = fits(&demand(181), MinFree::Nothing, minute).unwrap_err();
        assert!(refused.message.contains("at 2 bytes a second the guest writes 120 within"), "{}", refused.message);
        assert!(lasts("vda", 120, 2, minute).is_ok() && lasts("vda", 0, 2, Duration::ZERO).is_ok());
        let refused = lasts("vda", 119, 2, minute).unwrap_err();
        assert!(refused.message.contains("disk vda is 119 bytes"), "{}", refused.message);
    }

    #[test]
    fn the_needs_of_one_file_system_are_added_up() {
        let directory = tempfile::tempdir().unwrap();
        let need = |bytes| Need { directory: directory.path().into(), bytes };
        let all = by_filesystem([(need(1), 10), (need(2), 20)].into_iter());
        assert_eq!(all.iter().map(|demand| (demand.needed, demand.rate)).collect::<Vec<_>>(), [(3, 30)]);
    }
}
