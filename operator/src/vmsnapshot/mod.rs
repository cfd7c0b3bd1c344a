//! The controller of [`VMSnapshot`]: observe, plan, apply.
//!
//! ```text
//! Pending ─► Preparing ─► Completing ─► Ready          Deleting, from any of them
//!    └───────────┴─────────────┴──────► Failed
//! ```
//! [`observe`] reads, `plan` and `cleanup` decide without any I/O, `apply` writes. All state is in the objects, so a
//! reconcile may break off anywhere and the next one, of this process or another, goes on.

mod apply;
mod cleanup;
#[cfg(test)]
#[path = "../../tests/support/fixtures.rs"]
mod fixtures;
mod observe;
mod order;
mod plan;
mod queue;
mod status;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use freezeframe_api::v1alpha1::VMSnapshot;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::controller::Action;

pub use queue::{is_settled, same_vm};

use crate::caches::Guarded;
use crate::context::Context;
use crate::error::Error;

/// The controller's name in logs and metrics.
pub const CONTROLLER: &str = "vmsnapshot";

/// How soon to look again when the cache is behind our own writes; its next event comes earlier as a rule.
const CACHE_LAG: Duration = Duration::from_secs(1);

/// How soon to look again when nothing is due: events that a broken watch swallowed are made up for then.
const RESYNC: Duration = Duration::from_secs(10 * 60);

/// Brings one snapshot a step further.
pub async fn reconcile(snapshot: Arc<Guarded<VMSnapshot>>, ctx: Arc<Context>) -> Result<Action, Error> {
    let snapshot = Arc::new(snapshot.0.clone().map_err(|error| Error::unreadable("VMSnapshot", &error))?);
    if ctx.written.is_stale(&*snapshot) {
        return Ok(Action::requeue(CACHE_LAG));
    }
    ctx.caches.filled().await;
    let plan = if snapshot.metadata.deletion_timestamp.is_some() {
        let content = observe::content(&snapshot, &ctx).await?;
        cleanup::plan(&snapshot, &content, Timestamp::now())
    } else {
        let observed = observe::observe(snapshot.clone(), &ctx).await?;
        plan::plan(&observed, Timestamp::now())
    };
    apply::apply(&snapshot, plan.actions, &ctx).await?;
    Ok(Action::requeue(plan.again.map_or(RESYNC, |again| again.min(RESYNC))))
}
