//! Numbers in classes.

const UNITS: [(&str, u64); 4] = [("Ki", 1 << 10), ("Mi", 1 << 20), ("Gi", 1 << 30), ("Ti", 1 << 40)];

/// A number of bytes such as `2Gi`, or plain digits; none if it is malformed, zero or too large.
pub fn bytes(text: &str) -> Option<u64> {
    let unit = UNITS.iter().find_map(|(unit, bytes)| Some((text.strip_suffix(unit)?, *bytes)));
    let (number, unit) = unit.unwrap_or((text, 1));
    digits(number)?.checked_mul(unit).filter(|bytes| *bytes > 0)
}

/// Digits and nothing else: `parse` alone would take a sign.
pub fn digits(text: &str) -> Option<u64> {
    text.bytes().all(|digit| digit.is_ascii_digit()).then(|| text.parse().ok())?
}

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

    /// The bytes that must stay free on a file system of `total` bytes.
    #[must_use]
    pub fn of(self, total: u64) -> u64 {
        match self {
            Self::Nothing => 0,
            Self::Percent(percent) => (total / 100).saturating_mul(percent),
            Self::Bytes(bytes) => bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{MinFree, bytes};

    #[test]
    fn bytes_are_read_with_and_without_a_unit_and_nothing_else_is() {
        assert_eq!((bytes("1048576"), bytes("1Mi"), bytes("2Gi")), (Some(1 << 20), Some(1 << 20), Some(2 << 30)));
        for text in ["", "0", "-1", "+1", "1M", "1.5Gi", "Gi", "99999999999Ti"] {
            assert_eq!(bytes(text), None, "{text}");
        }
    }

    #[test]
    fn a_limit_is_a_part_or_bytes() {
        assert_eq!(MinFree::parse(Some("5%")), MinFree::Percent(5));
        assert_eq!(MinFree::parse(Some("10Gi")), MinFree::Bytes(10 << 30));
        assert_eq!(MinFree::parse(None), MinFree::Nothing);
    }
}
