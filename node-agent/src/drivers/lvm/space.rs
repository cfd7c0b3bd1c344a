//! Whether a snapshot fits, before it is made; with numbers where it doesn't.

use std::path::PathBuf;

use super::commands::Row;
use super::parameters::Parameters;
use super::state::{Needs, State};
use crate::drivers::{DriverError, Fill, Pool, Result};

/// The thin pool of a volume, healthy and with so much room, for data and for metadata, as the class wants.
pub fn check_pool(rows: &[Row], origin: &Row, state: &State, parameters: &Parameters) -> Result<Pool> {
    let pool = pool_of(rows, origin);
    let group = state.origin.group();
    let pool = pool.ok_or_else(|| DriverError::NotNow(format!("{} isn't in a thin pool any more", state.origin)))?;
    check_health(pool, group)?;
    let path = |suffix: &str| PathBuf::from(format!("/dev/{group}/{}{suffix}", pool.lv_name));
    Ok(Pool {
        path: path(""),
        data: room(path(""), pool.lv_size, pool.data_used(), parameters)?,
        metadata: room(path("_tmeta"), pool.lv_metadata_size, pool.metadata_used(), parameters)?,
        chunk: pool.chunk_size,
    })
}

/// The thin pool that a volume is in, among the volumes of its group.
pub fn pool_of<'a>(rows: &'a [Row], volume: &Row) -> Option<&'a Row> {
    rows.iter().find(|row| !volume.pool_lv.is_empty() && row.lv_name == volume.pool_lv)
}

/// How full a pool is, and whether it has less left than the class wants. It can't spoil the snapshots in it: what a full one
/// refuses are writes.
pub fn pool_fill(pool: &Row, parameters: &Parameters) -> Fill {
    let percent = pool.data_used().max(pool.metadata_used());
    Fill { percent, overflowed: false, low: 100.0 - percent < f64::from(parameters.min_free_percent) }
}

/// LVM finds nothing wrong with a volume.
pub fn check_health(row: &Row, group: &str) -> Result<()> {
    match row.lv_health_status.as_str() {
        "" => Ok(()),
        status => Err(DriverError::NotNow(format!("LVM says of {group}/{}: {status}", row.lv_name))),
    }
}

/// What is free beyond what the class keeps free.
fn room(path: PathBuf, size: u64, used_percent: f64, parameters: &Parameters) -> Result<u64> {
    let needed = size / 100 * u64::from(parameters.min_free_percent);
    let free = size.saturating_sub(part_of(size, used_percent));
    free.checked_sub(needed).ok_or(DriverError::NoSpace { path, needed, free })
}

/// LVM gives percents with two digits behind the point.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to 0..=10000 before")]
fn part_of(size: u64, percent: f64) -> u64 {
    let hundredths = (percent.clamp(0.0, 100.0) * 100.0).round() as u64;
    u64::try_from(u128::from(size) * u128::from(hundredths) / 10_000).unwrap_or(size)
}

/// What a thick snapshot takes of its group; an error if that isn't free.
pub fn thick_needs(origin: &Row, state: &State) -> Result<Option<Needs>> {
    let Some(size) = state.size else { return Ok(None) };
    let needs = Needs { bytes: size.bytes(origin.lv_size, origin.vg_extent_size), free: origin.vg_free };
    check_group(state.origin.group(), &[needs])?;
    Ok(Some(needs))
}

/// The thick snapshots of one group fit together.
pub fn check_group(group: &str, needs: &[Needs]) -> Result<()> {
    let needed: u64 = needs.iter().map(|needs| needs.bytes).sum();
    let free = needs.iter().map(|needs| needs.free).min().unwrap_or(u64::MAX);
    if needed <= free {
        Ok(())
    } else {
        Err(DriverError::NoSpace { path: format!("/dev/{group}").into(), needed, free })
    }
}

#[cfg(test)]
mod tests {
    use super::super::commands::tests::row;
    use super::super::volume::Volume;
    use super::*;

    const GIB: u64 = 1 << 30;

    fn parameters(min_free_percent: u8) -> Parameters {
        Parameters { size: None, min_free_percent, warn_percent: 80 }
    }

    fn check(used: f64, min_free_percent: u8) -> Result<u64> {
        room("/dev/vg0/pool".into(), GIB, used, &parameters(min_free_percent))
    }

    #[test]
    fn a_pool_that_is_fuller_than_the_class_allows_is_refused_with_numbers() {
        assert!(check(89.5, 10).is_ok());
        let error = check(95.0, 10).unwrap_err();
        assert!(
            matches!(error, DriverError::NoSpace { needed, free, .. } if needed == GIB / 100 * 10 && free < needed)
        );
        assert_eq!(check(100.0, 0).unwrap(), 0);
    }

    #[test]
    fn the_room_of_a_volumes_pool_is_read_from_lvms_report() {
        let rows = [row("a"), row("pool"), row("t-vmsnap-1")];
        let volume = Volume::new("vg0", "a").unwrap();
        let state = State {
            snapshot: volume.snapshot("1").unwrap(),
            origin: volume,
            thin: true,
            size: None,
            device: PathBuf::new(),
            needs: None,
            pool: None,
        };
        let pool = check_pool(&rows, &rows[0], &state, &parameters(10)).unwrap();
        let part = |size: u64, hundredths: u64| size * hundredths / 10_000;
        assert_eq!(pool.path, PathBuf::from("/dev/vg0/pool"));
        assert_eq!(pool.data, GIB - part(GIB, 312) - GIB / 100 * 10);
        assert_eq!(pool.metadata, (4 << 20) - part(4 << 20, 1104) - (4 << 20) / 100 * 10);
        assert_eq!(pool.chunk, 64 << 10);
        assert!(check_pool(&rows, &rows[2], &state, &parameters(10)).is_err(), "a thick one is in no pool");
    }

    #[test]
    fn a_pool_is_as_full_as_the_fuller_of_its_data_and_its_metadata() {
        let fill = pool_fill(&row("pool"), &parameters(88));
        assert_eq!(fill, Fill { percent: 11.04, overflowed: false, low: false });
        assert!(pool_fill(&row("pool"), &parameters(89)).low);
    }

    #[test]
    fn thick_snapshots_of_one_group_must_fit_together() {
        let needs = Needs { bytes: 6, free: 10 };
        assert!(check_group("vg0", &[needs]).is_ok());
        let error = check_group("vg0", &[needs, needs]).unwrap_err();
        assert!(matches!(error, DriverError::NoSpace { needed: 12, free: 10, .. }), "{error}");
    }
}
