//! Whether a snapshot fits, before it is made; with numbers where it doesn't.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::parameters::Parameters;
use super::report::Row;
use super::state::{Needs, State};
use crate::drivers::{DriverError, Fill, Pool, PoolFree, Result};

/// LVM makes nothing more in a pool unless more than a quarter of its metadata is free, or more than this if that is less, in
/// bytes: `pool_metadata_min_threshold` in its sources.
const METADATA_RESERVE: u64 = 4 << 20;

/// The thin pool of a volume, healthy and with so much room, for data and for metadata, as the class wants.
pub fn check_pool(rows: &[Row], origin: &Row, state: &State, parameters: &Parameters) -> Result<Pool> {
    let pool = pool_of(rows, origin);
    let group = state.origin.group();
    let pool = pool.ok_or_else(|| DriverError::NotNow(format!("{} isn't in a thin pool any more", state.origin)))?;
    check_health(pool, group)?;
    let kept = |size: u64| size / 100 * u64::from(parameters.min_free_percent);
    let (data, metadata) = (pool.lv_size, pool.lv_metadata_size);
    let reserve = METADATA_RESERVE.min(metadata / 4) + 1;
    Ok(Pool {
        path: path(group, &pool.lv_name),
        data: room(path(group, &pool.lv_name), data, pool.data_used(), kept(data))?,
        metadata: room(
            path(group, &format!("{}_tmeta", pool.lv_name)),
            metadata,
            pool.metadata_used(),
            kept(metadata).max(reserve),
        )?,
        chunk: pool.chunk_size,
    })
}

fn path(group: &str, name: &str) -> PathBuf {
    PathBuf::from("/dev").join(group).join(name)
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

/// What is free in the pools of a group's thin volumes, by the volumes' names. A pool that isn't active says nothing.
pub fn pools_free(rows: &[Row], group: &str) -> BTreeMap<String, PoolFree> {
    let pool = |row: &Row| Some((row.lv_name.clone(), pool_free(pool_of(rows, row)?, group)?));
    rows.iter().filter_map(pool).collect()
}

fn pool_free(pool: &Row, group: &str) -> Option<PoolFree> {
    let percent = |used: &str| Some(part_of(100, 100.0 - used.parse::<f64>().ok()?));
    let (data, metadata) = (percent(&pool.data_percent)?, percent(&pool.metadata_percent)?);
    Some(PoolFree { path: path(group, &pool.lv_name), data, metadata })
}

/// LVM finds nothing wrong with a volume.
pub fn check_health(row: &Row, group: &str) -> Result<()> {
    match row.lv_health_status.as_str() {
        "" => Ok(()),
        status => Err(DriverError::NotNow(format!("LVM says of {group}/{}: {status}", row.lv_name))),
    }
}

/// What is free beyond what must stay so, in bytes.
fn room(path: PathBuf, size: u64, used_percent: f64, needed: u64) -> Result<u64> {
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
    use super::super::report::tests::row;
    use super::super::volume::Volume;
    use super::*;

    const GIB: u64 = 1 << 30;

    fn parameters(min_free_percent: u8) -> Parameters {
        Parameters { size: None, min_free_percent, warn_percent: 80 }
    }

    /// What is found of the pool of volume `a`.
    fn check(pool: Row, min_free_percent: u8) -> Result<Pool> {
        let (origin, volume) = (row("a"), Volume::new("vg0", "a").unwrap());
        let snapshot = volume.snapshot("1").unwrap();
        let device = volume.path();
        let state = State { origin: volume, snapshot, thin: true, size: None, device, needs: None, pool: None };
        check_pool(&[origin.clone(), pool], &origin, &state, &parameters(min_free_percent))
    }

    #[test]
    fn a_pool_that_is_fuller_than_the_class_allows_is_refused_with_numbers() {
        let filled = |percent: &str| Row { data_percent: percent.into(), ..row("pool") };
        assert!(check(filled("89.50"), 10).is_ok());
        let error = check(filled("95.00"), 10).unwrap_err();
        assert!(
            matches!(error, DriverError::NoSpace { needed, free, .. } if needed == GIB / 100 * 10 && free < needed)
        );
        assert_eq!(check(filled("100.00"), 0).unwrap().data, 0);
    }

    #[test]
    fn the_room_of_a_volumes_pool_is_read_from_lvms_report() {
        let pool = check(row("pool"), 30).unwrap();
        let part = |size: u64, hundredths: u64| size * hundredths / 10_000;
        assert_eq!(pool.path, PathBuf::from("/dev/vg0/pool"));
        assert_eq!(pool.data, GIB - part(GIB, 312) - GIB / 100 * 30);
        assert_eq!(pool.metadata, (4 << 20) - part(4 << 20, 1104) - (4 << 20) / 100 * 30);
        assert_eq!(pool.chunk, 64 << 10);
        assert!(check(row("t-vmsnap-1"), 10).is_err(), "the pool isn't there");
    }

    #[test]
    fn as_much_of_a_pools_metadata_stays_free_as_lvm_wants_whatever_the_class_says() {
        let filled = |size: u64, percent: &str| {
            check(Row { lv_metadata_size: size, metadata_percent: percent.into(), ..row("pool") }, 0)
        };
        assert_eq!(filled(4 << 20, "74.99").unwrap().metadata, 419);
        let error = filled(4 << 20, "75.00").unwrap_err();
        assert!(matches!(error, DriverError::NoSpace { needed: 0x10_0001, .. }), "{error}");
        assert!(filled(64 << 20, "93.74").is_ok() && filled(64 << 20, "93.75").is_err());
    }

    #[test]
    fn a_pool_is_as_full_as_the_fuller_of_its_data_and_its_metadata() {
        let fill = pool_fill(&row("pool"), &parameters(88));
        assert_eq!(fill, Fill { percent: 11.04, overflowed: false, low: false });
        assert!(pool_fill(&row("pool"), &parameters(89)).low);
    }

    #[test]
    fn what_is_free_in_a_pool_is_told_of_its_volumes_in_whole_percents_rounded_down() {
        let (volume, pool) = (row("a"), row("pool"));
        let told = |pool: Row| pools_free(&[volume.clone(), pool, row("t-vmsnap-1")], "vg0");
        let free = PoolFree { path: "/dev/vg0/pool".into(), data: 96, metadata: 88 };
        assert_eq!(told(pool.clone()), BTreeMap::from([("a".to_owned(), free)]));
        let full = told(Row { data_percent: "100.00".into(), metadata_percent: "90.01".into(), ..pool.clone() });
        assert_eq!((full["a"].data, full["a"].metadata), (0, 9));
        assert!(told(Row { data_percent: String::new(), ..pool }).is_empty(), "it isn't active");
    }

    #[test]
    fn thick_snapshots_of_one_group_must_fit_together() {
        let needs = Needs { bytes: 6, free: 10 };
        assert!(check_group("vg0", &[needs]).is_ok());
        let error = check_group("vg0", &[needs, needs]).unwrap_err();
        assert!(matches!(error, DriverError::NoSpace { needed: 12, free: 10, .. }), "{error}");
    }
}
