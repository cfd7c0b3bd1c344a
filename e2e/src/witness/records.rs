//! The records that the guest's writer appends.

use std::path::Path;

use anyhow::{Context, Result};

const RECORD: usize = 64;

/// What stands in one disk's log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Records {
    /// Whole records.
    pub whole: u64,
    /// Bytes of a record that was cut in half.
    pub torn: usize,
    /// Whole records that say something other than they should.
    pub bad: u64,
}

impl Records {
    /// Reads the log of a mounted disk: `seq.log` at its top. A disk without one has no records.
    pub(super) fn read(mountpoint: &Path) -> Result<Self> {
        let path = mountpoint.join("seq.log");
        if !path.exists() {
            return Ok(Self::default());
        }
        let log = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        Ok(Self::of(&log))
    }

    fn of(log: &[u8]) -> Self {
        let records = log.chunks_exact(RECORD);
        let torn = records.remainder().len();
        let (mut whole, mut bad) = (0, 0);
        for record in records {
            whole += 1;
            bad += u64::from(!is_record(record, whole));
        }
        Self { whole, torn, bad }
    }
}

/// `number time check`, each of fixed width; the check is a multiplicative hash of the number.
fn is_record(record: &[u8], number: u64) -> bool {
    let field = |from: usize| std::str::from_utf8(&record[from..from + 20]).ok()?.parse::<u64>().ok();
    let check = number.wrapping_mul(2_654_435_761) & 0xffff_ffff;
    field(0) == Some(number) && field(42) == Some(check)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(number: u64) -> Vec<u8> {
        let check = number.wrapping_mul(2_654_435_761) & 0xffff_ffff;
        format!("{number:020} {:020} {check:020}\n\n", 7).into_bytes()
    }

    #[test]
    fn whole_torn_and_bad_records_are_told_apart() {
        let mut log = [record(1), record(2), record(4)].concat();
        log.extend_from_slice(&record(4)[..10]);
        assert_eq!(Records::of(&log), Records { whole: 3, torn: 10, bad: 1 });
    }
}
