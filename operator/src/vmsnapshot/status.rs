//! The status that follows from what was decided about a snapshot. Pure.

use freezeframe_api::conditions::{self, condition, reasons, types};
use freezeframe_api::v1alpha1::{Phase, VMSnapshot, VMSnapshotContent, VMSnapshotContentStatus, VMSnapshotStatus};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;

/// What was decided about a snapshot.
#[derive(Clone, Debug)]
pub enum Verdict<'a> {
    /// It can't start yet.
    Waiting {
        /// A reason of the API.
        reason: &'static str,
        /// The reason in words.
        message: String,
        /// Whether nothing is missing but its turn.
        accepted: bool,
    },
    /// The node has the work order.
    Preparing(&'a VMSnapshotContent),
    /// The cut is done, data is still being copied.
    Completing(&'a VMSnapshotContent),
    /// All data is complete and verified.
    Ready(&'a VMSnapshotContent),
    /// Failed for good.
    Failed {
        /// A reason of the API.
        reason: String,
        /// The reason in words.
        message: String,
        /// The content that says so.
        content: Option<&'a VMSnapshotContent>,
    },
    /// Being deleted.
    Deleting {
        /// A reason of the API: why it isn't gone yet.
        reason: &'static str,
        /// The reason in words.
        message: String,
        /// Whether the data is still whole.
        data_kept: bool,
    },
}

/// The status of the snapshot under the verdict. A condition's transition time moves only with its status, so that
/// nothing but news makes a new status differ from the one before.
pub fn status(snapshot: &VMSnapshot, verdict: Verdict<'_>, now: Timestamp) -> VMSnapshotStatus {
    let mut draft =
        Draft { status: snapshot.status.clone().unwrap_or_default(), generation: snapshot.metadata.generation, now };
    draft.status.observed_generation = draft.generation;
    draft.pronounce(verdict);
    draft.status
}

struct Draft {
    status: VMSnapshotStatus,
    generation: Option<i64>,
    now: Timestamp,
}

impl Draft {
    fn pronounce(&mut self, verdict: Verdict<'_>) {
        match verdict {
            Verdict::Waiting { reason, message, accepted } => self.waiting(reason, message, accepted),
            Verdict::Preparing(content) => {
                self.carry(content);
                let message = format!("Node {} prepares the cut.", content.spec.node_name);
                self.under_way(Phase::Preparing, message);
            }
            Verdict::Completing(content) => {
                self.carry(content);
                let message =
                    said_of_ready(content).unwrap_or_else(|| "The disks are cut; data is being copied.".into());
                self.under_way(Phase::Completing, message);
            }
            Verdict::Ready(content) => self.ready(content),
            Verdict::Failed { reason, message, content } => self.failed(&reason, message, content),
            Verdict::Deleting { reason, message, data_kept } => self.deleting(reason, message, data_kept),
        }
    }

    fn waiting(&mut self, reason: &str, message: String, accepted: bool) {
        if accepted {
            self.set(types::ACCEPTED, true, reasons::ACCEPTED, "The VM runs and the class exists.".into());
        } else {
            self.set(types::ACCEPTED, false, reason, message.clone());
        }
        self.proceed(Phase::Pending, reason, message);
    }

    fn under_way(&mut self, phase: Phase, message: String) {
        self.proceed(phase, reasons::IN_PROGRESS, message);
    }

    fn proceed(&mut self, phase: Phase, reason: &str, message: String) {
        self.status.phase = phase;
        self.status.ready_to_use = false;
        self.status.conditions.retain(|condition| condition.type_ != types::STALLED);
        self.set(types::READY, false, reason, message.clone());
        self.status.message = Some(message);
    }

    fn ready(&mut self, content: &VMSnapshotContent) {
        self.carry(content);
        let message = said_of_ready(content).unwrap_or_else(|| "All data is complete and verified.".into());
        self.status.phase = Phase::Ready;
        self.status.ready_to_use = true;
        self.status.conditions.retain(|condition| condition.type_ != types::STALLED);
        self.set(types::READY, true, reasons::COMPLETED, message.clone());
        self.status.message = Some(message);
    }

    fn failed(&mut self, reason: &str, message: String, content: Option<&VMSnapshotContent>) {
        if let Some(content) = content {
            self.carry(content);
        }
        self.status.phase = Phase::Failed;
        self.status.ready_to_use = false;
        self.set(types::READY, false, reason, message.clone());
        self.set(types::STALLED, true, reason, message.clone());
        self.status.message = Some(message);
    }

    fn deleting(&mut self, reason: &str, message: String, data_kept: bool) {
        self.status.phase = Phase::Deleting;
        self.set(types::REMOVED, false, reason, message.clone());
        if !data_kept {
            self.status.ready_to_use = false;
            self.set(types::READY, false, reasons::DELETED, "The snapshot is being deleted.".into());
        }
        self.status.message = Some(message);
    }

    /// Takes over what the node reports.
    fn carry(&mut self, content: &VMSnapshotContent) {
        self.status.content_name = Some(content.name_any());
        self.status.node_name = Some(content.spec.node_name.to_string());
        self.status.class_name.clone_from(&content.spec.class_name);
        if conditions::find(&self.status.conditions, types::ACCEPTED).is_none_or(|accepted| accepted.status != "True") {
            self.set(types::ACCEPTED, true, reasons::ACCEPTED, "The node has its work order.".into());
        }
        // No `..`: a new field of a node's report doesn't compile until it is shown to the user, or left out on purpose.
        let VMSnapshotContentStatus {
            observed_generation: _,
            phase: _,
            creation_time,
            consistency,
            disks,
            boot,
            conditions,
        } = content.status.clone().unwrap_or_default();
        self.status.creation_time = creation_time;
        self.status.consistency = consistency;
        self.status.disks = disks;
        self.status.boot = boot;
        for reported in conditions
            .into_iter()
            .filter(|c| [types::ACCEPTED, types::QUIESCED, types::SPACE_LOW].contains(&c.type_.as_str()))
        {
            self.set(&reported.type_, reported.status == "True", &reported.reason, reported.message);
        }
    }

    fn set(&mut self, type_: &str, value: bool, reason: &str, message: String) {
        let new = condition(type_, value, reason, message, self.generation, self.now);
        conditions::set(&mut self.status.conditions, new);
    }
}

/// What the node says about the data, if anything.
fn said_of_ready(content: &VMSnapshotContent) -> Option<String> {
    let reported = &content.status.as_ref()?.conditions;
    let message = &conditions::find(reported, types::READY)?.message;
    (!message.is_empty()).then(|| message.clone())
}
