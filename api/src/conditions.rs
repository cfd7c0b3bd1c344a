//! Condition types and reasons of the API, and how a condition is set.
//!
//! `kstatus` reads `Ready` and `Stalled`: `Ready=True` is done, `Stalled=True` is failed for good, all else in progress.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

/// Condition types.
pub mod types {
    /// The request makes sense and its VM and class exist.
    pub const ACCEPTED: &str = "Accepted";
    /// The guest's file systems were frozen over the whole cut, and this was proved.
    pub const QUIESCED: &str = "Quiesced";
    /// The data is complete and verified.
    pub const READY: &str = "Ready";
    /// Failed for good: nothing more will happen by itself (kstatus: Failed).
    pub const STALLED: &str = "Stalled";
    /// From the deletion on. On a content: all that the node made for it is gone, or was left alone on purpose. On a
    /// snapshot: False, and why it isn't gone yet.
    pub const REMOVED: &str = "Removed";
    /// On a schedule: the last snapshot of each VM that ended is good.
    pub const PROTECTED: &str = "Protected";
    /// Space runs out: that for a snapshot's changes, or of the file systems that a target's disks grow on.
    /// Absent until it once did.
    pub const SPACE_LOW: &str = "SpaceLow";
    /// On a target: a disk has more images below its own than its snapshots' classes want, and they can't be merged by
    /// themselves. Absent until it once was so.
    pub const CHAIN_TOO_DEEP: &str = "ChainTooDeep";
    /// On a target: a disk's newest data isn't where the VM's command line leads. Absent until it once wasn't.
    pub const FOLLOW_NEEDED: &str = "FollowNeeded";
    /// On a target: the guest agent answers.
    pub const AGENT_CONNECTED: &str = "AgentConnected";
}

/// Condition reasons.
pub mod reasons {
    /// The VM is to be started with what the disks' `startWith` says.
    pub const NEW_IMAGE: &str = "NewImage";
    /// The VM was started with an image that a layer had been made on, and the layer was left behind.
    pub const NOT_FOLLOWED: &str = "NotFollowed";
    /// The VM's command line leads to its disks' newest data.
    pub const FOLLOWED: &str = "Followed";
    /// A snapshot's image was written to after it was complete.
    pub const SNAPSHOT_OVERWRITTEN: &str = "SnapshotOverwritten";
    /// The request was taken.
    pub const ACCEPTED: &str = "Accepted";
    /// All data is there and verified.
    pub const COMPLETED: &str = "Completed";
    /// Work goes on.
    pub const IN_PROGRESS: &str = "InProgress";
    /// Another snapshot of the same VM goes first.
    pub const QUEUED: &str = "Queued";
    /// No VMTarget of that name in the namespace.
    pub const VM_NOT_FOUND: &str = "VMNotFound";
    /// No QEMU process runs for the VM.
    pub const VM_NOT_RUNNING: &str = "VMNotRunning";
    /// The VM is paused, so its guest agent can't answer.
    pub const VM_PAUSED: &str = "VMPaused";
    /// The VM is in a state in which a snapshot can't be taken (migration, I/O error, a block job of somebody else).
    pub const VM_BUSY: &str = "VMBusy";
    /// The VM, its disks or its QEMU process changed while the snapshot was taken.
    pub const VM_CHANGED: &str = "VMChanged";
    /// The class that the request names doesn't exist.
    pub const CLASS_NOT_FOUND: &str = "ClassNotFound";
    /// No class was named and none, or more than one, is the default.
    pub const NO_DEFAULT_CLASS: &str = "NoDefaultClass";
    /// A driver that the class names is not known to the node's agent.
    pub const UNKNOWN_DRIVER: &str = "UnknownDriver";
    /// A class parameter is unknown or has a value that can't be used.
    pub const INVALID_PARAMETER: &str = "InvalidParameter";
    /// A file that was made for a disk's data isn't there or can't be used.
    pub const INVALID_TARGET: &str = "InvalidTarget";
    /// A disk named in `include`, `exclude` or `targets` doesn't exist.
    pub const DISK_NOT_FOUND: &str = "DiskNotFound";
    /// No driver of the class can take a disk that wasn't excluded.
    pub const DISK_NOT_SUPPORTED: &str = "DiskNotSupported";
    /// Nothing is left to be taken.
    pub const NO_DISKS: &str = "NoDisks";
    /// Not enough free space: for a snapshot, or, on a target, for what the VM writes, so that QEMU stopped it.
    pub const NO_SPACE: &str = "NoSpace";
    /// More is in use than the class finds good.
    pub const SPACE_LOW: &str = "SpaceLow";
    /// There is enough space again.
    pub const ENOUGH_SPACE: &str = "EnoughSpace";
    /// Snapshots need all images of a chain that is too deep.
    pub const NEEDED_BY_SNAPSHOTS: &str = "NeededBySnapshots";
    /// The chain could be shortened, but not now.
    pub const NOT_NOW: &str = "NotNow";
    /// No chain is deeper than it may be, or it is being shortened.
    pub const SHORT_ENOUGH: &str = "ShortEnough";
    /// More changed than the space that was set apart for a snapshot could take: it lost its contents.
    pub const SNAPSHOT_OVERFLOWED: &str = "SnapshotOverflowed";
    /// A target couldn't be prepared.
    pub const PREPARE_FAILED: &str = "PrepareFailed";
    /// The guest agent isn't there or doesn't answer.
    pub const GUEST_AGENT_UNAVAILABLE: &str = "GuestAgentUnavailable";
    /// The guest is frozen already, by somebody else.
    pub const GUEST_ALREADY_FROZEN: &str = "GuestAlreadyFrozen";
    /// The freeze was refused or failed in the guest.
    pub const FREEZE_FAILED: &str = "FreezeFailed";
    /// The freeze didn't end in time.
    pub const FREEZE_TIMED_OUT: &str = "FreezeTimedOut";
    /// The freeze succeeded but covered no file system, or fewer than were named.
    pub const NOTHING_FROZEN: &str = "NothingFrozen";
    /// The thaw count differs from the freeze count, or the hold ended before the cut did.
    pub const WINDOW_BROKEN: &str = "WindowBroken";
    /// The level asked for can't be proved by what is built in.
    pub const LEVEL_NOT_PROVABLE: &str = "LevelNotProvable";
    /// The guard isn't there: without it nothing is frozen.
    pub const GUARD_UNAVAILABLE: &str = "GuardUnavailable";
    /// A thaw of this VM is still owed by the guard.
    pub const THAW_OWED: &str = "ThawOwed";
    /// The cut failed; nothing was taken.
    pub const CUT_FAILED: &str = "CutFailed";
    /// A copy failed after the cut.
    pub const COPY_FAILED: &str = "CopyFailed";
    /// An artifact didn't pass its check.
    pub const VERIFY_FAILED: &str = "VerifyFailed";
    /// The agent was restarted at a point from which the snapshot couldn't be finished.
    pub const AGENT_RESTARTED: &str = "AgentRestarted";
    /// `failureDeadline` passed.
    pub const DEADLINE_EXCEEDED: &str = "DeadlineExceeded";
    /// The snapshot was deleted while it was taken.
    pub const CANCELLED: &str = "Cancelled";
    /// The content of a snapshot is gone though the snapshot isn't.
    pub const CONTENT_LOST: &str = "ContentLost";
    /// The guest was frozen over the whole cut.
    pub const PROVED: &str = "Proved";
    /// The snapshot is crash-consistent, as the request allows.
    pub const DEGRADED: &str = "Degraded";
    /// The request asked for no quiesce.
    pub const NOT_REQUESTED: &str = "NotRequested";
    /// Artifacts were deleted.
    pub const DELETED: &str = "Deleted";
    /// Artifacts were left alone, as `deletionPolicy: Retain` asks.
    pub const RETAINED: &str = "Retained";
    /// Artifacts couldn't be deleted yet; it is tried again.
    pub const DELETE_FAILED: &str = "DeleteFailed";
    /// The VMSnapshot to be restored doesn't exist.
    pub const SNAPSHOT_NOT_FOUND: &str = "SnapshotNotFound";
    /// The VMSnapshot to be restored has no complete data.
    pub const SNAPSHOT_NOT_READY: &str = "SnapshotNotReady";
    /// `confirm` isn't the UID of the VMSnapshot that has the name now.
    pub const NOT_CONFIRMED: &str = "NotConfirmed";
    /// The VM runs, and may not be stopped.
    pub const VM_RUNNING: &str = "VMRunning";
    /// There is a VM of the new one's name already.
    pub const VM_EXISTS: &str = "VMExists";
    /// The state before a restore couldn't be kept.
    pub const PRE_RESTORE_FAILED: &str = "PreRestoreFailed";
    /// A disk couldn't be brought back; the VM is as it was.
    pub const RESTORE_FAILED: &str = "RestoreFailed";
    /// The node that has the work order is silent: what became of it isn't known.
    pub const NODE_NOT_RESPONDING: &str = "NodeNotResponding";
    /// A dry run: nothing was done.
    pub const PLANNED: &str = "Planned";
    /// `hold: true` keeps the snapshot.
    pub const HELD: &str = "Held";
    /// An administrator has stopped everything of the class, by its annotation.
    pub const PAUSED: &str = "Paused";
    /// On a schedule: it is followed.
    pub const SCHEDULED: &str = "Scheduled";
    /// On a schedule: `suspend: true` stops it.
    pub const SUSPENDED: &str = "Suspended";
    /// On a schedule: `schedule` can't be read, or never comes.
    pub const INVALID_SCHEDULE: &str = "InvalidSchedule";
    /// On a schedule: `timeZone` is none that is known.
    pub const UNKNOWN_TIME_ZONE: &str = "UnknownTimeZone";
    /// On a schedule: `selector` can't be read.
    pub const INVALID_SELECTOR: &str = "InvalidSelector";
    /// On a schedule: the last snapshot of a VM failed, couldn't be made, or is below the level that it had to have.
    pub const SNAPSHOT_FAILED: &str = "SnapshotFailed";
    /// On a schedule: a VM has no good snapshot yet.
    pub const NO_SNAPSHOT: &str = "NoSnapshot";
}

/// Sets one condition in `conditions`; `lastTransitionTime` moves only when `status` does.
pub fn set(conditions: &mut Vec<Condition>, mut new: Condition) {
    match conditions.iter_mut().find(|old| old.type_ == new.type_) {
        Some(old) => {
            if old.status == new.status {
                new.last_transition_time = old.last_transition_time.clone();
            }
            *old = new;
        }
        None => conditions.push(new),
    }
}

/// A condition with status `True` or `False`, in transition at `now`.
#[must_use]
pub fn condition(
    type_: &str,
    status: bool,
    reason: &str,
    message: impl Into<String>,
    generation: Option<i64>,
    now: Timestamp,
) -> Condition {
    Condition {
        type_: type_.to_owned(),
        status: if status { "True" } else { "False" }.to_owned(),
        reason: reason.to_owned(),
        message: message.into(),
        observed_generation: generation,
        last_transition_time: Time(now),
    }
}

/// The condition of that type.
#[must_use]
pub fn find<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == type_)
}

/// Whether the condition of that type is there and `True`.
#[must_use]
pub fn is_true(conditions: &[Condition], type_: &str) -> bool {
    find(conditions, type_).is_some_and(|condition| condition.status == "True")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn the_transition_time_moves_only_with_the_status() {
        let mut conditions = vec![];
        set(&mut conditions, condition(types::READY, false, reasons::QUEUED, "", None, at(1)));
        set(&mut conditions, condition(types::READY, false, reasons::IN_PROGRESS, "", None, at(2)));
        assert_eq!(conditions[0].last_transition_time.0, at(1));
        set(&mut conditions, condition(types::READY, true, reasons::COMPLETED, "", None, at(3)));
        assert_eq!((conditions.len(), conditions[0].last_transition_time.0), (1, at(3)));
    }
}
