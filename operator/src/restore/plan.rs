//! Decides what to do about a restore. Pure: from what was observed and the time of day.

use freezeframe_api::conditions::{find, is_true, reasons, types};
use freezeframe_api::v1alpha1::{
    Phase, RestoreContentPhase, RestoreDirectory, RestorePhase, RestoreStep, SnapshotContentRef, VMRestore,
    VMRestoreContent, VMRestoreStatus, VMSnapshot, VMSnapshotContent,
};
use freezeframe_api::{RESTORE_FINALIZER, RESTORED_BY_ANNOTATION};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;

use super::observe::Observed;
use super::status::{Verdict, status};
use super::{is_settled, order};

/// One write.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Put the operator's finalizer on the restore, before there is anything to clean up.
    AddFinalizer,
    /// Put the restore's mark on the very version of its snapshot that was seen ready: retention that has decided on that
    /// version can't delete it any more, and decides anew with the restore in sight.
    MarkSnapshot(Box<VMSnapshot>),
    /// Give the work order.
    CreateContent(Box<VMRestoreContent>),
    /// Have the VM's present state kept.
    CreateSnapshot(Box<VMSnapshot>),
    /// Let the node go on, from the very version of the content that the decision rests on.
    SetStep {
        /// The content.
        content: Box<VMRestoreContent>,
        /// What to do next.
        step: RestoreStep,
        /// The content that keeps the state of before.
        before: Option<SnapshotContentRef>,
    },
    /// Tell the user.
    WriteStatus(Box<VMRestoreStatus>),
    /// Have the node take back what isn't finished.
    DeleteContent(Box<VMRestoreContent>),
    /// Let go of the content: the node is done with it.
    LetContentGo(Box<VMRestoreContent>),
    /// Let go of the restore.
    RemoveFinalizer,
}

/// Decides.
pub fn plan(observed: &Observed, now: Timestamp) -> Vec<Action> {
    let restore = &observed.restore;
    if restore.metadata.deletion_timestamp.is_some() {
        return clean_up(restore, observed.content.as_ref(), now);
    }
    if is_settled(restore) {
        return leave_settled(restore, observed.content.as_ref(), now);
    }
    match &observed.content {
        None => start(observed, now),
        Some(content) if content.metadata.deletion_timestamp.is_some() => lost(restore, content, now),
        Some(content) => follow(observed, content, now),
    }
}

/// What came to its end stays there. A node that was told to stop half way, because the state of before couldn't be
/// kept, has nothing more to do.
fn leave_settled(restore: &VMRestore, content: Option<&VMRestoreContent>, now: Timestamp) -> Vec<Action> {
    let failed = restore.status.as_ref().is_some_and(|status| status.phase == RestorePhase::Failed);
    let mut actions: Vec<Action> = write(restore, Verdict::Settled, now).into_iter().collect();
    match content {
        Some(content) if content.metadata.deletion_timestamp.is_some() => actions.extend(let_go(content)),
        Some(content) if failed && node_phase(content) != Some(RestoreContentPhase::Failed) => {
            actions.push(Action::DeleteContent(Box::new(content.clone())));
        }
        _ => {}
    }
    actions
}

/// Its content was deleted though the restore wasn't. A node whose disks are changing hands finishes that all the same, so
/// what came of it is known only when the node is done.
fn lost(restore: &VMRestore, content: &VMRestoreContent, now: Timestamp) -> Vec<Action> {
    let phase = content.status.as_ref().and_then(|status| status.phase);
    let mut actions: Vec<Action> = if !is_removed(content) {
        let phase = restore.status.as_ref().map_or(RestorePhase::Pending, |status| status.phase);
        write(restore, Verdict::UnderWay { content, phase }, now).into_iter().collect()
    } else if phase == Some(RestoreContentPhase::Succeeded) {
        write(restore, Verdict::Succeeded(content), now).into_iter().collect()
    } else {
        let message = format!("Content {} was deleted though its restore wasn't.", content.name_any());
        fail(restore, reasons::CONTENT_LOST, message, now)
    };
    actions.extend(let_go(content));
    actions
}

fn is_removed(content: &VMRestoreContent) -> bool {
    content.status.as_ref().is_some_and(|status| is_true(&status.conditions, types::REMOVED))
}

fn let_go(content: &VMRestoreContent) -> Option<Action> {
    (is_removed(content) && !content.finalizers().is_empty()).then(|| Action::LetContentGo(Box::new(content.clone())))
}

/// There is no work order: either one can be given, or something is missing.
fn start(observed: &Observed, now: Timestamp) -> Vec<Action> {
    let restore = &observed.restore;
    if let Some(name) = restore.status.as_ref().and_then(|status| status.content_name.as_ref()) {
        return fail(restore, reasons::CONTENT_LOST, format!("Content {name} is gone."), now);
    }
    match ready_to_start(observed) {
        Ok(source) => {
            let content = order::content(restore, source, observed.class_directory.as_deref());
            let mut actions = vec![];
            if !restore.finalizers().iter().any(|finalizer| finalizer == RESTORE_FINALIZER) {
                actions.push(Action::AddFinalizer);
            }
            actions.extend(mark(observed));
            actions.push(Action::CreateContent(Box::new(content.clone())));
            actions.extend(write(restore, Verdict::Ordered { content: &content, source }, now));
            actions
        }
        Err(Obstacle::Waits(reason, message)) => {
            write(restore, Verdict::Waiting { reason, message }, now).into_iter().collect()
        }
        Err(Obstacle::Fatal(reason, message)) => fail(restore, reason, message, now),
    }
}

/// What keeps a restore from its next step.
enum Obstacle {
    /// It may pass.
    Waits(&'static str, String),
    /// It won't.
    Fatal(&'static str, String),
}

/// None where an earlier try has put it there.
fn mark(observed: &Observed) -> Option<Action> {
    let snapshot = observed.snapshot.as_ref()?;
    let marked = snapshot.annotations().get(RESTORED_BY_ANNOTATION) == observed.restore.metadata.uid.as_ref();
    (!marked).then(|| Action::MarkSnapshot(Box::new(snapshot.clone())))
}

/// The content of the snapshot by which the work order can be given.
fn ready_to_start(observed: &Observed) -> Result<&VMSnapshotContent, Obstacle> {
    let spec = &observed.restore.spec;
    let name = &spec.snapshot_name;
    let Some(snapshot) = &observed.snapshot else {
        let message = format!("There is no VMSnapshot {name} in this namespace.");
        return Err(Obstacle::Waits(reasons::SNAPSHOT_NOT_FOUND, message));
    };
    confirmed(&observed.restore, snapshot)?;
    if let Some(new_vm) = spec.target.new_vm.as_ref().filter(|_| observed.new_vm_exists) {
        return Err(Obstacle::Fatal(reasons::VM_EXISTS, format!("There is a VM {new_vm} in this namespace already.")));
    }
    if spec.target.directory == Some(RestoreDirectory::Class) && observed.class_directory.is_none() {
        let message = format!("The class of VMSnapshot {name} names no restoreDirectory.");
        return Err(Obstacle::Fatal(reasons::INVALID_PARAMETER, message));
    }
    match (snapshot.status.as_ref().map(|status| status.phase), &observed.source) {
        _ if !stays(snapshot, observed.source.as_ref()) => {
            Err(Obstacle::Fatal(reasons::SNAPSHOT_NOT_READY, format!("VMSnapshot {name} is being deleted.")))
        }
        (Some(Phase::Failed), _) => {
            Err(Obstacle::Fatal(reasons::SNAPSHOT_NOT_READY, format!("VMSnapshot {name} failed.")))
        }
        (Some(Phase::Ready | Phase::Deleting), Some(source)) if is_ready(snapshot) => match &observed.ahead {
            None => Ok(source),
            Some(other) => Err(Obstacle::Waits(reasons::QUEUED, format!("Restore {other} of the same VM goes first."))),
        },
        _ => Err(Obstacle::Waits(reasons::SNAPSHOT_NOT_READY, format!("VMSnapshot {name} isn't ready."))),
    }
}

/// Whether the disks may be overwritten by this very snapshot. A dry run, or a new VM, overwrites nothing.
fn confirmed(restore: &VMRestore, snapshot: &VMSnapshot) -> Result<(), Obstacle> {
    let spec = &restore.spec;
    if spec.dry_run || spec.target.new_vm.is_some() || spec.confirm == snapshot.uid() {
        return Ok(());
    }
    let message = format!(
        "VMSnapshot {} has uid {}, which is not the one that confirm names.",
        spec.snapshot_name,
        snapshot.uid().unwrap_or_default(),
    );
    Err(Obstacle::Fatal(reasons::NOT_CONFIRMED, message))
}

/// There is a work order: what the node makes of its present step is what the restore is.
fn follow(observed: &Observed, content: &VMRestoreContent, now: Timestamp) -> Vec<Action> {
    let restore = &observed.restore;
    let told = |phase| write(restore, Verdict::UnderWay { content, phase }, now).into_iter().collect();
    match (content.spec.step, node_phase(content)) {
        (_, Some(RestoreContentPhase::Failed)) => write(restore, reported_failure(content), now).into_iter().collect(),
        (RestoreStep::Plan, _) if !restore.spec.dry_run => make_real(observed, content, now),
        (RestoreStep::Plan, Some(RestoreContentPhase::Planned)) => {
            write(restore, Verdict::Planned(content), now).into_iter().collect()
        }
        (RestoreStep::Plan, _) => told(RestorePhase::Pending),
        (RestoreStep::Stop, Some(RestoreContentPhase::Stopped)) => keep_before(observed, content, now),
        (RestoreStep::Stop, _) => told(RestorePhase::Stopping),
        (RestoreStep::Restore, Some(RestoreContentPhase::Succeeded)) => {
            write(restore, Verdict::Succeeded(content), now).into_iter().collect()
        }
        (RestoreStep::Restore, _) => told(RestorePhase::Restoring),
    }
}

/// A dry run that is one no more. The snapshot may have changed since: all is asked again.
fn make_real(observed: &Observed, content: &VMRestoreContent, now: Timestamp) -> Vec<Action> {
    let restore = &observed.restore;
    match ready_to_start(observed) {
        Ok(source) if order::reference(source) == content.spec.source => {
            vec![set_step(content, order::first_step(&restore.spec), None)]
        }
        Ok(_) => {
            let message = format!("VMSnapshot {} is another than the plan was for.", restore.spec.snapshot_name);
            fail(restore, reasons::NOT_CONFIRMED, message, now)
        }
        Err(Obstacle::Waits(reason, message)) => {
            write(restore, Verdict::Waiting { reason, message }, now).into_iter().collect()
        }
        Err(Obstacle::Fatal(reason, message)) => fail(restore, reason, message, now),
    }
}

/// The VM is at rest: what is about to be replaced is kept first.
fn keep_before(observed: &Observed, content: &VMRestoreContent, now: Timestamp) -> Vec<Action> {
    let restore = &observed.restore;
    let saving = || write(restore, Verdict::UnderWay { content, phase: RestorePhase::Saving }, now);
    let Some((before, before_content)) = &observed.before else {
        let Some(source) = &observed.snapshot else {
            let message = format!("VMSnapshot {} is gone.", restore.spec.snapshot_name);
            return fail(restore, reasons::SNAPSHOT_NOT_FOUND, message, now);
        };
        let mut actions = vec![Action::CreateSnapshot(Box::new(order::before(restore, source, content)))];
        actions.extend(saving());
        return actions;
    };
    let going = |metadata: &ObjectMeta| metadata.deletion_timestamp.is_some();
    let kept_goes = before_content.as_ref().is_some_and(|kept| going(&kept.metadata));
    match (before.status.as_ref().map(|status| status.phase), before_content) {
        _ if going(&before.metadata) || kept_goes => {
            let message = format!("VMSnapshot {}, which keeps the present state, is being deleted.", before.name_any());
            fail(restore, reasons::PRE_RESTORE_FAILED, message, now)
        }
        (Some(Phase::Ready), Some(_)) if !source_stays(observed, content) => {
            let message = format!("VMSnapshot {} is gone, or is being deleted.", restore.spec.snapshot_name);
            fail(restore, reasons::SNAPSHOT_NOT_READY, message, now)
        }
        (Some(Phase::Ready), Some(kept)) => vec![set_step(content, RestoreStep::Restore, Some(order::reference(kept)))],
        (Some(Phase::Failed | Phase::Deleting), _) => {
            let why = before.status.as_ref().and_then(|status| status.message.clone()).unwrap_or_default();
            let message = format!("The present state couldn't be kept as VMSnapshot {}: {why}", before.name_any());
            fail(restore, reasons::PRE_RESTORE_FAILED, message, now)
        }
        _ => saving().into_iter().collect(),
    }
}

/// Whether the snapshot of the work order is still there to be brought back.
fn source_stays(observed: &Observed, content: &VMRestoreContent) -> bool {
    let Some(source) = &observed.source else { return false };
    order::reference(source) == content.spec.source
        && observed.snapshot.as_ref().is_some_and(|snapshot| stays(snapshot, Some(source)))
}

/// Whether nobody takes the snapshot's data away. One that was deleted while it is held has all of it.
fn stays(snapshot: &VMSnapshot, source: Option<&VMSnapshotContent>) -> bool {
    let is_going = |metadata: &ObjectMeta| metadata.deletion_timestamp.is_some();
    (!is_going(&snapshot.metadata) || snapshot.spec.hold) && source.is_none_or(|source| !is_going(&source.metadata))
}

fn is_ready(snapshot: &VMSnapshot) -> bool {
    snapshot.status.as_ref().is_some_and(|status| status.phase == Phase::Ready || status.ready_to_use)
}

fn set_step(content: &VMRestoreContent, step: RestoreStep, before: Option<SnapshotContentRef>) -> Action {
    Action::SetStep { content: Box::new(content.clone()), step, before }
}

/// Lets go of a restore that is being deleted, once its node has taken back what isn't finished.
fn clean_up(restore: &VMRestore, content: Option<&VMRestoreContent>, now: Timestamp) -> Vec<Action> {
    let ours = restore.finalizers().iter().any(|finalizer| finalizer == RESTORE_FINALIZER);
    match content {
        _ if !ours => vec![],
        None => vec![Action::RemoveFinalizer],
        Some(content) => {
            let mut actions: Vec<Action> = write(restore, Verdict::Deleting(content), now).into_iter().collect();
            if content.metadata.deletion_timestamp.is_none() {
                actions.push(Action::DeleteContent(Box::new(content.clone())));
            }
            actions.extend(let_go(content));
            actions
        }
    }
}

/// How far the node is with the present step; what it said of an earlier one counts no more.
pub fn node_phase(content: &VMRestoreContent) -> Option<RestoreContentPhase> {
    let status = content.status.as_ref()?;
    (status.observed_generation == content.metadata.generation).then_some(status.phase)?
}

fn reported_failure(content: &VMRestoreContent) -> Verdict<'_> {
    let reported = content.status.as_ref().and_then(|status| find(&status.conditions, types::READY));
    Verdict::Failed {
        reason: reported.map_or(reasons::RESTORE_FAILED, |condition| &condition.reason).to_owned(),
        message: reported.map_or("The node gave no reason.", |condition| &condition.message).to_owned(),
        content: Some(content),
    }
}

fn fail(restore: &VMRestore, reason: &str, message: String, now: Timestamp) -> Vec<Action> {
    let verdict = Verdict::Failed { reason: reason.to_owned(), message, content: None };
    write(restore, verdict, now).into_iter().collect()
}

/// The write of a status, unless it says nothing new.
fn write(restore: &VMRestore, verdict: Verdict<'_>, now: Timestamp) -> Option<Action> {
    let new = status(restore, verdict, now);
    (restore.status.as_ref() != Some(&new)).then(|| Action::WriteStatus(Box::new(new)))
}
