//! What retention makes of all the snapshots of a schedule, by the rules of [`super::keep`]. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use freezeframe_api::v1alpha1::{Phase, VMSnapshot};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;

use super::keep::{Candidate, Judged, Rules, Worth, judge};
use super::observe::{Classes, Observed};
use super::timing::Timing;

/// What retention makes of each VM's snapshots: now, and when the next snapshot is there.
pub type Judgements = BTreeMap<String, (Vec<Judged>, Vec<Judged>)>;

/// Whether it is still being taken. One that is being deleted keeps nobody waiting.
pub fn is_active(snapshot: &VMSnapshot) -> bool {
    snapshot.metadata.deletion_timestamp.is_none() && worth(snapshot).is_none()
}

/// What a snapshot is worth; None while it is being taken, or deleted.
pub fn worth(snapshot: &VMSnapshot) -> Option<Worth> {
    let Some(status) = &snapshot.status else { return None };
    match status.phase {
        Phase::Failed => Some(Worth::Failed),
        Phase::Ready => {
            let proved = status.consistency.as_ref().map(|evidence| evidence.level);
            let is_enough = proved.is_some_and(|level| level >= snapshot.spec.consistency.required);
            Some(if is_enough { Worth::Good } else { Worth::Unproved })
        }
        Phase::Pending | Phase::Preparing | Phase::Cutting | Phase::Completing | Phase::Deleting => None,
    }
}

/// Why nobody may remove it, whatever the rules say.
pub fn protection(snapshot: &VMSnapshot, restored: &BTreeSet<String>, classes: &Classes) -> Vec<&'static str> {
    let rows = [
        ("held", snapshot.spec.hold),
        ("restore", restored.contains(&snapshot.name_any())),
        ("paused", classes.pause(snapshot)),
    ];
    rows.into_iter().filter(|(_, applies)| *applies).map(|(reason, _)| reason).collect()
}

/// What retention makes of all snapshots of the schedule. The next one is taken to be good.
pub fn judgements(observed: &Observed, timing: &Timing, next: Timestamp, now: Timestamp) -> Judgements {
    let mut of_vms: BTreeMap<String, Vec<Candidate>> = BTreeMap::new();
    for snapshot in &observed.snapshots {
        of_vms.entry(snapshot.spec.vm_name.clone()).or_default().extend(candidate(snapshot, observed));
    }
    let rules = Rules::of(&observed.schedule.spec, timing.zone());
    let judge_both = |(vm, candidates): (String, Vec<Candidate>)| {
        let to_come = Candidate { name: String::new(), time: next, worth: Worth::Good, protected: vec![] };
        let then = candidates.iter().cloned().chain([to_come]).collect();
        (vm, (judge(candidates, &rules, now), judge(then, &rules, next)))
    };
    of_vms.into_iter().map(judge_both).collect()
}

fn candidate(snapshot: &VMSnapshot, observed: &Observed) -> Option<Candidate> {
    let worth = worth(snapshot).filter(|_| snapshot.metadata.deletion_timestamp.is_none())?;
    Some(Candidate {
        name: snapshot.name_any(),
        time: time(snapshot),
        worth,
        protected: protection(snapshot, &observed.restored, &observed.classes),
    })
}

/// Its cut, no earlier and no later than the API server's clock allows: one that a node with a slow clock has dated back
/// would be the oldest, and the first to go.
fn time(snapshot: &VMSnapshot) -> Timestamp {
    let created = snapshot.creation_timestamp().map(|time| time.0);
    let cut = snapshot.status.as_ref().and_then(|status| status.creation_time.as_ref()).map(|time| time.0);
    match (cut, created) {
        (Some(cut), Some(created)) => {
            let limit = Duration::from(snapshot.spec.failure_deadline);
            cut.clamp(created, created.checked_add(limit).unwrap_or(Timestamp::MAX))
        }
        (cut, created) => cut.or(created).unwrap_or(Timestamp::UNIX_EPOCH),
    }
}

/// Names of those that go.
pub fn removed(judged: &[Judged]) -> impl Iterator<Item = &String> {
    judged.iter().filter(|one| one.reasons.is_empty()).map(|one| &one.snapshot.name)
}
