//! Decides what to do about a snapshot that isn't being deleted. Pure: from what was observed and the time of day.

use std::time::Duration;

use freezeframe_api::SNAPSHOT_FINALIZER;
use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::{
    ContentPhase, DeletionPolicy, DiskSnapshotState, Phase, RunState, VMSnapshot, VMSnapshotClass, VMSnapshotContent,
    VMSnapshotStatus, VMTargetStatus,
};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;

use super::observe::{ClassState, ContentState, Observed};
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
    /// Carry a deletion policy to the content.
    SetDeletionPolicy {
        /// The content.
        content: String,
        /// The policy.
        policy: DeletionPolicy,
    },
    /// Have the node undo everything.
    DeleteContent {
        /// The content's name.
        name: String,
        /// Its UID: no other object of that name is meant.
        uid: String,
    },
    /// Let go of the snapshot.
    RemoveFinalizer,
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
    let overdue = reason == reasons::DEADLINE_EXCEEDED;
    match content {
        ContentState::Own(content) if content.metadata.deletion_timestamp.is_some() => {}
        ContentState::Own(content) if overdue && phase(content) != Some(ContentPhase::Failed) => {
            plan.actions.extend(undo_actions(content));
        }
        ContentState::Own(content) => plan.actions.extend(carry_policy(snapshot, content)),
        ContentState::Absent | ContentState::Foreign => {}
    }
    plan
}

fn undo_actions(content: &VMSnapshotContent) -> Vec<Action> {
    let mut actions = vec![];
    if content.spec.deletion_policy != DeletionPolicy::Delete {
        // `Retain` is about the data of a snapshot; what a failed one left is none.
        actions.push(Action::SetDeletionPolicy { content: content.name_any(), policy: DeletionPolicy::Delete });
    }
    actions.push(Action::DeleteContent { name: content.name_any(), uid: content.uid().unwrap_or_default() });
    actions
}

/// There is a work order: what the node makes of it is what the snapshot is.
fn follow(snapshot: &VMSnapshot, content: &VMSnapshotContent, now: Timestamp) -> Plan {
    if content.metadata.deletion_timestamp.is_some() || phase(content) == Some(ContentPhase::Removed) {
        let message = format!("Content {} was deleted though its snapshot wasn't.", content.name_any());
        return fail(snapshot, reasons::CONTENT_LOST, message, now);
    }
    let (verdict, again) = match phase(content) {
        None => {
            let patience = until(order::deadline(snapshot), now) + REPORT_GRACE;
            if overdue(snapshot, now) {
                return give_up(snapshot, content, now);
            }
            (Verdict::Preparing(content), Some(patience))
        }
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

fn overdue(snapshot: &VMSnapshot, now: Timestamp) -> bool {
    now.duration_since(order::deadline(snapshot)).as_secs_f64() >= REPORT_GRACE.as_secs_f64()
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
    let changed = policy != content.spec.deletion_policy && content.metadata.deletion_timestamp.is_none();
    changed.then(|| Action::SetDeletionPolicy { content: content.name_any(), policy })
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

/// Why a snapshot can't start yet.
struct Obstacle {
    reason: &'static str,
    message: String,
    accepted: bool,
}

impl Obstacle {
    fn missing(reason: &'static str, message: String) -> Self {
        Self { reason, message, accepted: false }
    }
}

fn ready_to_start(observed: &Observed) -> Result<(&VMSnapshotClass, &VMTargetStatus), Obstacle> {
    let class = class_of(&observed.class)?;
    let target = running_target(observed)?;
    match &observed.ahead {
        None => Ok((class, target)),
        Some(other) => Err(Obstacle {
            reason: reasons::QUEUED,
            message: format!("Snapshot {other} of the same VM goes first."),
            accepted: true,
        }),
    }
}

fn class_of(class: &ClassState) -> Result<&VMSnapshotClass, Obstacle> {
    let (reason, message) = match class {
        ClassState::Found(class) => return Ok(class),
        ClassState::NotFound(name) => (reasons::CLASS_NOT_FOUND, format!("There is no VMSnapshotClass {name}.")),
        ClassState::NoDefault(0) => {
            (reasons::NO_DEFAULT_CLASS, "No class was named and no VMSnapshotClass is the default one.".into())
        }
        ClassState::NoDefault(count) => (
            reasons::NO_DEFAULT_CLASS,
            format!("No class was named and {count} VMSnapshotClasses claim to be the default one."),
        ),
    };
    Err(Obstacle::missing(reason, message))
}

fn running_target(observed: &Observed) -> Result<&VMTargetStatus, Obstacle> {
    let vm = &observed.snapshot.spec.vm_name;
    let Some(target) = &observed.target else {
        return Err(Obstacle::missing(reasons::VM_NOT_FOUND, format!("There is no VMTarget {vm} in this namespace.")));
    };
    let message = match target.status.as_ref() {
        None => format!("No node has reported on VM {vm} yet."),
        // Whether a paused VM can be taken depends on the level that is asked for: its node judges that.
        Some(status) if matches!(status.run_state, RunState::Running | RunState::Paused) => return Ok(status),
        Some(status) if status.run_state == RunState::Stopped => format!("VM {vm} doesn't run."),
        Some(_) => format!("QEMU of VM {vm} doesn't answer."),
    };
    Err(Obstacle::missing(reasons::VM_NOT_RUNNING, message))
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

fn phase(content: &VMSnapshotContent) -> Option<ContentPhase> {
    content.status.as_ref().and_then(|status| status.phase)
}

fn until(instant: Timestamp, now: Timestamp) -> Duration {
    // An instant in the past is now.
    Duration::try_from(instant.duration_since(now)).unwrap_or_default()
}
