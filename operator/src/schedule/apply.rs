//! Carries a plan out. The only step that writes, with `prune`.

use std::collections::BTreeMap;

use freezeframe_api::OPERATOR_MANAGER;
use freezeframe_api::v1alpha1::{VMSnapshot, VMSnapshotSchedule, VMSnapshotScheduleStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Resource as _, ResourceExt as _};
use serde_json::json;
use tracing::{info, warn};

use super::observe::Observed;
use super::plan::Action;
use super::{made, prune, status};
use crate::context::Context;
use crate::error::{Error, ErrorKind, bounded, unless_gone};
use crate::events;

/// Does what was planned, in order. Each write may be repeated: a reconcile that broke off begins from the top.
///
/// What the server won't do for one snapshot keeps nothing else from being done: retention may be what makes room under a
/// quota. It is told in the status, and the first such error is returned at the end.
pub async fn apply(observed: &Observed, actions: Vec<Action>, ctx: &Context) -> Result<(), Error> {
    let schedule = &*observed.schedule;
    let (mut refusals, mut instead) = (Refusals::default(), vec![]);
    for action in actions {
        match action {
            Action::Replace(snapshot) => refusals.note(&snapshot, delete(ctx, &snapshot).await)?,
            Action::Create(snapshot) if refusals.concern(&snapshot) => {} // The one that it replaces is still there.
            Action::Create(snapshot) => refusals.note_creation(&snapshot, create(ctx, schedule, &snapshot).await)?,
            Action::CreateInstead(_) if refusals.places == 0 => {}
            Action::CreateInstead(snapshot) => {
                refusals.places -= 1;
                refusals.note_creation(&snapshot, create(ctx, schedule, &snapshot).await)?;
                instead.extend((!refusals.concern(&snapshot)).then_some(*snapshot));
            }
            Action::SetOwners(snapshot, owners) => refusals.keep(set_owners(ctx, &snapshot, &owners).await)?,
            Action::WriteStatus(mut status) => {
                status::taken_instead(&mut status, &instead);
                status::not_taken(&mut status, schedule, &refusals.of_vms, ctx.clock.now());
                if schedule.status.as_ref() != Some(&*status) {
                    write_status(ctx, schedule, &status).await?;
                }
            }
            Action::Prune(names) => prune::prune(ctx, schedule, &names).await?,
        }
    }
    refusals.first.map_or(Ok(()), Err)
}

/// What the server wouldn't do for single snapshots.
#[derive(Default)]
struct Refusals {
    first: Option<Error>,
    /// For which VMs no snapshot was made, and why.
    of_vms: BTreeMap<String, String>,
    /// How many more may be made in their place.
    places: usize,
}

impl Refusals {
    fn concern(&self, snapshot: &VMSnapshot) -> bool {
        self.of_vms.contains_key(&snapshot.spec.vm_name)
    }

    fn note_creation(&mut self, snapshot: &VMSnapshot, result: Result<(), Error>) -> Result<(), Error> {
        self.places += usize::from(result.is_err());
        self.note(snapshot, result)
    }

    fn note(&mut self, snapshot: &VMSnapshot, result: Result<(), Error>) -> Result<(), Error> {
        if let Err(error) = &result {
            self.of_vms.entry(snapshot.spec.vm_name.clone()).or_insert_with(|| whole(error));
        }
        self.keep(result)
    }

    /// A server that isn't there won't be there for the next snapshot either.
    fn keep(&mut self, result: Result<(), Error>) -> Result<(), Error> {
        match result {
            Err(error) if error.kind() == ErrorKind::Unavailable => Err(error),
            Err(error) => {
                self.first.get_or_insert(error);
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}

/// What we were doing, and what the server said to it.
fn whole(error: &Error) -> String {
    match error {
        Error::Api { doing, source: kube::Error::Api(status) } => format!("{doing}: {}", status.message),
        other => other.to_string(),
    }
}

/// Deletes the very version of a snapshot that was judged: one that was held, say, a moment ago is another.
pub async fn delete(ctx: &Context, snapshot: &VMSnapshot) -> Result<(), Error> {
    let preconditions = Preconditions { uid: snapshot.uid(), resource_version: snapshot.resource_version() };
    let params = DeleteParams::default().preconditions(preconditions);
    let api = snapshots(ctx, snapshot);
    unless_gone(bounded("deleting a snapshot", api.delete(&snapshot.name_any(), &params)).await)?;
    info!(snapshot = snapshot.name_any(), "deleted a snapshot of the schedule");
    Ok(())
}

/// A plain creation: where the snapshot is there already, another operator or an earlier try has made it.
async fn create(ctx: &Context, schedule: &VMSnapshotSchedule, snapshot: &VMSnapshot) -> Result<(), Error> {
    if create_or_find(ctx, schedule, snapshot).await? {
        return Ok(());
    }
    let time = made::time_of(snapshot).unwrap_or_default();
    let mut snapshot = snapshot.clone();
    snapshot.metadata.name = Some(made::summed_name(&schedule.name_any(), &snapshot.spec.vm_name, time));
    if !create_or_find(ctx, schedule, &snapshot).await? {
        warn!(snapshot = snapshot.name_any(), "somebody else's snapshot has this name; none is taken for this time");
    }
    Ok(())
}

/// Whether the schedule's snapshot is there now; if not, another one has its name.
async fn create_or_find(ctx: &Context, schedule: &VMSnapshotSchedule, snapshot: &VMSnapshot) -> Result<bool, Error> {
    let (api, name) = (snapshots(ctx, snapshot), snapshot.name_any());
    let params = PostParams { field_manager: Some(OPERATOR_MANAGER.to_owned()), ..PostParams::default() };
    match bounded("creating a snapshot", api.create(&params, snapshot)).await {
        Ok(_) => {
            info!(snapshot = name, "created a snapshot");
            Ok(true)
        }
        Err(Error::Api { source: kube::Error::Api(status), .. }) if status.reason == "AlreadyExists" => {
            let found = bounded("looking at a snapshot that is there already", api.get(&name)).await?;
            Ok(made::is_of(schedule, &found) && found.spec.vm_name == snapshot.spec.vm_name)
        }
        Err(error) => Err(error),
    }
}

/// The list is replaced as a whole, so the object must be the very version that it was read from.
async fn set_owners(ctx: &Context, snapshot: &VMSnapshot, owners: &[OwnerReference]) -> Result<(), Error> {
    let metadata = json!({
        "uid": snapshot.metadata.uid,
        "resourceVersion": snapshot.metadata.resource_version,
        "ownerReferences": owners,
    });
    let patch = Patch::Merge(json!({"metadata": metadata}));
    let (api, params) = (snapshots(ctx, snapshot), PatchParams::apply(OPERATOR_MANAGER));
    let name = snapshot.name_any();
    let call = api.patch_metadata(&name, &params, &patch);
    unless_gone(bounded("changing a snapshot's owners", call).await).map(drop)
}

/// The version keeps the status off a later schedule of the same name. Forced: nobody else has a say in it.
async fn write_status(
    ctx: &Context,
    schedule: &VMSnapshotSchedule,
    status: &VMSnapshotScheduleStatus,
) -> Result<(), Error> {
    let name = schedule.name_any();
    let patch = Patch::Apply(json!({
        "apiVersion": VMSnapshotSchedule::api_version(&()),
        "kind": VMSnapshotSchedule::kind(&()),
        "metadata": {"name": name, "resourceVersion": schedule.metadata.resource_version},
        "status": status,
    }));
    let api = Api::<VMSnapshotSchedule>::namespaced(ctx.client.clone(), &schedule.namespace().unwrap_or_default());
    let params = PatchParams::apply(OPERATOR_MANAGER).force();
    let result = bounded("writing the schedule's status", api.patch_status(&name, &params, &patch)).await;
    let Some(written) = unless_gone(result)? else { return Ok(()) };
    ctx.written.remember(&written);
    info!(says = status.message, "wrote the status");
    for event in events::of_schedule(schedule, status) {
        events::publish(ctx, event, &schedule.object_ref(&())).await;
    }
    Ok(())
}

fn snapshots(ctx: &Context, snapshot: &VMSnapshot) -> Api<VMSnapshot> {
    Api::namespaced(ctx.client.clone(), &snapshot.namespace().unwrap_or_default())
}
