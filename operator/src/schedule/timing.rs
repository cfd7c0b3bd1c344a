//! When a schedule's snapshots are due. Pure.
//!
//! A *time* of the schedule is an instant at which its cron pattern matches in its time zone. A VM's snapshot for that time
//! is *due* a while later, by the VM's share of the jitter.

use std::time::Duration;

use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use freezeframe_api::conditions::reasons;
use freezeframe_api::v1alpha1::VMSnapshotScheduleSpec;
use k8s_openapi::jiff::tz::TimeZone;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use thiserror::Error;

/// Why a schedule can't be followed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum TimingError {
    /// The cron pattern isn't one.
    #[error("schedule {schedule:?} can't be read: {message}")]
    Schedule {
        /// The pattern.
        schedule: String,
        /// What is wrong with it.
        message: String,
    },
    /// The cron pattern matches no time.
    #[error("schedule {0:?} never comes")]
    Never(String),
    /// The time zone isn't known.
    #[error("there is no time zone {0:?}")]
    TimeZone(String),
}

impl TimingError {
    /// A reason of the API.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Schedule { .. } | Self::Never(_) => reasons::INVALID_SCHEDULE,
            Self::TimeZone(_) => reasons::UNKNOWN_TIME_ZONE,
        }
    }
}

/// The times of a schedule.
#[derive(Clone, Debug)]
pub struct Timing {
    cron: Cron,
    zone: TimeZone,
    jitter: Duration,
}

impl Timing {
    /// The times that the spec asks for.
    pub fn new(spec: &VMSnapshotScheduleSpec) -> Result<Self, TimingError> {
        let zone = spec.time_zone.as_deref().map_or(Ok(TimeZone::UTC), |name| {
            TimeZone::get(name).map_err(|_| TimingError::TimeZone(name.to_owned())) // It says no more than that.
        })?;
        let parser = CronParser::builder().seconds(Seconds::Optional).year(Year::Disallowed).build();
        let cron = parser
            .parse(&spec.schedule)
            .map_err(|error| TimingError::Schedule { schedule: spec.schedule.clone(), message: error.to_string() })?;
        let jitter = spec.jitter.map_or(Duration::ZERO, Duration::from);
        let timing = Self { cron, zone, jitter };
        if timing.next(Timestamp::UNIX_EPOCH).is_none() {
            return Err(TimingError::Never(spec.schedule.clone()));
        }
        Ok(timing)
    }

    /// The zone in which its days begin.
    #[must_use]
    pub fn zone(&self) -> &TimeZone {
        &self.zone
    }

    /// The first time after `instant`. None: never.
    #[must_use]
    pub fn next(&self, instant: Timestamp) -> Option<Timestamp> {
        let found = self.cron.find_next_occurrence(&instant.to_zoned(self.zone.clone()), false);
        found.ok().map(|zoned| zoned.timestamp()) // An error is the end of the years that are looked at.
    }

    /// The last time at or before `instant`. None: there was none.
    #[must_use]
    pub fn last(&self, instant: Timestamp) -> Option<Timestamp> {
        let found = self.cron.find_previous_occurrence(&instant.to_zoned(self.zone.clone()), true);
        found.ok().map(|zoned| zoned.timestamp()) // As above.
    }

    /// By how much the snapshots of the VM with that UID are taken later than the schedule says: always the same for one
    /// VM, spread evenly over all of them.
    #[must_use]
    pub fn delay(&self, vm_uid: &str) -> SignedDuration {
        let millis = u64::try_from(self.jitter.as_millis()).unwrap_or(u64::MAX);
        let share = (u128::from(hash(vm_uid)) * u128::from(millis)) >> 64;
        SignedDuration::from_millis(i64::try_from(share).unwrap_or(i64::MAX))
    }
}

/// FNV-1a with a final mix. It must be the same in every version of the program, as the standard library's need not be.
#[must_use]
pub fn hash(text: &str) -> u64 {
    let sum = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let mixed = (sum ^ (sum >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    mixed ^ (mixed >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timing(schedule: &str, zone: &str) -> Timing {
        Timing::new(&spec(schedule, zone)).unwrap()
    }

    fn spec(schedule: &str, zone: &str) -> VMSnapshotScheduleSpec {
        serde_json::from_value(serde_json::json!({"schedule": schedule, "timeZone": zone})).unwrap()
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    /// The times between the two instants, as local times with their offsets.
    fn times(timing: &Timing, from: &str, to: &str) -> Vec<String> {
        let (mut now, mut found) = (at(from), vec![]);
        while let Some(next) = timing.next(now).filter(|next| *next < at(to)) {
            let local = next.to_zoned(timing.zone().clone());
            found.push(local.strftime("%H:%M%:z").to_string());
            now = next;
        }
        found
    }

    #[test]
    fn a_time_in_the_gap_of_spring_comes_right_after_it_and_others_are_left_alone() {
        let (from, to) = ("2026-03-28T23:00:00Z", "2026-03-29T02:30:00Z");
        let rows = [
            ("30 2 * * *", vec!["03:00+02:00"]),
            ("0 2 * * *", vec!["03:00+02:00"]),
            ("30 1 * * *", vec!["01:30+01:00"]),
            ("0 * * * *", vec!["01:00+01:00", "03:00+02:00", "04:00+02:00"]),
            ("*/30 2 * * *", vec![]),
        ];
        for (schedule, expected) in rows {
            assert_eq!(times(&timing(schedule, "Europe/Vienna"), from, to), expected, "{schedule}");
        }
    }

    #[test]
    fn a_time_that_comes_twice_in_autumn_is_taken_once_and_each_hour_is_an_hour() {
        let (from, to) = ("2026-10-24T22:30:00Z", "2026-10-25T02:30:00Z");
        let rows =
            [("30 2 * * *", vec!["02:30+02:00"]), ("30 * * * *", vec!["01:30+02:00", "02:30+02:00", "02:30+01:00"])];
        for (schedule, expected) in rows {
            assert_eq!(times(&timing(schedule, "Europe/Vienna"), from, to), expected, "{schedule}");
        }
    }

    #[test]
    fn looking_back_finds_the_times_that_looking_forward_finds() {
        let zones = ["UTC", "Europe/Vienna", "America/New_York", "Australia/Lord_Howe", "Africa/Casablanca"];
        let schedules =
            ["30 2 * * *", "15 1,2,3 * * *", "*/20 * * * *", "0 0 * * 0", "@daily", "0 */2 * * *", "59 1 * * *"];
        for (zone, schedule) in zones.iter().flat_map(|zone| schedules.map(|schedule| (zone, schedule))) {
            let timing = timing(schedule, zone);
            let (mut now, end) = (at("2026-01-01T00:00:00Z"), at("2026-12-31T00:00:00Z"));
            let mut before = None;
            while let Some(next) = timing.next(now).filter(|next| *next < end) {
                assert_eq!(timing.last(next), Some(next), "{zone} {schedule}");
                let just_before = next - SignedDuration::from_secs(1);
                if let Some(before) = before {
                    assert_eq!(timing.last(just_before), Some(before), "{zone} {schedule} before {next}");
                }
                (now, before) = (next, Some(next));
            }
        }
    }

    #[test]
    fn what_cannot_be_followed_is_told_apart() {
        let rows = [
            ("61 * * * *", "UTC", reasons::INVALID_SCHEDULE),
            ("0 0 30 2 *", "UTC", reasons::INVALID_SCHEDULE),
            ("@fortnightly", "UTC", reasons::INVALID_SCHEDULE),
            ("0 0 1 1 * * 2030", "UTC", reasons::INVALID_SCHEDULE),
            ("@daily", "Middle/Earth", reasons::UNKNOWN_TIME_ZONE),
        ];
        for (schedule, zone, reason) in rows {
            assert_eq!(Timing::new(&spec(schedule, zone)).unwrap_err().reason(), reason, "{schedule} {zone}");
        }
    }

    #[test]
    fn the_delay_of_a_vm_is_always_the_same_and_those_of_many_are_spread() {
        let mut spec = spec("@daily", "UTC");
        spec.jitter = Some(Duration::from_secs(3600).into());
        let timing = Timing::new(&spec).unwrap();
        assert_eq!(
            timing.delay("5f0c1e5e-0b5c-4b6e-9d2e-0d5f2b1c7a11"),
            SignedDuration::from_millis(1_042_916),
            "pinned"
        );
        let delays: Vec<_> = (0..600).map(|i| timing.delay(&format!("vm-{i}")).as_secs() / 600).collect();
        for tenth in 0..6 {
            let count = delays.iter().filter(|delay| **delay == tenth).count();
            assert!((60..=140).contains(&count), "{count} of 600 VMs in part {tenth} of 6");
        }
    }
}
