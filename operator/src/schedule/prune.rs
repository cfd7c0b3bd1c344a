//! Removes the snapshots that no rule keeps. What a cache says is never reason enough: it may be minutes old.
//!
//! Schedule, snapshots, restores and classes are read anew from the server, by quorum; the decision is made again on that;
//! what was decided both times is deleted, and only in the version that was just read. A restore that is created between
//! the two puts its mark on its snapshot before anything is done, so that the version is another one.

use std::collections::BTreeSet;
use std::sync::Arc;

use freezeframe_api::SCHEDULE_UID_LABEL;
use freezeframe_api::v1alpha1::{RestorePhase, VMRestore, VMSnapshot, VMSnapshotClass, VMSnapshotSchedule};
use kube::api::ListParams;
use kube::runtime::events::{Event, EventType};
use kube::{Api, Resource as _, ResourceExt as _};
use tracing::warn;

use super::judgement::{judgements, removed};
use super::observe::{Classes, Observed};
use super::timing::Timing;
use super::{apply, made};
use crate::context::Context;
use crate::error::{Error, bounded, unless_gone};
use crate::events;

/// Removes those of `names` that the server too has nothing to say for.
pub async fn prune(ctx: &Context, planned: &VMSnapshotSchedule, names: &BTreeSet<String>) -> Result<(), Error> {
    let namespace = planned.namespace().unwrap_or_default();
    let schedules = Api::<VMSnapshotSchedule>::namespaced(ctx.client.clone(), &namespace);
    let found = unless_gone(bounded("reading the schedule anew", schedules.get(&planned.name_any())).await)?;
    let Some(schedule) = found.filter(|found| is_as_planned(planned, found)) else {
        warn!("the schedule has changed: nothing is removed");
        return Ok(());
    };
    let Ok(timing) = Timing::new(&schedule.spec) else { return Ok(()) }; // It is the spec that was planned by.
    // No resource version is asked for, which means the latest state; a cache of the server's may not answer.
    let selector =
        ListParams::default().labels(&format!("{SCHEDULE_UID_LABEL}={}", schedule.uid().unwrap_or_default()));
    let snapshots = Api::<VMSnapshot>::namespaced(ctx.client.clone(), &namespace);
    let listed = bounded("listing the schedule's snapshots", snapshots.list(&selector)).await?;
    let observed = Observed {
        restored: restored(ctx, &namespace).await?, // After the list, so that it knows all restores of what is in it.
        classes: classes(ctx).await?,
        vms: Ok(vec![]),
        snapshots: listed.items.into_iter().filter(|snapshot| made::is_of(&schedule, snapshot)).collect(),
        schedule: Arc::new(schedule),
    };
    let now = ctx.clock.now();
    let judged = judgements(&observed, &timing, now, now);
    let going: BTreeSet<&String> = judged.values().flat_map(|(today, _)| removed(today)).collect();
    for snapshot in &observed.snapshots {
        let name = snapshot.name_any();
        if going.contains(&name) && names.contains(&name) {
            apply::delete(ctx, snapshot).await?;
            events::publish(ctx, expired(&observed.schedule), &snapshot.object_ref(&())).await;
        }
    }
    Ok(())
}

fn is_as_planned(planned: &VMSnapshotSchedule, found: &VMSnapshotSchedule) -> bool {
    found.uid() == planned.uid()
        && found.metadata.generation == planned.metadata.generation
        && found.metadata.deletion_timestamp.is_none()
}

fn expired(schedule: &VMSnapshotSchedule) -> Event {
    Event {
        type_: EventType::Normal,
        action: "Delete".to_owned(),
        reason: "Expired".to_owned(),
        note: Some(format!("No rule of VMSnapshotSchedule {} keeps the snapshot.", schedule.name_any())),
        secondary: Some(schedule.object_ref(&())),
    }
}

/// Whether everything was stopped a moment ago, the server knows best. A class that can't be read stops everything too.
async fn classes(ctx: &Context) -> Result<Classes, Error> {
    let api = Api::<VMSnapshotClass>::all(ctx.client.clone());
    let listed = bounded("listing classes", api.list(&ListParams::default())).await?;
    Ok(Classes::new(listed.iter()))
}

/// Names of the snapshots that restores need, as the server says.
async fn restored(ctx: &Context, namespace: &str) -> Result<BTreeSet<String>, Error> {
    let api = Api::<VMRestore>::namespaced(ctx.client.clone(), namespace);
    let listed = bounded("listing restores", api.list(&ListParams::default())).await?;
    Ok(listed.iter().filter_map(needed).map(str::to_owned).collect())
}

/// The snapshot that the restore needs until it has come to its end. A dry run needs it for what is to follow.
pub fn needed(restore: &VMRestore) -> Option<&str> {
    let phase = restore.status.as_ref().map(|status| status.phase);
    let has_ended = matches!(phase, Some(RestorePhase::Succeeded | RestorePhase::Failed));
    (!has_ended).then_some(&restore.spec.snapshot_name)
}
