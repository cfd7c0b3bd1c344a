//! Whether a snapshot fits, before it is made; with numbers where it doesn't.

use std::path::PathBuf;

use super::commands::Row;
use super::parameters::Parameters;
use super::state::{Needs, State};
use crate::drivers::{DriverError, Result};

/// The thin pool of a volume is healthy and has so much room, for data and for metadata, as the class wants.
pub fn check_pool(rows: &[Row], origin: &Row, state: &State, parameters: &Parameters) -> Result<()> {
    let pool = rows.iter().find(|row| row.lv_name == origin.pool_lv);
    let group = state.origin.group();
    let pool = pool.ok_or_else(|| DriverError::NotNow(format!("{} isn't in a thin pool any more", state.origin)))?;
    check_health(pool, group)?;
    let path = |suffix: &str| PathBuf::from(format!("/dev/{group}/{}{suffix}", pool.lv_name));
    check_part(path(""), pool.lv_size, pool.data_used(), parameters)?;
    check_part(path("_tmeta"), pool.lv_metadata_size, pool.metadata_used(), parameters)
}

/// LVM finds nothing wrong with a volume.
pub fn check_health(row: &Row, group: &str) -> Result<()> {
    match row.lv_health_status.as_str() {
        "" => Ok(()),
        status => Err(DriverError::NotNow(format!("LVM says of {group}/{}: {status}", row.lv_name))),
    }
}

fn check_part(path: PathBuf, size: u64, used_percent: f64, parameters: &Parameters) -> Result<()> {
    let needed = size / 100 * u64::from(parameters.min_free_percent);
    let free = size.saturating_sub(part_of(size, used_percent));
    if free >= needed { Ok(()) } else { Err(DriverError::NoSpace { path, needed, free }) }
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
    use super::*;

    const GIB: u64 = 1 << 30;

    fn check(used: f64, min_free_percent: u8) -> Result<()> {
        check_part("/dev/vg0/pool".into(), GIB, used, &Parameters { size: None, min_free_percent, warn_percent: 80 })
    }

    #[test]
    fn a_pool_that_is_fuller_than_the_class_allows_is_refused_with_numbers() {
        assert!(check(89.5, 10).is_ok());
        let error = check(95.0, 10).unwrap_err();
        assert!(
            matches!(error, DriverError::NoSpace { needed, free, .. } if needed == GIB / 100 * 10 && free < needed)
        );
        assert!(check(100.0, 0).is_ok());
    }

    #[test]
    fn thick_snapshots_of_one_group_must_fit_together() {
        let needs = Needs { bytes: 6, free: 10 };
        assert!(check_group("vg0", &[needs]).is_ok());
        let error = check_group("vg0", &[needs, needs]).unwrap_err();
        assert!(matches!(error, DriverError::NoSpace { needed: 12, free: 10, .. }), "{error}");
    }
}
