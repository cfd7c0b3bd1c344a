//! What keeps a snapshot from being started. Pure.

use freezeframe_api::PAUSED_ANNOTATION;
use freezeframe_api::conditions::reasons;
use freezeframe_api::v1alpha1::{
    ConsistencyLevel, Fallback, RunState, VMSnapshot, VMSnapshotClass, VMTarget, VMTargetStatus,
};
use kube::ResourceExt as _;

use super::observe::{ClassState, Observed};

/// Why a snapshot can't start yet.
pub struct Obstacle {
    /// A reason of the API.
    pub reason: &'static str,
    /// The reason in words.
    pub message: String,
    /// Whether nothing is missing but its turn.
    pub accepted: bool,
}

impl Obstacle {
    fn missing(reason: &'static str, message: String) -> Self {
        Self { reason, message, accepted: false }
    }
}

/// The class and the VM by which the work order can be given now.
pub fn ready_to_start(observed: &Observed) -> Result<(&VMSnapshotClass, &VMTargetStatus), Obstacle> {
    let class = class_of(&observed.class)?;
    let target = usable_target(&observed.snapshot, observed.target.as_ref())?;
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
        ClassState::Found(class) if is_paused(class) => {
            (reasons::PAUSED, format!("Everything of VMSnapshotClass {} is paused.", class.name_any()))
        }
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

fn is_paused(class: &VMSnapshotClass) -> bool {
    class.annotations().get(PAUSED_ANNOTATION).is_some_and(|value| value == "true")
}

/// The VM as its node has reported it, if the snapshot can be taken of it as it is.
pub fn usable_target<'a>(snapshot: &VMSnapshot, target: Option<&'a VMTarget>) -> Result<&'a VMTargetStatus, Obstacle> {
    let vm = &snapshot.spec.vm_name;
    let Some(target) = target else {
        return Err(Obstacle::missing(reasons::VM_NOT_FOUND, format!("There is no VMTarget {vm} in this namespace.")));
    };
    let message = match target.status.as_ref() {
        None => format!("No node has reported on VM {vm} yet."),
        // Whether a paused VM can be taken depends on the level that is asked for: its node judges that.
        Some(status) if matches!(status.run_state, RunState::Running | RunState::Paused) => return Ok(status),
        Some(status) if status.run_state == RunState::Stopped => match why_not_stopped(snapshot, status) {
            None => return Ok(status),
            Some(why) => format!("VM {vm} doesn't run, {why}."),
        },
        Some(_) => format!("QEMU of VM {vm} doesn't answer."),
    };
    Err(Obstacle::missing(reasons::VM_NOT_RUNNING, message))
}

/// Why a stopped VM's disks can't be taken as they lie. It may be started before the deadline, so the snapshot waits.
fn why_not_stopped(snapshot: &VMSnapshot, target: &VMTargetStatus) -> Option<&'static str> {
    let wanted = &snapshot.spec.consistency;
    if wanted.required != ConsistencyLevel::Crash && wanted.fallback != Fallback::Degrade {
        return Some(
            "and nothing in it can be frozen; required level Crash, or fallback Degrade, would take its disks",
        );
    }
    target.disks.is_empty().then_some("and its disks aren't known")
}
