//! Version `v1alpha1`: one file a kind, and one for each piece that two kinds share.
#![allow(clippy::duplicated_attributes, reason = "every printer column has its own `type_`")]

mod consistency;
mod disks;
mod limits;
mod quiesce;
mod restored;
mod retention;
mod template;
mod verify;
mod vmrestore;
mod vmrestorecontent;
mod vmsnapshot;
mod vmsnapshotclass;
mod vmsnapshotcontent;
mod vmsnapshotschedule;
mod vmtarget;

pub use consistency::{Consistency, ConsistencyEvidence, ConsistencyLevel, Fallback};
pub use disks::{DiskSelection, DiskSnapshot, DiskSnapshotState, DiskTarget, StartWith};
pub use limits::Limits;
pub use quiesce::{Pause, Quiesce};
pub use restored::{
    BootCheck, BootResult, RestoreDirectory, RestoreMode, RestoreVerify, RestoredDisk, RestoredDiskState,
};
pub use retention::{Keep, KeptSnapshot, RetentionPlan};
pub use template::{SnapshotTemplate, TargetSelector};
pub use verify::Verify;
pub use vmrestore::{RestorePhase, RestoreTarget, VMRestore, VMRestoreSpec, VMRestoreStatus};
pub use vmrestorecontent::{
    RestoreContentPhase, RestoreRef, RestoreStep, SnapshotContentRef, VMRestoreContent, VMRestoreContentSpec,
    VMRestoreContentStatus,
};
pub use vmsnapshot::{DeletionPolicy, Phase, VMSnapshot, VMSnapshotSpec, VMSnapshotStatus};
pub use vmsnapshotclass::{ClassDriver, VMSnapshotClass, VMSnapshotClassSpec};
pub use vmsnapshotcontent::{
    ContentPhase, SnapshotRef, VMSnapshotContent, VMSnapshotContentSpec, VMSnapshotContentStatus,
};
pub use vmsnapshotschedule::{
    ConcurrencyPolicy, ScheduleDeletionPolicy, ScheduledVM, VMSnapshotSchedule, VMSnapshotScheduleSpec,
    VMSnapshotScheduleStatus,
};
pub use vmtarget::{
    AgentState, DriverChoice, GuestAgentStatus, RunState, TargetDisk, VMTarget, VMTargetSpec, VMTargetStatus,
};
