//! Who goes first among the snapshots of one VM. Pure.
//!
//! The node's agent serialises the sessions of a VM in any case. This queue gives them the order of creation and lets
//! a user see what a snapshot waits for. A node that the VM has left, dead or not, has no session with it any more; where
//! VM and node come back, the node's work counts again, and its agent takes one after the other.

use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::{ContentPhase, Phase, VMSnapshot, VMSnapshotContent, VMTarget};
use kube::ResourceExt as _;

use super::obstacle::usable_target;

/// One snapshot of a VM, with its content where there is one.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// The snapshot.
    pub snapshot: &'a VMSnapshot,
    /// Its content.
    pub content: Option<&'a VMSnapshotContent>,
}

/// The snapshot just before `own` among those of `entries` that go first; `own` itself may be among them. `target` is the
/// VM, if it is known.
pub fn ahead<'a>(own: &VMSnapshot, entries: &[Entry<'a>], target: Option<&VMTarget>) -> Option<&'a VMSnapshot> {
    entries
        .iter()
        .filter(|entry| entry.snapshot.uid() != own.uid() && same_vm(own, entry.snapshot))
        .filter(|entry| in_session(entry, target) || waits_in_line(entry, target) && order(entry.snapshot) < order(own))
        .map(|entry| entry.snapshot)
        .max_by_key(|snapshot| order(snapshot))
}

/// Whether two snapshots are of the same VM.
#[must_use]
pub fn same_vm(a: &VMSnapshot, b: &VMSnapshot) -> bool {
    a.spec.vm_name == b.spec.vm_name && a.namespace() == b.namespace()
}

/// Whether the snapshot needs no more of the VM's time, so that the next one may start.
#[must_use]
pub fn is_settled(snapshot: &VMSnapshot) -> bool {
    snapshot.status.as_ref().is_some_and(|status| matches!(status.phase, Phase::Ready | Phase::Failed))
}

/// Whether the snapshot lets all others of its VM pass, as far as it shows itself; it may do so no more tomorrow.
#[must_use]
pub fn keeps_nobody_waiting(snapshot: &VMSnapshot) -> bool {
    is_settled(snapshot) || snapshot.metadata.deletion_timestamp.is_some() || lacks_class(snapshot)
}

/// The VM's node works for it. That of a deleted snapshot is still to be cancelled; what a settled one leaves behind is
/// merged by the node whenever the VM has time, and keeps nobody waiting.
fn in_session(entry: &Entry<'_>, target: Option<&VMTarget>) -> bool {
    let node = target.and_then(|target| target.status.as_ref()).map(|status| &status.node_name);
    let unfinished = |content: &VMSnapshotContent| {
        let phase = content.status.as_ref().and_then(|status| status.phase);
        matches!(phase, None | Some(ContentPhase::Completing))
            && node.is_none_or(|node| *node == content.spec.node_name)
    };
    !is_settled(entry.snapshot) && entry.content.is_some_and(unfinished)
}

/// It would start if it were its turn. One that waits for the VM to run keeps none waiting that takes it stopped.
fn waits_in_line(entry: &Entry<'_>, target: Option<&VMTarget>) -> bool {
    entry.content.is_none() && !keeps_nobody_waiting(entry.snapshot) && usable_target(entry.snapshot, target).is_ok()
}

/// One without a class, or with one that is paused, can't start, and would block its followers until its deadline.
fn lacks_class(snapshot: &VMSnapshot) -> bool {
    let accepted = snapshot.status.as_ref().and_then(|status| find(&status.conditions, types::ACCEPTED));
    accepted.is_some_and(|condition| {
        [reasons::CLASS_NOT_FOUND, reasons::NO_DEFAULT_CLASS, reasons::PAUSED].contains(&condition.reason.as_str())
    })
}

fn order(snapshot: &VMSnapshot) -> (Option<k8s_openapi::jiff::Timestamp>, &str) {
    let created = snapshot.metadata.creation_timestamp.as_ref().map(|time| time.0);
    (created, snapshot.metadata.uid.as_deref().unwrap_or_default())
}
