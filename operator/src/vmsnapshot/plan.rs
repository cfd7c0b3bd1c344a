//! Decides what to do about a snapshot that isn't being deleted. Pure: from what was observed and the time of day.

use std::time::Duration;

use freezeframe_api::SNAPSHOT_FINALIZER;
use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::{
    ContentPhase, DeletionPolicy, DiskSnapshotState, Phase, VMSnapshot, VMSnapshotContent, VMSnapshotStatus,
};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;

use super::observe::{ContentState, Observed};
use super::obstacle::{Obstacle, ready_to_start};
use super::order;
use super::status::{Verdict, status};

/// How long after the deadline a node may still report: it starts nothing then, but a cut made in time counts.
pub const REPORT_GRACE: Duration = Duration::from_secs(10);

/// What to do, in this order, and when to look again if nothing changes before.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// The writes.
    pub actions: Vec<Action>,
    /// How long until the mere passing of time changes the decision. None: never.
    pub again: Option<Duration>,
}

/// One write.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Put the operator's finalizer on the snapshot, before there is anything to clean up.
    AddFinalizer,
    /// Give the work order.
    CreateContent(Box<VMSnapshotContent>),
    /// Tell the user.
    WriteStatus(Box<VMSnapshotStatus>),
    /// Carry a deletion policy to the content, unless it is another one than the decision rests on.
    SetDeletionPolicy {
        /// The content.
        content: Seen,
        /// The policy.
        policy: DeletionPolicy,
    },
    /// Have the node undo everything.
    DeleteContent(Seen),
    /// Let the content outlive its snapshot: it lists what is kept.
    LeaveContent(Box<VMSnapshotContent>),
    /// Let go of the snapshot.
    RemoveFinalizer,
}

/// The content that a decision rests on. No other object of its name is meant, and no later version where that matters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: Option<String>,
    /// Its resource version.
    pub version: Option<String>,
}

impl Seen {
    /// The content as it is seen here.
    pub fn new(content: &VMSnapshotContent) -> Self {
        Self { name: content.name_any(), uid: content.uid(), version: content.resource_version() }
    }
}

/// Decides.
pub fn plan(observed: &Observed, now: Timestamp) -> Plan {
    if observed.snapshot.status.as_ref().is_some_and(|status| status.phase == Phase::Failed) {
        return stay_failed(&observed.snapshot, &observed.content, now);
    }
    match &observed.content {
        ContentState::Own(content) => follow(&observed.snapshot, content, now),
        ContentState::Foreign => {
            let message = "Another snapshot's content has the name that this one's would have.";
            fail(&observed.snapshot, reasons::PREPARE_FAILED, message.to_owned(), now)
        }
        ContentState::Absent => start(observed, now),
    }
}

/// What failed stays failed. A node that was given up on is told to undo what it may have done; after any other failure
/// it did so by itself, and what it reports as whole is nobody's to delete on the word of a status.
fn stay_failed(snapshot: &VMSnapshot, content: &ContentState, now: Timestamp) -> Plan {
    let told = snapshot.status.as_ref().and_then(|status| find(&status.conditions, types::READY));
    let reason = told.map_or(reasons::CUT_FAILED, |condition| &condition.reason);
    let message = told.map_or(String::new(), |condition| condition.message.clone());
    let mut plan = fail(snapshot, reason, message, now);
    match content {
        ContentState::Own(content) if content.metadata.deletion_timestamp.is_some() => {}
        ContentState::Own(content) if was_given_up(snapshot) && phase(content) != Some(ContentPhase::Failed) => {
            plan.actions.extend(undo_actions(content));
        }
        ContentState::Own(content) => plan.actions.extend(carry_policy(snapshot, content)),
        ContentState::Absent | ContentState::Foreign => {}
    }
    plan
}

/// `Retain` is about the data of a snapshot; what a failed or cancelled one left is none.
fn undo_actions(content: &VMSnapshotContent) -> Vec<Action> {
    let mut actions: Vec<Action> = set_policy(content, DeletionPolicy::Delete).into_iter().collect();
    actions.push(Action::DeleteContent(Seen::new(content)));
    actions
}

/// There is a work order: what the node makes of it is what the snapshot is.
fn follow(snapshot: &VMSnapshot, content: &VMSnapshotContent, now: Timestamp) -> Plan {
    if content.metadata.deletion_timestamp.is_some() || phase(content) == Some(ContentPhase::Removed) {
        let message = format!("Content {} was deleted though its snapshot wasn't.", content.name_any());
        return fail(snapshot, reasons::CONTENT_LOST, message, now);
    }
    let (verdict, again) = match phase(content) {
        None if is_overdue(snapshot, content, now) => return give_up(snapshot, content, now),
        None => (Verdict::Preparing(content), Some(until(order::deadline(snapshot), now) + REPORT_GRACE)),
        Some(ContentPhase::Ready) if is_whole(content) => (Verdict::Ready(content), None),
        Some(ContentPhase::Completing | ContentPhase::Ready) => (Verdict::Completing(content), None),
        Some(ContentPhase::Failed | ContentPhase::Removed) => (reported_failure(content), None),
    };
    let mut actions: Vec<Action> = carry_policy(snapshot, content).into_iter().collect();
    actions.extend(write_status(snapshot, verdict, now));
    Plan { actions, again }
}

/// Nobody may call a snapshot ready with a disk that isn't, be it the node.
fn is_whole(content: &VMSnapshotContent) -> bool {
    let disks = content.status.as_ref().map_or(&[][..], |status| &status.disks);
    !disks.is_empty() && disks.iter().all(|disk| disk.state == DiskSnapshotState::Ready)
}

/// Whether the node has reported nothing, and has had its time for it.
pub fn is_overdue(snapshot: &VMSnapshot, content: &VMSnapshotContent, now: Timestamp) -> bool {
    let late = now.duration_since(order::deadline(snapshot)).as_secs_f64();
    phase(content).is_none() && late >= REPORT_GRACE.as_secs_f64()
}

fn give_up(snapshot: &VMSnapshot, content: &VMSnapshotContent, now: Timestamp) -> Plan {
    let node = &content.spec.node_name;
    let message = format!("Node {node} reported no cut within {}.", snapshot.spec.failure_deadline);
    let mut plan = fail(snapshot, reasons::DEADLINE_EXCEEDED, message, now);
    // The verdict is written first: after a crash in between it is still known why the content has to go.
    plan.actions.extend(undo_actions(content));
    plan
}

fn reported_failure(content: &VMSnapshotContent) -> Verdict<'_> {
    let reported = content.status.as_ref().and_then(|status| find(&status.conditions, types::READY));
    Verdict::Failed {
        reason: reported.map_or(reasons::CUT_FAILED, |condition| &condition.reason).to_owned(),
        message: reported.map_or("The node gave no reason.", |condition| &condition.message).to_owned(),
        content: Some(content),
    }
}

/// The user may change a snapshot's policy at any time. Without one the content keeps what its class said at first.
pub fn carry_policy(snapshot: &VMSnapshot, content: &VMSnapshotContent) -> Option<Action> {
    let policy = snapshot.spec.deletion_policy?;
    set_policy(content, policy).filter(|_| content.metadata.deletion_timestamp.is_none())
}

/// The change of the content's policy, unless it is that already.
pub fn set_policy(content: &VMSnapshotContent, policy: DeletionPolicy) -> Option<Action> {
    let changed = policy != content.spec.deletion_policy;
    changed.then(|| Action::SetDeletionPolicy { content: Seen::new(content), policy })
}

/// Whether the snapshot failed because its node reported nothing in time: what the node reports later is undone.
pub fn was_given_up(snapshot: &VMSnapshot) -> bool {
    let stalled = snapshot.status.as_ref().and_then(|status| find(&status.conditions, types::STALLED));
    stalled.is_some_and(|condition| condition.status == "True" && condition.reason == reasons::DEADLINE_EXCEEDED)
}

/// There is no work order: either one can be given, or something is missing.
fn start(observed: &Observed, now: Timestamp) -> Plan {
    let snapshot = &*observed.snapshot;
    if let Some(name) = snapshot.status.as_ref().and_then(|status| status.content_name.as_ref()) {
        return fail(snapshot, reasons::CONTENT_LOST, format!("Content {name} is gone."), now);
    }
    match ready_to_start(observed) {
        _ if now >= order::deadline(snapshot) => {
            let limit = snapshot.spec.failure_deadline;
            let message = match ready_to_start(observed) {
                Ok(_) => format!("The cut was not begun within {limit}."),
                Err(obstacle) => format!("{} That was so until the failureDeadline of {limit}.", obstacle.message),
            };
            fail(snapshot, reasons::DEADLINE_EXCEEDED, message, now)
        }
        Ok((class, target)) => give_order(snapshot, &order::content(snapshot, class, &target.node_name), now),
        Err(Obstacle { reason, message, accepted }) => Plan {
            actions: write_status(snapshot, Verdict::Waiting { reason, message, accepted }, now).into_iter().collect(),
            again: Some(until(order::deadline(snapshot), now)),
        },
    }
}

fn give_order(snapshot: &VMSnapshot, content: &VMSnapshotContent, now: Timestamp) -> Plan {
    let mut actions = vec![];
    if !snapshot.finalizers().iter().any(|finalizer| finalizer == SNAPSHOT_FINALIZER) {
        actions.push(Action::AddFinalizer);
    }
    actions.push(Action::CreateContent(Box::new(content.clone())));
    actions.extend(write_status(snapshot, Verdict::Preparing(content), now));
    Plan { actions, again: Some(until(order::deadline(snapshot), now) + REPORT_GRACE) }
}

fn fail(snapshot: &VMSnapshot, reason: &str, message: String, now: Timestamp) -> Plan {
    let verdict = Verdict::Failed { reason: reason.to_owned(), message, content: None };
    Plan { actions: write_status(snapshot, verdict, now).into_iter().collect(), again: None }
}

/// The write of a status, unless it says nothing new.
pub fn write_status(snapshot: &VMSnapshot, verdict: Verdict<'_>, now: Timestamp) -> Option<Action> {
    let new = status(snapshot, verdict, now);
    (snapshot.status.as_ref() != Some(&new)).then(|| Action::WriteStatus(Box::new(new)))
}

/// How far the node is.
pub fn phase(content: &VMSnapshotContent) -> Option<ContentPhase> {
    content.status.as_ref().and_then(|status| status.phase)
}

fn until(instant: Timestamp, now: Timestamp) -> Duration {
    // An instant in the past is now.
    Duration::try_from(instant.duration_since(now)).unwrap_or_default()
}
