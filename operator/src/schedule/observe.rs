//! Gathers what a decision about one schedule rests on. The only step that reads.

use std::collections::BTreeSet;
use std::sync::Arc;

use freezeframe_api::v1alpha1::{TargetSelector, VMSnapshot, VMSnapshotClass, VMSnapshotSchedule, VMTarget};
use freezeframe_api::{DEFAULT_CLASS_ANNOTATION, PAUSED_ANNOTATION};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::jiff::Timestamp;
use kube::core::{Selector, SelectorExt as _};
use kube::runtime::reflector::Store;
use kube::{Api, ResourceExt as _};

use super::{made, prune};
use crate::caches::{Caches, Guarded};
use crate::context::Context;
use crate::error::{Error, bounded, unless_gone};

/// What a decision rests on.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The schedule.
    pub schedule: Arc<VMSnapshotSchedule>,
    /// The VMs that it selects, by name.
    pub vms: Result<Vec<Vm>, String>,
    /// The snapshots that it made, being deleted or not.
    pub snapshots: Vec<VMSnapshot>,
    /// Names of snapshots that a restore needs.
    pub restored: BTreeSet<String>,
    /// The classes.
    pub classes: Classes,
}

/// A VM that is selected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vm {
    /// Its name.
    pub name: String,
    /// Its UID and when it was first seen. None: it was named, but there is no such VM.
    pub found: Option<(String, Timestamp)>,
}

/// What there is to know of the classes here.
#[derive(Clone, Debug, Default)]
pub struct Classes {
    paused: BTreeSet<String>,
    default: Option<String>,
}

impl Classes {
    /// From all that there are.
    pub fn new<'a>(classes: impl Iterator<Item = &'a VMSnapshotClass>) -> Self {
        let mut found = Self::default();
        let says = |class: &VMSnapshotClass, annotation| {
            class.annotations().get(annotation).is_some_and(|value| value == "true")
        };
        for class in classes {
            if says(class, PAUSED_ANNOTATION) {
                found.paused.insert(class.name_any());
            }
            if says(class, DEFAULT_CLASS_ANNOTATION) {
                found.default = Some(class.name_any());
            }
        }
        found
    }

    /// The class that this name means, if it is paused.
    pub fn paused<'a>(&'a self, name: Option<&'a str>) -> Option<&'a str> {
        name.or(self.default.as_deref()).filter(|name| self.paused.contains(*name))
    }

    /// Whether the class by which the snapshot was taken is paused. The default may be another one by now, so of a snapshot
    /// that doesn't know its class none may be.
    pub fn pause(&self, snapshot: &VMSnapshot) -> bool {
        let taken_by = snapshot.status.as_ref().and_then(|status| status.class_name.as_ref());
        let class = snapshot.spec.class_name.as_ref().or(taken_by);
        class.map_or(!self.paused.is_empty(), |class| self.paused.contains(class))
    }
}

/// The classes. An administrator's change of one is seen at once or nearly.
pub fn classes(caches: &Caches) -> Classes {
    let classes = caches.classes.state();
    Classes::new(classes.iter().filter_map(|class| class.0.as_ref().ok())) // One that can't be read was logged as it arrived.
}

/// Reads everything, from the caches where that is safe.
pub async fn observe(schedule: Arc<VMSnapshotSchedule>, ctx: &Context) -> Result<Observed, Error> {
    let snapshots = snapshots(&schedule, ctx).await?;
    Ok(Observed {
        vms: selected(&schedule, &ctx.caches.targets),
        restored: restored(&schedule, &ctx.caches),
        classes: classes(&ctx.caches),
        snapshots,
        schedule,
    })
}

fn restored(schedule: &VMSnapshotSchedule, caches: &Caches) -> BTreeSet<String> {
    let restores = caches.restores.state();
    let readable = restores.iter().filter_map(|restore| restore.0.as_ref().ok()); // As above.
    let beside = readable.filter(|restore| restore.namespace() == schedule.namespace());
    beside.filter_map(prune::needed).map(str::to_owned).collect()
}

/// The snapshots that the cache shows, and those that our last status names but the cache doesn't show yet.
async fn snapshots(schedule: &VMSnapshotSchedule, ctx: &Context) -> Result<Vec<VMSnapshot>, Error> {
    let cached = ctx.caches.snapshots.state();
    let readable = cached.iter().filter_map(|snapshot| snapshot.0.as_ref().ok()); // As above.
    let mut found: Vec<_> = readable.filter(|snapshot| made::is_of(schedule, snapshot)).cloned().collect();
    let api = Api::<VMSnapshot>::namespaced(ctx.client.clone(), &schedule.namespace().unwrap_or_default());
    for name in schedule.status.iter().flat_map(|status| &status.vms).flat_map(|vm| &vm.active) {
        if !found.iter().any(|snapshot| snapshot.metadata.name.as_ref() == Some(name)) {
            let unseen = unless_gone(bounded("looking for a snapshot that was just made", api.get(name)).await)?;
            found.extend(unseen.filter(|snapshot| made::is_of(schedule, snapshot)));
        }
    }
    Ok(found)
}

fn selected(schedule: &VMSnapshotSchedule, targets: &Store<Guarded<VMTarget>>) -> Result<Vec<Vm>, String> {
    let TargetSelector { match_labels, match_expressions, vm_names } = &schedule.spec.selector;
    let selector: Selector = LabelSelector {
        match_labels: (!match_labels.is_empty()).then(|| match_labels.clone()),
        match_expressions: (!match_expressions.is_empty()).then(|| match_expressions.clone()),
    }
    .try_into()
    .map_err(|error: kube::core::ParseExpressionError| error.to_string())?;
    let targets = targets.state();
    let mut vms: Vec<Vm> = targets
        .iter()
        .filter(|target| target.namespace() == schedule.namespace() && selector.matches(target.labels()))
        .filter(|target| vm_names.is_empty() || vm_names.contains(&target.name_any()))
        .map(|target| {
            let since = target.creation_timestamp().map_or(Timestamp::UNIX_EPOCH, |time| time.0);
            Vm { name: target.name_any(), found: Some((target.uid().unwrap_or_default(), since)) }
        })
        .collect();
    let missing = vm_names.iter().filter(|name| !vms.iter().any(|vm| vm.name == **name)).cloned().collect::<Vec<_>>();
    vms.extend(missing.into_iter().map(|name| Vm { name, found: None }));
    vms.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(vms)
}
