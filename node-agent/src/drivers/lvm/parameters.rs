//! The class's parameters for `lvm`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::drivers::quantity::{bytes, digits};
use crate::drivers::{DriverError, Result};

const SIZE: &str = "size";
const MIN_FREE: &str = "minFreePercent";
const DEFAULT_MIN_FREE: u8 = 10;
const WARN: &str = "warnPercent";
const DEFAULT_WARN: u8 = 80;

/// Space that is set apart for a thick snapshot's changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Size {
    /// So much of the origin's size.
    Percent(u8),
    /// So many bytes.
    Bytes(u64),
}

impl Size {
    fn parse(text: &str) -> Option<Self> {
        if let Some(percent) = text.strip_suffix("%ORIGIN").or_else(|| text.strip_suffix('%')) {
            return digits(percent)
                .filter(|percent| (1..=100).contains(percent))
                .map(|percent| Self::Percent(u8::try_from(percent).unwrap_or(100)));
        }
        bytes(text).map(Self::Bytes)
    }

    /// In whole extents of a volume group.
    #[must_use]
    pub fn bytes(self, origin: u64, extent: u64) -> u64 {
        let wanted = match self {
            Self::Percent(percent) => (origin / 100).saturating_mul(percent.into()),
            Self::Bytes(bytes) => bytes,
        };
        wanted.max(1).div_ceil(extent.max(1)).saturating_mul(extent.max(1))
    }

    /// As an option of `lvcreate`.
    #[must_use]
    pub fn arguments(self) -> [String; 2] {
        match self {
            Self::Percent(percent) => ["--extents".into(), format!("{percent}%ORIGIN")],
            Self::Bytes(bytes) => ["--size".into(), format!("{bytes}b")],
        }
    }
}

/// The parameters, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// For a thick volume's snapshot; without it none is taken.
    pub size: Option<Size>,
    /// Percent of a thin pool, data and metadata, that must be free.
    pub min_free_percent: u8,
    /// Percent of a thick snapshot's space from which on it is said to be low.
    pub warn_percent: u8,
}

impl Parameters {
    /// Reads a class's parameters.
    pub fn parse(given: &BTreeMap<String, String>) -> Result<Self> {
        let mut parameters = Self { size: None, min_free_percent: DEFAULT_MIN_FREE, warn_percent: DEFAULT_WARN };
        for (key, value) in given {
            let refuse = |why: &str| Err(DriverError::Parameter { key: key.clone(), why: format!("`{value}` {why}") });
            match key.as_str() {
                SIZE => match Size::parse(value) {
                    Some(size) => parameters.size = Some(size),
                    None => return refuse("is neither a part of the origin such as 20%ORIGIN nor a size such as 2Gi"),
                },
                MIN_FREE => match digits(value).and_then(|percent| u8::try_from(percent).ok()) {
                    Some(percent) if percent < 100 => parameters.min_free_percent = percent,
                    _ => return refuse("is not a number from 0 to 99"),
                },
                WARN => match digits(value).and_then(|percent| u8::try_from(percent).ok()) {
                    Some(percent) if (1..=99).contains(&percent) => parameters.warn_percent = percent,
                    _ => return refuse("is not a number from 1 to 99"),
                },
                _ => return refuse("is set, but lvm knows only size, minFreePercent and warnPercent"),
            }
        }
        Ok(parameters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(key: &str, value: &str) -> Result<Parameters> {
        Parameters::parse(&BTreeMap::from([(key.to_owned(), value.to_owned())]))
    }

    #[test]
    fn sizes_are_parts_of_the_origin_or_bytes() {
        let read = |text: &str| parse(SIZE, text).unwrap().size.unwrap();
        assert_eq!(read("20%ORIGIN"), Size::Percent(20));
        assert_eq!(read("100%"), Size::Percent(100));
        assert_eq!(read("2Gi"), Size::Bytes(2 << 30));
        assert_eq!(read("4194304"), Size::Bytes(4 << 20));
    }

    #[test]
    fn a_size_that_means_nothing_is_refused_by_name() {
        for text in
            ["", "0", "0%ORIGIN", "101%", "-1", "+5Gi", "2GB", "20%FREE", "1.5Gi", "99999999999999999999Ti", "Gi"]
        {
            let error = parse(SIZE, text).unwrap_err();
            assert!(matches!(&error, DriverError::Parameter { key, .. } if key == SIZE), "{text}: {error}");
        }
    }

    #[test]
    fn the_free_part_of_a_pool_has_a_default_and_bounds() {
        assert_eq!(Parameters::parse(&BTreeMap::new()).unwrap().min_free_percent, DEFAULT_MIN_FREE);
        assert_eq!(parse(MIN_FREE, "0").unwrap().min_free_percent, 0);
        for text in ["100", "-1", "x", ""] {
            assert!(parse(MIN_FREE, text).is_err(), "{text}");
        }
        assert_eq!(parse(WARN, "60").unwrap().warn_percent, 60);
        for text in ["0", "100", "-1", ""] {
            assert!(parse(WARN, text).is_err(), "{text}");
        }
        assert!(parse("colour", "red").is_err());
    }

    #[test]
    fn a_size_is_rounded_up_to_whole_extents() {
        assert_eq!(Size::Percent(20).bytes(512 << 20, 4 << 20), 104 << 20);
        assert_eq!(Size::Bytes(1).bytes(0, 4 << 20), 4 << 20);
        assert_eq!(Size::Bytes(8 << 20).bytes(0, 4 << 20), 8 << 20);
    }
}
