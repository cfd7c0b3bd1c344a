//! The rules, as restic and Proxmox publish them. What they say was checked against restic's own policy once, over its 103
//! snapshots and 26 policies of these rules: the same answers.

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn keep(rules: serde_json::Value) -> Keep {
    serde_json::from_value(rules).unwrap()
}

fn good(name: &str, time: Timestamp) -> Candidate {
    Candidate { name: name.to_owned(), time, worth: Worth::Good, protected: vec![] }
}

fn rules<'a>(keep: &'a Keep, zone: &'a TimeZone) -> Rules<'a> {
    Rules { keep: Some(keep), min_healthy: 1, failed_history_limit: 3, zone }
}

/// Times of those that are kept of good snapshots at these times, latest first, with the reasons.
fn kept(times: &[&str], policy: serde_json::Value, zone: &str) -> Vec<String> {
    let (keep, zone) = (keep(policy), TimeZone::get(zone).unwrap());
    let candidates = times.iter().map(|time| good(time, at(time))).collect();
    let judged = judge(candidates, &rules(&keep, &zone), at("2030-01-01T00:00:00Z"));
    let kept = judged.iter().filter(|one| !one.reasons.is_empty());
    kept.map(|one| format!("{}: {}", &one.snapshot.name[..16], one.reasons.join(", "))).collect()
}

const DAYS: [&str; 9] = [
    "2026-03-01T01:00:00Z", // a Sunday
    "2026-03-02T01:00:00Z",
    "2026-03-02T13:00:00Z",
    "2026-03-03T01:00:00Z",
    "2026-03-05T01:00:00Z",
    "2026-03-08T01:00:00Z", // a Sunday
    "2026-03-09T01:00:00Z",
    "2026-03-09T01:40:00Z",
    "2026-03-09T02:10:00Z",
];

#[test]
fn each_rule_keeps_the_latest_of_each_of_its_periods_that_has_any() {
    let rows = [
        (json!({"last": 2}), vec!["2026-03-09T02:10: last", "2026-03-09T01:40: last"]),
        (json!({"hourly": 2}), vec!["2026-03-09T02:10: hourly", "2026-03-09T01:40: hourly"]),
        (
            json!({"daily": 4}),
            vec![
                "2026-03-09T02:10: daily",
                "2026-03-08T01:00: daily",
                "2026-03-05T01:00: daily",
                "2026-03-03T01:00: daily",
            ],
        ),
        // Weeks end on Sunday.
        (json!({"weekly": 2}), vec!["2026-03-09T02:10: weekly", "2026-03-08T01:00: weekly"]),
        (
            json!({"last": 1, "daily": 2, "weekly": 3}),
            vec![
                "2026-03-09T02:10: last, daily, weekly",
                "2026-03-08T01:00: daily, weekly",
                "2026-03-01T01:00: weekly",
            ],
        ),
        // Fewer months than asked for: the oldest of all too.
        (json!({"monthly": 3}), vec!["2026-03-09T02:10: monthly", "2026-03-01T01:00: oldest monthly"]),
        (json!({"yearly": 1}), vec!["2026-03-09T02:10: yearly"]),
        // From the latest one, and the one just that old is not within.
        (
            json!({"within": "1d"}),
            vec!["2026-03-09T02:10: within", "2026-03-09T01:40: within", "2026-03-09T01:00: within"],
        ),
        (
            json!({"within": "1d1h", "last": 1}),
            vec!["2026-03-09T02:10: within, last", "2026-03-09T01:40: within", "2026-03-09T01:00: within"],
        ),
    ];
    for (policy, expected) in rows {
        assert_eq!(kept(&DAYS, policy.clone(), "UTC"), expected, "{policy}");
    }
}

#[test]
fn with_one_rule_and_periods_enough_the_answer_is_that_of_proxmox_too() {
    // Proxmox' `keep-daily 3`: the last three days that have any, the latest of each. With several rules it goes on with
    // older ones where restic counts the same snapshot for more than one rule; and it doesn't keep the oldest of all where
    // there are fewer days, which would leave 02:10 alone here.
    let one_day = ["2026-03-09T01:40:00Z", "2026-03-09T02:10:00Z"];
    let as_restic = ["2026-03-09T02:10: daily", "2026-03-09T01:40: oldest daily"];
    assert_eq!(kept(&one_day, json!({"daily": 3}), "UTC"), as_restic);
    let expected = ["2026-03-09T02:10: daily", "2026-03-08T01:00: daily", "2026-03-05T01:00: daily"];
    assert_eq!(kept(&DAYS, json!({"daily": 3}), "UTC"), expected);
}

#[test]
fn days_and_weeks_begin_at_midnight_of_the_zone() {
    let times = ["2026-03-08T22:30:00Z", "2026-03-08T23:30:00Z", "2026-03-09T10:00:00Z"];
    let one_day_in_vienna = ["2026-03-09T10:00: daily", "2026-03-08T22:30: daily"];
    assert_eq!(kept(&times, json!({"daily": 2}), "Europe/Vienna"), one_day_in_vienna);
    assert_eq!(
        kept(&times, json!({"weekly": 2}), "Europe/Vienna"),
        one_day_in_vienna.map(|row| row.replace("daily", "weekly"))
    );
    let two_days_in_utc = ["2026-03-09T10:00: daily", "2026-03-08T23:30: daily"];
    assert_eq!(kept(&times, json!({"daily": 2}), "UTC"), two_days_in_utc);
}

#[test]
fn the_first_days_of_january_may_belong_to_the_last_week_of_the_year_before() {
    let times = ["2026-12-31T01:00:00Z", "2027-01-01T01:00:00Z", "2027-01-03T01:00:00Z", "2027-01-04T01:00:00Z"];
    let expected = ["2027-01-04T01:00: weekly", "2027-01-03T01:00: weekly"];
    assert_eq!(kept(&times, json!({"weekly": 2}), "UTC"), expected);
}

#[test]
fn a_span_is_of_years_months_days_and_hours_as_restic_writes_it() {
    let latest = "2026-07-31T12:00:00Z";
    // The span, the oldest time that is within it, and the youngest that isn't.
    let rows = [
        ("6m", "2026-01-31T12:00:01Z", "2026-01-31T12:00:00Z"),
        ("1m", "2026-06-30T12:00:01Z", "2026-06-30T12:00:00Z"),
        ("2y", "2024-07-31T12:00:01Z", "2024-07-31T12:00:00Z"),
        ("10d", "2026-07-21T12:00:01Z", "2026-07-21T12:00:00Z"),
        ("36h", "2026-07-30T00:00:01Z", "2026-07-30T00:00:00Z"),
        ("1y2m3d4h", "2025-05-28T08:00:01Z", "2025-05-28T08:00:00Z"),
        ("0y1d", "2026-07-30T12:00:01Z", "2026-07-30T12:00:00Z"),
    ];
    for (within, inside, outside) in rows {
        let found = kept(&[latest, inside, outside], json!({"within": within}), "UTC");
        let expected = [latest, inside].map(|time| format!("{}: within", &time[..16]));
        assert_eq!(found, expected, "{within}");
    }
    for unreadable in ["1w", "1mo", "7", "99999999999999999999d", ""] {
        let found = kept(&[latest, "1970-01-01T00:00:00Z"], json!({"within": unreadable}), "UTC");
        assert_eq!(found.len(), 2, "{unreadable}");
    }
}

#[test]
fn what_is_within_is_counted_from_the_latest_one_that_is_not_in_the_future() {
    let (keep, now) = (keep(json!({"within": "1h"})), at("2026-03-09T03:00:00Z"));
    let times = ["2026-03-09T00:30:00Z", "2026-03-09T01:30:00Z", "2026-03-09T02:00:00Z", "2026-05-01T00:00:00Z"];
    let judged = judge(times.map(|time| good(time, at(time))).into(), &rules(&keep, &TimeZone::UTC), now);
    let gone: Vec<&str> =
        judged.iter().filter(|one| one.reasons.is_empty()).map(|one| one.snapshot.name.as_str()).collect();
    assert_eq!(gone, ["2026-03-09T00:30:00Z"]);
}

fn judged_names(judged: &[Judged]) -> Vec<String> {
    judged.iter().map(|one| format!("{}: {}", one.snapshot.name, one.reasons.join(", "))).collect()
}

#[test]
fn one_below_its_level_displaces_no_good_one_and_stays_until_a_later_good_one_is_there() {
    let row = |name: &str, hour: i64, worth| Candidate {
        name: name.to_owned(),
        time: Timestamp::from_second(hour * 3600).unwrap(),
        worth,
        protected: vec![],
    };
    let keep = keep(json!({"last": 1}));
    let candidates = vec![
        row("good-1", 1, Worth::Good),
        row("unproved-2", 2, Worth::Unproved),
        row("good-3", 3, Worth::Good),
        row("unproved-4", 4, Worth::Unproved),
        row("unproved-5", 5, Worth::Unproved),
    ];
    let judged = judge(candidates, &rules(&keep, &TimeZone::UTC), Timestamp::from_second(6 * 3600).unwrap());
    let expected = ["unproved-5: unproved last", "unproved-4: ", "good-3: last", "unproved-2: ", "good-1: "];
    assert_eq!(judged_names(&judged), expected);
}

#[test]
fn failed_ones_count_for_no_rule_and_have_a_limit_of_their_own() {
    let candidates = (0..6).map(|hour| Candidate {
        name: format!("{hour}"),
        time: Timestamp::from_second(hour * 3600).unwrap(),
        worth: if hour == 0 { Worth::Good } else { Worth::Failed },
        protected: if hour == 1 { vec!["held"] } else { vec![] },
    });
    let (keep, zone) = (keep(json!({"last": 1})), TimeZone::UTC);
    let rules = Rules { failed_history_limit: 2, ..rules(&keep, &zone) };
    let judged = judge(candidates.collect(), &rules, Timestamp::MAX);
    assert_eq!(judged_names(&judged), ["5: failed", "4: failed", "3: ", "2: ", "1: held", "0: last"]);
}

#[test]
fn without_rules_only_failed_ones_go() {
    let zone = TimeZone::UTC;
    let nothing =
        [json!({}), json!({"last": 0, "daily": -1}), json!({"within": "0h"}), json!({"within": "0y0d"})].map(keep);
    for keep in nothing.iter().map(Some).chain([None]) {
        let rules = Rules { keep, min_healthy: 1, failed_history_limit: 0, zone: &zone };
        let candidates = [Worth::Good, Worth::Unproved, Worth::Failed].map(|worth| Candidate {
            name: format!("{worth:?}"),
            time: Timestamp::UNIX_EPOCH,
            worth,
            protected: vec![],
        });
        let judged = judge(candidates.into(), &rules, Timestamp::MAX);
        assert_eq!(judged_names(&judged), ["Unproved: unproved all", "Good: all", "Failed: "], "{keep:?}");
    }
}

fn any_candidate() -> impl Strategy<Value = Candidate> {
    let worth = prop_oneof![3 => Just(Worth::Good), 1 => Just(Worth::Unproved), 1 => Just(Worth::Failed)];
    let protected = prop_oneof![4 => Just(vec![]), 1 => Just(vec!["held"]), 1 => Just(vec!["restore"])];
    // Three years, often with several in an hour.
    let time = prop_oneof![0_i64..94_608_000, 0_i64..7200];
    (time, worth, protected, 0_u32..100).prop_map(|(second, worth, protected, name)| Candidate {
        name: format!("s{name}"),
        time: Timestamp::from_second(1_700_000_000 + second).unwrap(),
        worth,
        protected,
    })
}

fn any_keep() -> impl Strategy<Value = Option<Keep>> {
    let count = || prop::option::of(-1_i32..6);
    let within =
        prop::option::of(prop_oneof![Just("1h"), Just("2d"), Just("1m7d"), Just("999y"), Just("0d"), Just("1w")]);
    let rules = (count(), count(), count(), count(), count(), count(), within).prop_map(
        |(last, hourly, daily, weekly, monthly, yearly, within)| Keep {
            last,
            hourly,
            daily,
            weekly,
            monthly,
            yearly,
            within: within.map(str::to_owned),
        },
    );
    prop::option::of(rules)
}

proptest! {
    #[test]
    fn whatever_the_history_the_last_good_ones_and_what_is_protected_stay(
        candidates in prop::collection::vec(any_candidate(), 0..60),
        keep in any_keep(),
        min_healthy in 1_usize..4,
        failed_history_limit in 0_usize..4,
        now in 1_700_000_000_i64..1_800_000_000,
        zone in prop::sample::select(vec!["UTC", "Europe/Vienna", "Australia/Lord_Howe"]),
    ) {
        let zone = TimeZone::get(zone).unwrap();
        let rules = Rules { keep: keep.as_ref(), min_healthy, failed_history_limit, zone: &zone };
        let judged = judge(candidates.clone(), &rules, Timestamp::from_second(now).unwrap());
        prop_assert_eq!(judged.len(), candidates.len());
        let latest_good = judged.iter().filter(|one| one.snapshot.worth == Worth::Good).take(min_healthy);
        for one in latest_good.chain(judged.iter().filter(|one| !one.snapshot.protected.is_empty())) {
            prop_assert!(!one.reasons.is_empty(), "{:?}", one);
        }
        let newest_unproved = judged.iter().find(|one| one.snapshot.worth != Worth::Failed);
        prop_assert!(newest_unproved.is_none_or(|one| !one.reasons.is_empty()), "the latest data of all goes");
    }

    #[test]
    fn nothing_that_stays_would_go_if_what_goes_were_gone(
        candidates in prop::collection::vec(any_candidate(), 0..60),
        keep in any_keep(),
    ) {
        let zone = TimeZone::UTC;
        let rules = Rules { keep: keep.as_ref(), min_healthy: 1, failed_history_limit: 2, zone: &zone };
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let judged = judge(candidates, &rules, now);
        let stay = judged.iter().filter(|one| !one.reasons.is_empty()).map(|one| one.snapshot.clone()).collect();
        let again = judge(stay, &rules, now);
        prop_assert!(again.iter().all(|one| !one.reasons.is_empty()), "{:?}", again);
    }
}
