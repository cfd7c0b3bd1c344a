//! The status that follows from what was decided about a restore. Pure.

use freezeframe_api::conditions::{self, condition, find, reasons, types};
use freezeframe_api::names::NodeName;
use freezeframe_api::v1alpha1::{
    RestorePhase, VMRestore, VMRestoreContent, VMRestoreContentStatus, VMRestoreStatus, VMSnapshotContent,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt as _;

use super::order;

/// What was decided about a restore.
#[derive(Clone, Debug)]
pub enum Verdict<'a> {
    /// It can't go on yet.
    Waiting {
        /// A reason of the API.
        reason: &'static str,
        /// The reason in words.
        message: String,
    },
    /// The node gets its work order.
    Ordered {
        /// The work order.
        content: &'a VMRestoreContent,
        /// The content of the snapshot.
        source: &'a VMSnapshotContent,
    },
    /// The node, or the snapshot of before, is at it.
    UnderWay {
        /// The work order.
        content: &'a VMRestoreContent,
        /// At what.
        phase: RestorePhase,
    },
    /// A dry run is over.
    Planned(&'a VMRestoreContent),
    /// Every disk is back.
    Succeeded(&'a VMRestoreContent),
    /// Failed for good.
    Failed {
        /// A reason of the API.
        reason: String,
        /// The reason in words.
        message: String,
        /// The content that says so.
        content: Option<&'a VMRestoreContent>,
    },
    /// At its end already.
    Settled,
    /// Being deleted.
    Deleting(&'a VMRestoreContent),
}

/// The status of the restore under the verdict. Nothing but news makes it differ from the one before.
pub fn status(restore: &VMRestore, verdict: Verdict<'_>, now: Timestamp) -> VMRestoreStatus {
    let (status, generation) = (restore.status.clone().unwrap_or_default(), restore.metadata.generation);
    let mut draft = Draft { status, restore, generation, now };
    draft.status.observed_generation = generation;
    draft.pronounce(verdict);
    draft.status
}

/// How long a node may be silent until that is said. Nothing else comes of it: what a node does that can't be reached
/// isn't known.
const ANSWER_PATIENCE: SignedDuration = SignedDuration::from_mins(5);

fn unanswered(node: &NodeName) -> String {
    format!(
        "Node {node} doesn't answer: does its agent run? The restore waits for it, and others of the VM for this one."
    )
}

struct Draft<'a> {
    status: VMRestoreStatus,
    restore: &'a VMRestore,
    generation: Option<i64>,
    now: Timestamp,
}

impl Draft<'_> {
    fn pronounce(&mut self, verdict: Verdict<'_>) {
        match verdict {
            Verdict::Waiting { reason, message } => {
                self.set(types::ACCEPTED, reason == reasons::QUEUED, reason, message.clone());
                self.proceed(RestorePhase::Pending, reason, message);
            }
            Verdict::Ordered { content, source } => {
                self.status.snapshot_uid = Some(source.spec.vm_snapshot_ref.uid.clone());
                self.set(types::ACCEPTED, true, reasons::ACCEPTED, "The node gets its work order.".into());
                self.under_way(content, RestorePhase::Pending);
            }
            Verdict::UnderWay { content, phase } => self.under_way(content, phase),
            Verdict::Planned(content) => self.planned(content),
            Verdict::Succeeded(content) => self.succeeded(content),
            Verdict::Failed { reason, message, content } => self.failed(&reason, message, content),
            Verdict::Settled => {}
            Verdict::Deleting(content) => self.deleting(content),
        }
    }

    fn under_way(&mut self, content: &VMRestoreContent, phase: RestorePhase) {
        self.carry(content);
        let node = &content.spec.node_name;
        let message = match phase {
            _ if self.is_silent(content, phase) => {
                return self.proceed(phase, reasons::NODE_NOT_RESPONDING, unanswered(node));
            }
            RestorePhase::Stopping => format!("Node {node} sees to it that VM {} doesn't run.", content.spec.vm_name),
            RestorePhase::Saving => {
                let before = order::before_name(self.restore);
                let message = format!("The present state is being kept as VMSnapshot {before}.");
                self.status.pre_restore_snapshot_name = Some(before);
                message
            }
            RestorePhase::Restoring => format!("Node {node} brings the disks back."),
            _ => format!("Node {node} plans the restore."),
        };
        self.proceed(phase, reasons::IN_PROGRESS, message);
    }

    /// Whether the node should have said something and hasn't: since it got the order, or said last that it is at it.
    /// While the state of before is kept it has nothing to say.
    fn is_silent(&self, content: &VMRestoreContent, phase: RestorePhase) -> bool {
        let just_told = phase == RestorePhase::Saving || self.status.phase != phase;
        let reported = content.status.as_ref().and_then(|status| status.last_report_time.as_ref());
        let heard = reported.or(content.metadata.creation_timestamp.as_ref());
        !just_told && heard.is_some_and(|heard| self.now.duration_since(heard.0) > ANSWER_PATIENCE)
    }

    fn planned(&mut self, content: &VMRestoreContent) {
        self.carry(content);
        self.end(RestorePhase::Planned, reasons::PLANNED, "A dry run: `disks` says what would be done.".into());
    }

    fn succeeded(&mut self, content: &VMRestoreContent) {
        self.carry(content);
        let message = match (&content.spec.new_vm, &self.status.pre_restore_snapshot_name) {
            (Some(new_vm), _) => format!("The disks of VM {new_vm} are made; its VMTarget lists them."),
            (None, Some(before)) => format!("VM {} may be started. To undo: restore {before}.", content.spec.vm_name),
            (None, None) => format!("VM {} may be started.", content.spec.vm_name),
        };
        self.status.completion_time.get_or_insert(Time(self.now));
        self.end(RestorePhase::Succeeded, reasons::COMPLETED, message);
    }

    fn end(&mut self, phase: RestorePhase, reason: &str, message: String) {
        self.status.phase = phase;
        self.status.conditions.retain(|condition| condition.type_ != types::STALLED);
        self.set(types::READY, true, reason, message.clone());
        self.status.message = Some(message);
    }

    fn proceed(&mut self, phase: RestorePhase, reason: &str, message: String) {
        self.status.phase = phase;
        self.status.conditions.retain(|condition| condition.type_ != types::STALLED);
        self.set(types::READY, false, reason, message.clone());
        self.status.message = Some(message);
    }

    fn failed(&mut self, reason: &str, message: String, content: Option<&VMRestoreContent>) {
        if let Some(content) = content {
            self.carry(content);
        }
        self.status.phase = RestorePhase::Failed;
        self.set(types::READY, false, reason, message.clone());
        self.set(types::STALLED, true, reason, message.clone());
        self.status.message = Some(message);
    }

    fn deleting(&mut self, content: &VMRestoreContent) {
        let removed = content.status.as_ref().and_then(|status| find(&status.conditions, types::REMOVED));
        let told = removed.filter(|condition| condition.reason == reasons::DELETE_FAILED);
        let node = &content.spec.node_name;
        let waits = self.restore.metadata.deletion_timestamp.as_ref().map(|since| self.now.duration_since(since.0));
        let (reason, message) = match told {
            Some(condition) => (reasons::DELETE_FAILED, condition.message.clone()),
            None if removed.is_none() && waits > Some(ANSWER_PATIENCE) => {
                (reasons::NODE_NOT_RESPONDING, unanswered(node))
            }
            None => (reasons::IN_PROGRESS, format!("Node {node} takes back what isn't finished.")),
        };
        self.status.phase = RestorePhase::Deleting;
        self.set(types::REMOVED, false, reason, message.clone());
        self.status.message = Some(message);
    }

    /// Takes over what the node reports.
    fn carry(&mut self, content: &VMRestoreContent) {
        self.status.content_name = Some(content.name_any());
        self.status.node_name = Some(content.spec.node_name.to_string());
        // No `..`: a new field of a node's report doesn't compile until it is shown to the user, or left out on purpose.
        let VMRestoreContentStatus { observed_generation: _, phase: _, disks, boot, last_report_time: _, conditions } =
            content.status.clone().unwrap_or_default();
        self.status.disks = disks;
        self.status.boot = boot;
        for reported in conditions.into_iter().filter(|condition| condition.type_ == types::ACCEPTED) {
            self.set(&reported.type_, reported.status == "True", &reported.reason, reported.message);
        }
    }

    fn set(&mut self, type_: &str, value: bool, reason: &str, message: String) {
        let new = condition(type_, value, reason, message, self.generation, self.now);
        conditions::set(&mut self.status.conditions, new);
    }
}
