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
mod observe;
mod obstacle;
mod order;
mod plan;
mod queue;
mod status;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use freezeframe_api::v1alpha1::VMSnapshot;
use kube::runtime::controller::Action;

pub use observe::{ClassState, class};
pub use order::label_value;
pub use queue::{is_settled, keeps_nobody_waiting, same_vm};

use crate::caches::Guarded;
use crate::context::Context;
use crate::error::Error;

/// The controller's name in logs and metrics.
pub const CONTROLLER: &str = "vmsnapshot";

/// How soon to look again when the cache is behind our own writes; its next event comes earlier as a rule.
const CACHE_LAG: Duration = Duration::from_secs(1);

/// How soon to look again when nothing is due. A watch that broke tells of no deletion that it missed; this makes up
/// for it, well before the usual deadline where something is waited for. A look that finds no news costs no write.
const RESYNC: Duration = Duration::from_secs(10 * 60);

/// The same for a snapshot that waits for something.
const RESYNC_WAITING: Duration = Duration::from_secs(30);

/// Brings one snapshot a step further.
pub async fn reconcile(snapshot: Arc<Guarded<VMSnapshot>>, ctx: Arc<Context>) -> Result<Action, Error> {
    let snapshot = Arc::new(snapshot.0.clone().map_err(|error| Error::unreadable("VMSnapshot", &error))?);
    if ctx.written.is_stale(&*snapshot) {
        return Ok(Action::requeue(CACHE_LAG));
    }
    ctx.caches.filled().await;
    let now = ctx.clock.now();
    let plan = if snapshot.metadata.deletion_timestamp.is_some() {
        let content = observe::content(&snapshot, &ctx, now).await?;
        cleanup::plan(&snapshot, &content, now)
    } else {
        let observed = observe::observe(snapshot.clone(), &ctx, now).await?;
        plan::plan(&observed, now)
    };
    apply::apply(&snapshot, plan.actions, &ctx).await?;
    let resync = if is_settled(&snapshot) { RESYNC } else { RESYNC_WAITING };
    Ok(Action::requeue(plan.again.map_or(resync, |again| again.min(resync))))
}
