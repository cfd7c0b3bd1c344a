//! Decides what to do about a snapshot that is being deleted. Pure.
//!
//! It asks for less than [`super::plan`] does: neither class nor VM are needed to let go.

use freezeframe_api::SNAPSHOT_FINALIZER;
use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::{ContentPhase, DeletionPolicy, VMSnapshot, VMSnapshotContent};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;

use super::observe::ContentState;
use super::plan::{Action, Plan, Seen, carry_policy, phase, set_policy, was_given_up, write_status};
use super::status::Verdict;

/// Decides.
pub fn plan(snapshot: &VMSnapshot, content: &ContentState, now: Timestamp) -> Plan {
    let ours = snapshot.finalizers().iter().any(|finalizer| finalizer == SNAPSHOT_FINALIZER);
    let actions = match content {
        _ if !ours => vec![],
        ContentState::Absent | ContentState::Foreign => vec![Action::RemoveFinalizer],
        ContentState::Own(content) if content.metadata.deletion_timestamp.is_some() => {
            write_status(snapshot, removing(content), now).into_iter().collect()
        }
        ContentState::Own(content) if snapshot.spec.hold => hold(snapshot, content, now),
        ContentState::Own(content) if keeps_data(snapshot, content) => {
            vec![Action::LeaveContent(content.clone()), Action::RemoveFinalizer]
        }
        ContentState::Own(content) => delete(snapshot, content, now),
    };
    Plan { actions, again: None }
}

/// Whether there is data that is to stay. Before the cut was reported there is none: the snapshot is cancelled.
fn keeps_data(snapshot: &VMSnapshot, content: &VMSnapshotContent) -> bool {
    let policy = snapshot.spec.deletion_policy.unwrap_or(content.spec.deletion_policy);
    let has_data = matches!(phase(content), Some(ContentPhase::Completing | ContentPhase::Ready));
    policy == DeletionPolicy::Retain && has_data && !was_given_up(snapshot)
}

fn hold(snapshot: &VMSnapshot, content: &VMSnapshotContent, now: Timestamp) -> Vec<Action> {
    let message = "The snapshot is kept while spec.hold is true.".to_owned();
    let verdict = Verdict::Deleting { reason: reasons::HELD, message, data_kept: true };
    let mut actions: Vec<Action> = carry_policy(snapshot, content).into_iter().collect();
    actions.extend(write_status(snapshot, verdict, now));
    actions
}

fn delete(snapshot: &VMSnapshot, content: &VMSnapshotContent, now: Timestamp) -> Vec<Action> {
    // The policy first: if the node has reported a cut meanwhile, the server refuses, and all this is thought over.
    let mut actions: Vec<Action> = set_policy(content, DeletionPolicy::Delete).into_iter().collect();
    actions.extend(write_status(snapshot, removing(content), now));
    actions.push(Action::DeleteContent(Seen::new(content)));
    actions
}

fn removing(content: &VMSnapshotContent) -> Verdict<'static> {
    let removed = content.status.as_ref().and_then(|status| find(&status.conditions, types::REMOVED));
    match removed.filter(|condition| condition.reason == reasons::DELETE_FAILED) {
        Some(condition) => {
            Verdict::Deleting { reason: reasons::DELETE_FAILED, message: condition.message.clone(), data_kept: false }
        }
        None => Verdict::Deleting {
            reason: reasons::IN_PROGRESS,
            message: format!("Node {} removes what it made.", content.spec.node_name),
            data_kept: false,
        },
    }
}
