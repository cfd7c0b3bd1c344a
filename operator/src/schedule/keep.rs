//! Which snapshots of one VM are kept. Pure, and the only place that says that one may go.
//!
//! Grandfather, father, son as restic's `forget` does it: each rule looks at all snapshots by itself, latest first, and
//! takes the first of each of its periods until it has as many as it asks for. The oldest of all counts for every rule that
//! has not got its number, which keeps the history long while it is short of snapshots.

use freezeframe_api::v1alpha1::{Keep, VMSnapshotScheduleSpec};
use k8s_openapi::jiff::tz::TimeZone;
use k8s_openapi::jiff::{Span, Timestamp, Zoned};

/// What a snapshot is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Worth {
    /// Ready at the level that it had to have.
    Good,
    /// Ready below that.
    Unproved,
    /// Failed.
    Failed,
}

/// A snapshot as retention sees it. One that is being taken, or deleted, is none of its business.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its name.
    pub name: String,
    /// Its cut; of one without, its creation.
    pub time: Timestamp,
    /// What it is worth.
    pub worth: Worth,
    /// Reasons to keep it that don't come from the rules: `held`, `restore`, `paused`.
    pub protected: Vec<&'static str>,
}

/// A snapshot and why it is kept; for no reason, it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judged {
    /// The snapshot.
    pub snapshot: Candidate,
    /// Why it is kept.
    pub reasons: Vec<String>,
}

/// The rules of a schedule.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    /// None, or rules that ask for nothing: everything is kept.
    pub keep: Option<&'a Keep>,
    /// Good ones that are kept in any case.
    pub min_healthy: usize,
    /// Failed ones that are kept.
    pub failed_history_limit: usize,
    /// Where days begin.
    pub zone: &'a TimeZone,
}

impl<'a> Rules<'a> {
    /// The rules of that schedule, whose days begin in `zone`.
    #[must_use]
    pub fn of(spec: &'a VMSnapshotScheduleSpec, zone: &'a TimeZone) -> Self {
        let count = |number: i32| usize::try_from(number).unwrap_or(0); // The API takes none below 0.
        Self {
            keep: spec.keep.as_ref(),
            min_healthy: count(spec.min_healthy).max(1),
            failed_history_limit: count(spec.failed_history_limit),
            zone,
        }
    }
}

/// Judges the snapshots of one VM; the answer is in their order in time, latest first.
#[must_use]
pub fn judge(mut candidates: Vec<Candidate>, rules: &Rules<'_>, now: Timestamp) -> Vec<Judged> {
    let rules = &Rules { keep: rules.keep.filter(|keep| asks_for_something(keep)), ..*rules };
    candidates.sort_by(|a, b| (b.time, &b.name).cmp(&(a.time, &a.name)));
    let mut judged: Vec<Judged> = candidates
        .into_iter()
        .map(|snapshot| {
            let reasons = snapshot.protected.iter().map(|reason| (*reason).to_owned()).collect();
            Judged { snapshot, reasons }
        })
        .collect();
    let latest_good = judged.iter().find(|one| one.snapshot.worth == Worth::Good).map(|one| one.snapshot.time);
    let latest_good = latest_good.filter(|_| rules.keep.is_some());
    apply_rules(&mut judged, Worth::Good, None, "", rules, now);
    // What is below its level never displaces a good one, but it is all there is of the time after the last good one.
    apply_rules(&mut judged, Worth::Unproved, latest_good, "unproved ", rules, now);
    keep_latest(&mut judged, Worth::Failed, rules.failed_history_limit, "failed");
    keep_latest(&mut judged, Worth::Good, rules.min_healthy, "minHealthy");
    judged
}

fn apply_rules(
    judged: &mut [Judged],
    worth: Worth,
    after: Option<Timestamp>,
    prefix: &str,
    rules: &Rules<'_>,
    now: Timestamp,
) {
    let counted =
        |one: &&mut Judged| one.snapshot.worth == worth && after.is_none_or(|after| one.snapshot.time > after);
    let mut counted: Vec<&mut Judged> = judged.iter_mut().filter(counted).collect();
    let times: Vec<Zoned> = counted.iter().map(|one| one.snapshot.time.to_zoned(rules.zone.clone())).collect();
    for (index, one) in counted.iter_mut().enumerate() {
        if rules.keep.is_none() {
            one.reasons.push(format!("{prefix}all"));
        } else if rules.keep.is_some_and(|keep| is_within(keep, &times[index], &times, now)) {
            one.reasons.push(format!("{prefix}within"));
        }
    }
    for rule in rules.keep.map(counts).into_iter().flatten() {
        for (index, is_oldest) in rule.chosen(&times) {
            let oldest = if is_oldest { "oldest " } else { "" };
            counted[index].reasons.push(format!("{prefix}{oldest}{}", rule.name));
        }
    }
}

/// One that nothing else keeps is kept by its place among the latest.
fn keep_latest(judged: &mut [Judged], worth: Worth, count: usize, reason: &str) {
    let latest = judged.iter_mut().filter(|one| one.snapshot.worth == worth).take(count);
    for one in latest.filter(|one| one.reasons.is_empty()) {
        one.reasons.push(reason.to_owned());
    }
}

/// A rule that keeps one snapshot of each period.
struct Count {
    name: &'static str,
    wanted: usize,
    period: Period,
}

/// What tells the period of the snapshot with that index and time from the one beside it.
type Period = fn(usize, &Zoned) -> (i64, i64);

fn counts(keep: &Keep) -> Vec<Count> {
    // No `..`: a new rule doesn't compile until it is counted.
    let Keep { last, hourly, daily, weekly, monthly, yearly, within: _ } = keep;
    let rows: [(_, _, Period); 6] = [
        ("last", last, |index, _| (0, i64::try_from(index).unwrap_or(i64::MAX))),
        ("hourly", hourly, |_, time| (day(time), time.hour().into())),
        ("daily", daily, |_, time| (day(time), 0)),
        ("weekly", weekly, |_, time| {
            let week = time.date().iso_week_date();
            (week.year().into(), week.week().into())
        }),
        ("monthly", monthly, |_, time| (time.year().into(), time.month().into())),
        ("yearly", yearly, |_, time| (time.year().into(), 0)),
    ];
    let wanted = |count: &Option<i32>| count.and_then(|count| usize::try_from(count).ok()).unwrap_or(0);
    rows.into_iter().map(|(name, count, period)| Count { name, wanted: wanted(count), period }).collect()
}

/// The API refuses rules that ask for nothing. Where they come by, nobody has asked to have everything removed.
fn asks_for_something(keep: &Keep) -> bool {
    reach(keep).is_some() || counts(keep).iter().any(|count| count.wanted > 0)
}

fn day(time: &Zoned) -> i64 {
    i64::from(time.year()) * 1000 + i64::from(time.day_of_year())
}

impl Count {
    /// The snapshots that this rule keeps, of those with these times, latest first; and whether one is kept only because
    /// it is the oldest.
    fn chosen(&self, times: &[Zoned]) -> Vec<(usize, bool)> {
        let (mut chosen, mut last) = (vec![], None);
        for (index, time) in times.iter().enumerate() {
            let period = Some((self.period)(index, time));
            let is_new = period != last;
            if chosen.len() < self.wanted && (is_new || index + 1 == times.len()) {
                chosen.push((index, !is_new));
                last = period;
            }
        }
        chosen
    }
}

/// Counted from the latest one, so that no history goes while nothing new comes; but not from one whose clock was wrong. A
/// span that can't be read or subtracted reaches back to the beginning.
fn is_within(keep: &Keep, time: &Zoned, all: &[Zoned], now: Timestamp) -> bool {
    let Some(within) = reach(keep) else { return false };
    let latest = all.iter().find(|other| other.timestamp() <= now);
    let start = latest.and_then(|latest| latest.checked_sub(span(within)?).ok());
    start.is_none_or(|start| *time > start)
}

/// How far back `within` reaches. None: it isn't asked for, be it by a span of nothing, which the API refuses.
fn reach(keep: &Keep) -> Option<&str> {
    let is_nothing = |text: &&str| span(text).is_some_and(Span::is_zero);
    keep.within.as_deref().filter(|text| !is_nothing(text))
}

/// restic's form: numbers of years, months, days and hours.
fn span(text: &str) -> Option<Span> {
    let mut span = Span::new();
    for part in text.split_inclusive(|letter: char| !letter.is_ascii_digit()) {
        let unit = part.chars().last()?;
        let count: i64 = part.strip_suffix(unit)?.parse().ok()?; // As is said of one that can't be read.
        span = match unit {
            'y' => span.try_years(count),
            'm' => span.try_months(count),
            'd' => span.try_days(count),
            'h' => span.try_hours(count),
            _ => return None,
        }
        .ok()?;
    }
    Some(span)
}

#[cfg(test)]
mod tests;
