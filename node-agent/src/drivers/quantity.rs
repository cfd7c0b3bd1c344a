//! Numbers in class parameters.

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

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn bytes_are_read_with_and_without_a_unit_and_nothing_else_is() {
        assert_eq!((bytes("1048576"), bytes("1Mi"), bytes("2Gi")), (Some(1 << 20), Some(1 << 20), Some(2 << 30)));
        for text in ["", "0", "-1", "+1", "1M", "1.5Gi", "Gi", "99999999999Ti"] {
            assert_eq!(bytes(text), None, "{text}");
        }
    }
}
