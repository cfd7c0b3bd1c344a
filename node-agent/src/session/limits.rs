//! A class's limits in numbers.

use freezeframe_api::v1alpha1::Limits;

use crate::drivers::Pace;
use crate::drivers::quantity::bytes;
use crate::locks::Waiting;

/// How fast merges go under these limits. What the API's own pattern lets through can be read; else there is no limit.
#[must_use]
pub fn pace(limits: &Limits, waiting: &Waiting) -> Pace {
    Pace {
        speed: limits.merge_speed.as_deref().and_then(bytes).unwrap_or(0),
        max_latency: limits.max_merge_latency.map(Into::into),
        waiting: waiting.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn limits_are_read_and_their_absence_is_no_limit() {
        let limits = Limits {
            merge_speed: Some("50Mi".into()),
            max_merge_latency: Some(Duration::from_millis(20).into()),
            ..Limits::default()
        };
        let read = pace(&limits, &Waiting::default());
        assert_eq!((read.speed, read.max_latency), (50 << 20, Some(Duration::from_millis(20))));
        let none = pace(&Limits::default(), &Waiting::default());
        assert_eq!((none.speed, none.max_latency), (0, None));
    }
}
