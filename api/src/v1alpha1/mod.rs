//! Version `v1alpha1`: one file a kind, and one for each piece that two kinds share.
#![allow(clippy::duplicated_attributes, reason = "every printer column has its own `type_`")]

mod consistency;
mod disks;
mod limits;
mod quiesce;
mod verify;
mod vmsnapshot;
mod vmsnapshotclass;
mod vmsnapshotcontent;
mod vmtarget;

pub use consistency::{Consistency, ConsistencyEvidence, ConsistencyLevel, Fallback};
pub use disks::{DiskSelection, DiskSnapshot, DiskSnapshotState};
pub use limits::Limits;
pub use quiesce::{Pause, Quiesce};
pub use verify::Verify;
pub use vmsnapshot::{DeletionPolicy, Phase, VMSnapshot, VMSnapshotSpec, VMSnapshotStatus};
pub use vmsnapshotclass::{ClassDriver, VMSnapshotClass, VMSnapshotClassSpec};
pub use vmsnapshotcontent::{
    ContentPhase, SnapshotRef, VMSnapshotContent, VMSnapshotContentSpec, VMSnapshotContentStatus,
};
pub use vmtarget::{
    AgentState, DriverChoice, GuestAgentStatus, RunState, TargetDisk, VMTarget, VMTargetSpec, VMTargetStatus,
};
