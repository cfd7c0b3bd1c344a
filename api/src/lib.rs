//! The Kubernetes API of Freezeframe, `freezeframe.dev/v1alpha1`: types and constants, no I/O.
//!
//! A [`v1alpha1::VMSnapshot`] is a user's wish. The operator turns it into a [`v1alpha1::VMSnapshotContent`], the work
//! order of one node; the agent of that node answers in the content's status, and the operator carries the answer back.
//! Operators write `spec`, nodes write `status`: the objects hold all state, so either side may restart at any time.

pub mod conditions;
pub mod crds;
pub mod names;
pub mod v1alpha1;

/// API group of every kind.
pub const GROUP: &str = "freezeframe.dev";

/// Finalizer of the operator on a [`v1alpha1::VMSnapshot`]: removed when the content is gone, or stays
/// without it to list what `deletionPolicy: Retain` keeps.
pub const SNAPSHOT_FINALIZER: &str = "freezeframe.dev/snapshot";

/// Finalizer of the operator on a [`v1alpha1::VMSnapshotContent`]: removed when the node reported its
/// artifacts gone, or left alone.
pub const CONTENT_FINALIZER: &str = "freezeframe.dev/content";

/// Finalizer of the operator on a [`v1alpha1::VMRestore`]: removed when the content is gone.
pub const RESTORE_FINALIZER: &str = "freezeframe.dev/restore";

/// Field manager of the operator's writes.
pub const OPERATOR_MANAGER: &str = "freezeframe-operator";

/// Field manager of a node agent's writes.
pub const AGENT_MANAGER: &str = "freezeframe-agent";

/// Annotation that makes a [`v1alpha1::VMSnapshotClass`] the default one, with the value `"true"`.
pub const DEFAULT_CLASS_ANNOTATION: &str = "freezeframe.dev/is-default-class";

/// Label on a content: namespace of its snapshot.
pub const SNAPSHOT_NAMESPACE_LABEL: &str = "freezeframe.dev/snapshot-namespace";

/// Label on a content: name of its snapshot, cut to 63 characters.
pub const SNAPSHOT_NAME_LABEL: &str = "freezeframe.dev/snapshot-name";

/// Label on a content that stays after its snapshot's deletion, with the value `"true"`: it lists what was kept, and is
/// an administrator's to delete.
pub const SNAPSHOT_DELETED_LABEL: &str = "freezeframe.dev/snapshot-deleted";

/// Label on a snapshot that a schedule made: the schedule's name, cut to 63 characters.
pub const SCHEDULE_NAME_LABEL: &str = "freezeframe.dev/schedule";

/// Label on a snapshot that a schedule made: the schedule's UID. By this one, and not by its name, a schedule knows the
/// snapshots that are its own.
pub const SCHEDULE_UID_LABEL: &str = "freezeframe.dev/schedule-uid";

/// Annotation on a snapshot that a schedule made: the time of the schedule that it was made for, in RFC 3339.
pub const SCHEDULED_TIME_ANNOTATION: &str = "freezeframe.dev/scheduled-time";

/// Annotation on a [`v1alpha1::VMSnapshotClass`] that stops everything of that class in an emergency, with the value
/// `"true"`: no snapshot is begun, schedules take none, and retention removes none.
pub const PAUSED_ANNOTATION: &str = "freezeframe.dev/paused";

/// Annotation on a snapshot: UID of the restore that was last begun with it. Written before the work order, so that
/// whoever decided to delete the snapshot by an earlier version of it is refused.
pub const RESTORED_BY_ANNOTATION: &str = "freezeframe.dev/restored-by";

/// Label on a restore's content, and on the snapshot that keeps what it replaced: namespace of the restore.
pub const RESTORE_NAMESPACE_LABEL: &str = "freezeframe.dev/restore-namespace";

/// Label on a restore's content, and on the snapshot that keeps what it replaced: name of the restore, cut to 63
/// characters.
pub const RESTORE_NAME_LABEL: &str = "freezeframe.dev/restore-name";
