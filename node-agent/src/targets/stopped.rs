//! What can be said of a VM that doesn't run: its labels, and its disks by its `target.yaml`.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::{RunState, TargetDisk, VMTargetStatus};

use super::probe::target_disk;
use crate::causes::chain;
use crate::drivers::Writers;
use crate::hypervisor::VmKey;
use crate::hypervisor::disks::disks;
use crate::hypervisor::still::{Still, StillError};
use crate::hypervisor::target_file::{self, KnownDisk, Stamp, TargetFile};
use crate::session::Sessions;

/// How soon disks that couldn't be opened are tried again, though nothing was changed in the file.
const TRY_AGAIN: Duration = Duration::from_secs(60);

/// Which files were looked at, so that a QEMU is started for a change and not for every look.
#[derive(Default)]
pub struct Files(Mutex<HashMap<VmKey, Look>>);

#[derive(Clone)]
struct Look {
    stamp: Stamp,
    /// What the disks that the file names were by then.
    disks: Vec<KnownDisk>,
    /// What was wrong, and when.
    failed: Option<(String, Instant)>,
}

/// The labels that a VM's file gives its target; none without a file, or with one that can't be used.
pub fn labels(sessions: &Sessions, vm: &VmKey) -> BTreeMap<String, String> {
    target_file::read(&sessions.vm_root, vm).ok().flatten().map(|(file, _)| file.labels).unwrap_or_default()
}

impl Files {
    /// Puts what the file of a stopped VM says into its status. Without a file it keeps the disks that it was last seen
    /// with.
    pub async fn look(&self, sessions: &Sessions, vm: &VmKey, status: &mut VMTargetStatus) {
        let was_stopped = std::mem::replace(&mut status.run_state, RunState::Stopped) == RunState::Stopped;
        let (file, stamp) = match target_file::read(&sessions.vm_root, vm) {
            Ok(Some(found)) => found,
            Ok(None) => return last_seen(sessions, status),
            Err(error) => return status.message = Some(chain(&error)),
        };
        let now = match sessions.disks_now(vm, &file.disks) {
            Ok(now) => now,
            Err(error) => return status.message = Some(chain(&error)),
        };
        let same = |look: &Look| look.stamp == stamp && look.disks == now;
        let known = self.looks().get(vm).cloned().filter(|look| was_stopped && same(look));
        let failed = match known.map(|look| look.failed) {
            Some(None) => return,
            Some(Some((why, at))) if at.elapsed() < TRY_AGAIN => Some((why, at)),
            _ => match open(sessions, vm, &file, &now).await {
                Ok((found, not_followed)) => {
                    status.disks = found;
                    super::follow::report(status, &not_followed);
                    None
                }
                Err(error) => Some((chain(&error), Instant::now())),
            },
        };
        status.message = failed.as_ref().map(|(why, _)| why.clone());
        self.looks().insert(vm.clone(), Look { stamp, disks: now, failed });
    }

    fn looks(&self) -> MutexGuard<'_, HashMap<VmKey, Look>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Without a file, a VM that was started wrongly before it stopped was seen then, and stays so while there is a layer.
fn last_seen(sessions: &Sessions, status: &mut VMTargetStatus) {
    super::follow::catch_up(status, &sessions.roots);
    let told = find(&status.conditions, types::FOLLOW_NEEDED);
    if told.is_none_or(|told| told.reason != reasons::NOT_FOLLOWED) {
        super::follow::report(status, &[]);
    }
}

/// The disks, and which of them aren't what they should be.
async fn open(
    sessions: &Sessions,
    vm: &VmKey,
    file: &TargetFile,
    now: &[KnownDisk],
) -> Result<(Vec<TargetDisk>, Vec<String>), StillError> {
    if file.disks.is_empty() {
        return Ok((vec![], vec![]));
    }
    let still = Still::look(vm, now, &sessions.roots).await?;
    let found = disks(still.vm(), &sessions.roots).await;
    still.stop().await;
    let found = found.map_err(|source| StillError::Graph { vm: vm.clone(), source })?.found;
    let not_followed = super::follow::not_followed(&found);
    let as_the_file_says = found.into_iter().map(|mut disk| {
        // Looking opens every disk so that nothing can be written to it.
        let read_only = file.disks.iter().any(|known| known.name == disk.name && known.read_only);
        disk.facts.writers = if read_only { Writers::Nobody } else { Writers::Guest };
        disk.apart = file.disks.iter().zip(now).any(|(known, now)| now.name == disk.name && now.path != known.path);
        target_disk(&disk, &sessions.drivers)
    });
    Ok((as_the_file_says.collect(), not_followed))
}

/// A disk that a VM was last seen with.
pub fn known_disk(disk: &TargetDisk) -> KnownDisk {
    KnownDisk {
        name: disk.name.0.clone(),
        path: disk.source.clone().into(),
        format: disk.format.clone(),
        read_only: disk.read_only,
    }
}

/// The disks that a VM was last seen with, as they are opened while it is stopped.
pub fn known_disks(status: &VMTargetStatus) -> Vec<KnownDisk> {
    status.disks.iter().map(known_disk).collect()
}
