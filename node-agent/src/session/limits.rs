//! A class's limits in numbers.

use freezeframe_api::v1alpha1::Limits;

use crate::drivers::Pace;
use crate::drivers::quantity::{MinFree, bytes};
use crate::locks::Waiting;

/// What merges may cost under these limits. What the API's own pattern lets through can be read; else there is no limit.
#[must_use]
pub fn pace(limits: &Limits, waiting: &Waiting) -> Pace {
    Pace {
        speed: limits.merge_speed.as_deref().and_then(bytes).unwrap_or(0),
        max_latency: limits.max_merge_latency.map(Into::into),
        keep: vec![MinFree::parse(limits.min_free.as_deref())],
        waiting: waiting.clone(),
    }
}

/// The pace that suits all of several limits: the slowest of each.
#[must_use]
pub fn slowest<'a>(limits: impl Iterator<Item = &'a Limits>, waiting: &Waiting) -> Pace {
    let paces: Vec<_> = limits.map(|limits| pace(limits, waiting)).collect();
    let speeds = paces.iter().map(|pace| pace.speed).filter(|speed| *speed > 0);
    Pace {
        speed: speeds.min().unwrap_or(0),
        max_latency: paces.iter().filter_map(|pace| pace.max_latency).min(),
        keep: paces.iter().flat_map(|pace| &pace.keep).copied().collect(),
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

    #[test]
    fn of_several_limits_the_slowest_counts_and_none_is_faster_than_any() {
        let limits = |speed: Option<&str>, millis: Option<u64>| Limits {
            merge_speed: speed.map(Into::into),
            max_merge_latency: millis.map(|millis| Duration::from_millis(millis).into()),
            ..Limits::default()
        };
        let all = [limits(None, Some(50)), limits(Some("2Mi"), None), limits(Some("1Mi"), Some(20))];
        let slow = slowest(all.iter(), &Waiting::default());
        assert_eq!((slow.speed, slow.max_latency), (1 << 20, Some(Duration::from_millis(20))));
        assert_eq!(slowest([].into_iter(), &Waiting::default()).speed, 0);
    }
}
