//! The controller of [`VMSnapshotSchedule`]: observe, plan, apply.
//!
//! [`observe`] reads, [`plan`] decides without any I/O, `apply` writes. A snapshot is created under a name that follows from
//! schedule, VM and time, so nobody can make two of them. What retention removes is decided in [`keep`] alone; `prune`
//! decides it once more on what the server says at that moment, and removes only what was decided both times.

mod apply;
pub mod gauges;
mod judgement;
pub mod keep;
mod made;
mod observe;
mod plan;
mod prune;
mod status;
#[cfg(test)]
mod tests;
pub mod timing;
pub(crate) mod wakes;

use std::sync::Arc;
use std::time::Duration;

use freezeframe_api::v1alpha1::VMSnapshotSchedule;
use kube::runtime::controller::Action;

use crate::caches::Guarded;
use crate::context::Context;
use crate::error::Error;

/// The controller's name in logs and metrics.
pub const CONTROLLER: &str = "schedule";

/// How soon to look again when the cache is behind our own writes; its next event comes earlier as a rule.
const CACHE_LAG: Duration = Duration::from_secs(1);

/// How soon to look again when nothing is due: for what a broken watch didn't tell, and for a clock that was set.
const RESYNC: Duration = Duration::from_secs(60);

/// Brings one schedule up to date.
pub async fn reconcile(schedule: Arc<Guarded<VMSnapshotSchedule>>, ctx: Arc<Context>) -> Result<Action, Error> {
    let schedule = Arc::new(schedule.0.clone().map_err(|error| Error::unreadable("VMSnapshotSchedule", &error))?);
    if ctx.written.is_stale(&*schedule) {
        return Ok(Action::requeue(CACHE_LAG));
    }
    ctx.caches.filled().await;
    let observed = observe::observe(schedule, &ctx).await?;
    let plan = plan::plan(&observed, ctx.clock.now());
    apply::apply(&observed, plan.actions, &ctx).await?;
    Ok(Action::requeue(plan.again.map_or(RESYNC, |again| again.min(RESYNC))))
}
