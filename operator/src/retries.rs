//! How long to wait after an error: longer after each one of the same kind on the same object.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::error::ErrorKind;

/// Failures in a row, by object.
#[derive(Debug, Default)]
pub struct Retries {
    failures: Mutex<HashMap<String, (ErrorKind, u32)>>,
}

impl Retries {
    /// How long to wait after one more error on the object.
    pub fn after_error(&self, object: &str, kind: ErrorKind) -> Duration {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let (last, count) = failures.entry(object.to_owned()).or_insert((kind, 0));
        if *last != kind {
            (*last, *count) = (kind, 0);
        }
        *count += 1;
        delay(kind, *count)
    }

    /// Forgets the object's errors.
    pub fn after_success(&self, object: &str) {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).remove(object);
    }
}

fn delay(kind: ErrorKind, count: u32) -> Duration {
    let (first, most) = match kind {
        ErrorKind::Conflict => (Duration::from_millis(50), Duration::from_secs(5)),
        ErrorKind::Unavailable => (Duration::from_millis(500), Duration::from_secs(60)),
        ErrorKind::Refused => (Duration::from_secs(5), Duration::from_secs(5 * 60)),
        // It may also be deleted, or be another object that this one rests on.
        ErrorKind::Unreadable => (Duration::from_secs(30), Duration::from_secs(10 * 60)),
    };
    let factor = 2_u32.checked_pow(count.saturating_sub(1)).unwrap_or(u32::MAX);
    first.checked_mul(factor).map_or(most, |delay| delay.min(most))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_error_in_a_row_doubles_the_wait_up_to_a_bound() {
        let retries = Retries::default();
        let waits: Vec<_> = (0..9).map(|_| retries.after_error("a", ErrorKind::Unavailable)).collect();
        assert_eq!(waits[..3], [500, 1000, 2000].map(Duration::from_millis));
        assert_eq!(waits[8], Duration::from_secs(60));
        assert_eq!(delay(ErrorKind::Conflict, u32::MAX), Duration::from_secs(5));
    }

    #[test]
    fn a_success_or_an_error_of_another_kind_starts_from_the_shortest_wait() {
        let retries = Retries::default();
        for _ in 0..5 {
            retries.after_error("a", ErrorKind::Conflict);
        }
        assert_eq!(retries.after_error("a", ErrorKind::Refused), Duration::from_secs(5));
        retries.after_success("a");
        assert_eq!(retries.after_error("a", ErrorKind::Refused), Duration::from_secs(5));
    }

    #[test]
    fn what_waits_for_an_object_that_cannot_be_read_looks_again_by_itself() {
        assert_eq!(Retries::default().after_error("a", ErrorKind::Unreadable), Duration::from_secs(30));
    }
}
