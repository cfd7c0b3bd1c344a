//! Whether what a snapshot takes at once fits, and leaves as much as the class wants for what comes after.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use freezeframe_api::conditions::reasons;

use super::outcome::Failure;
use super::space_watch::SpaceWatch;
use crate::drivers::quantity::MinFree;
use crate::drivers::{DiskTask, Drivers, Need, Pool};
use crate::hypervisor::filesystem::Room;
use crate::session::journal::SessionRecord;

/// What a thin pool notes of one chunk of data, in bytes, at the most: what LVM reckons with when it makes a pool.
const METADATA_OF_CHUNK: u64 = 64;

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
    let pool = |task: &DiskTask| {
        let rate = watch.rate(&record.order.vm, &task.disk);
        Some((drivers.find(&task.driver)?.pool(task)?, rate.unwrap_or(0)))
    };
    check_pools(record.tasks.iter().filter_map(pool), horizon(record))
}

/// Refuses a snapshot whose changes a thin pool hasn't room for: those of all its disks there together.
fn check_pools(disks: impl Iterator<Item = (Pool, u64)>, horizon: Duration) -> Result<(), Failure> {
    let mut pools: BTreeMap<PathBuf, (Pool, u64)> = BTreeMap::new();
    for (pool, rate) in disks {
        let (_, all) = pools.entry(pool.path.clone()).or_insert((pool, 0));
        *all = all.saturating_add(rate);
    }
    pools.values().try_for_each(|(pool, rate)| pool_lasts(pool, *rate, horizon))
}

fn pool_lasts(pool: &Pool, rate: u64, horizon: Duration) -> Result<(), Failure> {
    let (written, seconds) = (rate.saturating_mul(horizon.as_secs()), horizon.as_secs());
    let mapped = written.div_ceil(pool.chunk.max(1)).saturating_mul(METADATA_OF_CHUNK);
    if pool.data >= written && pool.metadata >= mapped {
        return Ok(());
    }
    let message = format!(
        "not enough space in thin pool {}: at {rate} bytes a second the guest writes {written} within the class's {seconds} s, \
         which take {written} of data and {mapped} of metadata, but beyond what the class keeps free there are {} and {}",
        pool.path.display(),
        pool.data,
        pool.metadata
    );
    Err(Failure::new(reasons::NO_SPACE, message))
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
    fn what_all_disks_in_a_thin_pool_write_must_fit_with_the_metadata_for_it() {
        let pool = |data, metadata| Pool { path: "/dev/vg0/pool".into(), data, metadata, chunk: 100 };
        let check = |room: Pool| check_pools([(room.clone(), 5), (room, 15)].into_iter(), Duration::from_secs(60));
        assert!(check(pool(1200, 768)).is_ok());
        assert!(check_pools([(pool(0, 0), 0)].into_iter(), Duration::from_secs(60)).is_ok(), "nothing was measured");
        for (data, metadata) in [(1199, 768), (1200, 767)] {
            let refused = check(pool(data, metadata)).unwrap_err();
            assert_eq!(refused.reason, reasons::NO_SPACE);
            let said = format!(
                "take 1200 of data and 768 of metadata, but beyond what the class keeps free there are {data} and {metadata}"
            );
            assert!(
                refused.message.contains(&said) && refused.message.contains("/dev/vg0/pool"),
                "{}",
                refused.message
            );
        }
    }

    #[test]
    fn the_needs_of_one_file_system_are_added_up() {
        let directory = tempfile::tempdir().unwrap();
        let need = |bytes| Need { directory: directory.path().into(), bytes };
        let all = by_filesystem([(need(1), 10), (need(2), 20)].into_iter());
        assert_eq!(all.iter().map(|demand| (demand.needed, demand.rate)).collect::<Vec<_>>(), [(3, 30)]);
    }
}
