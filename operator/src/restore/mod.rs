//! The controller of [`VMRestore`]: observe, plan, apply, as a snapshot's.
//!
//! ```text
//! new VM:    Pending ──────────────────────────► Restoring ─► Succeeded
//! in place:  Pending ─► Stopping ─► Saving ────► Restoring ─► Succeeded
//! dry run:   Pending ─► Planned                  (Failed, Deleting: from any of them)
//! ```
//! In place, the VM is brought to rest first, its state then becomes a VMSnapshot of its own, and only when that one is
//! Ready may the node replace a disk: whatever a restore does can be undone by another.

mod apply;
mod observe;
mod order;
mod plan;
mod status;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use freezeframe_api::v1alpha1::{RestorePhase, VMRestore};
use kube::runtime::controller::Action;

use crate::caches::Guarded;
use crate::context::Context;
use crate::error::Error;

/// The controller's name in logs and metrics.
pub const CONTROLLER: &str = "vmrestore";

/// How soon to look again when the cache is behind our own writes.
const CACHE_LAG: Duration = Duration::from_secs(1);

/// How soon to look again when nothing is due: makes up for a watch that broke.
const RESYNC: Duration = Duration::from_secs(10 * 60);

/// The same for a restore that waits for something.
const RESYNC_WAITING: Duration = Duration::from_secs(15);

/// Brings one restore a step further.
pub async fn reconcile(restore: Arc<Guarded<VMRestore>>, ctx: Arc<Context>) -> Result<Action, Error> {
    let restore = restore.0.clone().map_err(|error| Error::unreadable("VMRestore", &error))?;
    if ctx.written.is_stale(&restore) {
        return Ok(Action::requeue(CACHE_LAG));
    }
    ctx.caches.filled().await;
    let observed = observe::observe(restore, &ctx).await?;
    let actions = plan::plan(&observed, ctx.clock.now());
    apply::apply(&observed.restore, actions, &ctx).await?;
    Ok(Action::requeue(if is_settled(&observed.restore) { RESYNC } else { RESYNC_WAITING }))
}

/// Whether the restore needs neither its snapshot nor its VM any more.
#[must_use]
pub fn is_settled(restore: &VMRestore) -> bool {
    let phase = restore.status.as_ref().map(|status| status.phase);
    matches!(phase, Some(RestorePhase::Succeeded | RestorePhase::Failed))
        || phase == Some(RestorePhase::Planned) && restore.spec.dry_run
}
