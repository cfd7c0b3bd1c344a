//! Shortening the chains of a VM that doesn't run: in a QEMU of ours, as one of its own would, and only as long as nobody
//! starts it.
//!
//! Our QEMU has the images locked, so a VM that is started meanwhile ends at once. It has made its monitor's socket by
//! then: something has changed in its directory. We let go, and leave it alone until whoever starts it had time to try
//! again.

use std::path::Path;
use std::time::{Duration, SystemTime};

use super::Sessions;
use super::journal::SessionRecord;
use super::limits;
use super::shortening::{Depth, ShorteningError, unfinished};
use crate::drivers::overlay::resting::{self, Resting};
use crate::drivers::overlay::shorten;
use crate::drivers::{Env, Sibling};
use crate::hypervisor::VmKey;
use crate::hypervisor::still::Still;
use crate::hypervisor::target_file::KnownDisk;
use crate::locks::Waiting;

/// A VM in whose directory something has changed since may be on its way up.
const QUIET: Duration = Duration::from_secs(60);
const LOOK_FOR_START: Duration = Duration::from_millis(100);

impl Sessions {
    pub(super) async fn shorten_stopped(
        &self,
        vm: &VmKey,
        deepest: usize,
        records: &[SessionRecord],
        waiting: &Waiting,
    ) -> Result<Depth, ShorteningError> {
        let directory = self.vm_root.join(vm.socket(""));
        let Some(changed) = changed(&directory).filter(|changed| is_long_ago(*changed)) else {
            return Ok(Depth::Unseen);
        };
        let Ok(disks) = self.stopped.disks(&self.vm_root, vm).await else { return Ok(Depth::Unseen) };
        let disks = self.disks_now(vm, &disks)?;
        let siblings: Vec<Sibling> = records.iter().flat_map(|record| self.files_of(record)).collect();
        let pace = limits::slowest(records.iter().map(|record| &record.order.limits), waiting);
        let env = Env { vm: None, roots: &self.roots, siblings: &siblings, pace: &pace };
        let (mut worth_it, mut left) = (vec![], vec![]);
        for disk in disks {
            match resting::look(&env, &disk, deepest) {
                Resting::ShortEnough => {}
                Resting::CanBeShortened => worth_it.push(disk),
                Resting::Needed(too_deep) => left.push(too_deep),
            }
        }
        if !worth_it.is_empty() {
            let shortened = self.shorten_in_ours(vm, &worth_it, &env, deepest, (&directory, changed)).await?;
            match shortened {
                Some(Ok(more)) => left.extend(more),
                Some(Err(error)) => return unfinished(vm, error),
                None => return Ok(Depth::Unseen),
            }
        }
        Ok(self.depth(&left, deepest, records))
    }

    /// None if the VM is being started.
    async fn shorten_in_ours(
        &self,
        vm: &VmKey,
        disks: &[KnownDisk],
        env: &Env<'_>,
        deepest: usize,
        (directory, since): (&Path, SystemTime),
    ) -> Result<Option<crate::drivers::Result<Vec<shorten::TooDeep>>>, ShorteningError> {
        let still = Still::start(vm, disks, &self.roots).await?;
        let env = Env { vm: Some(still.vm()), ..*env };
        let shortened = tokio::select! {
            biased;
            () = started(directory, since) => None,
            shortened = Box::pin(shorten::shorten(&env, still.vm(), deepest)) => Some(shortened),
        };
        if shortened.is_none() {
            tracing::info!(%vm, "its chains are left as they are: it is being started");
        }
        // What was under way is cancelled with it, which harms nothing.
        still.stop().await;
        Ok(shortened)
    }
}

fn changed(directory: &Path) -> Option<SystemTime> {
    std::fs::symlink_metadata(directory).ok()?.modified().ok()
}

fn is_long_ago(changed: SystemTime) -> bool {
    // A time that is yet to come says nothing.
    changed.elapsed().map_or(true, |passed| passed > QUIET)
}

/// Resolves once something has changed in the VM's directory.
async fn started(directory: &Path, since: SystemTime) {
    let mut beat = tokio::time::interval(LOOK_FOR_START);
    while changed(directory) == Some(since) {
        beat.tick().await;
    }
}
