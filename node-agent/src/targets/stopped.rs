//! What can be said of a VM that doesn't run: its labels, and its disks by its `target.yaml`.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use freezeframe_api::v1alpha1::{RunState, TargetDisk, VMTargetStatus};

use super::probe::target_disk;
use crate::drivers::Writers;
use crate::hypervisor::VmKey;
use crate::hypervisor::disks::disks;
use crate::hypervisor::still::{Still, StillError};
use crate::hypervisor::target_file::{self, KnownDisk, Stamp, TargetFile};
use crate::session::Sessions;
use crate::session::outcome::chain;

/// How soon disks that couldn't be opened are tried again, though nothing was changed in the file.
const TRY_AGAIN: Duration = Duration::from_secs(60);

/// Which files were looked at, so that a QEMU is started for a change and not for every look.
#[derive(Default)]
pub struct Files(Mutex<HashMap<VmKey, Look>>);

#[derive(Clone)]
struct Look {
    stamp: Stamp,
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
            Ok(None) => return,
            Err(error) => return status.message = Some(chain(&error)),
        };
        let known = self.looks().get(vm).cloned().filter(|look| was_stopped && look.stamp == stamp);
        let failed = match known.map(|look| look.failed) {
            Some(None) => return,
            Some(Some((why, at))) if at.elapsed() < TRY_AGAIN => Some((why, at)),
            _ => match open(sessions, vm, &file).await {
                Ok(found) => {
                    status.disks = found;
                    None
                }
                Err(error) => Some((chain(&error), Instant::now())),
            },
        };
        status.message = failed.as_ref().map(|(why, _)| why.clone());
        self.looks().insert(vm.clone(), Look { stamp, failed });
    }

    fn looks(&self) -> MutexGuard<'_, HashMap<VmKey, Look>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn open(sessions: &Sessions, vm: &VmKey, file: &TargetFile) -> Result<Vec<TargetDisk>, StillError> {
    if file.disks.is_empty() {
        return Ok(vec![]);
    }
    let still = Still::look(vm, &file.disks, &sessions.roots).await?;
    let found = disks(still.vm(), &sessions.roots).await;
    still.stop().await;
    let found = found.map_err(|source| StillError::Graph { vm: vm.clone(), source })?.found;
    let as_the_file_says = found.into_iter().map(|mut disk| {
        // Looking opens every disk so that nothing can be written to it.
        let read_only = file.disks.iter().any(|known| known.name == disk.name && known.read_only);
        disk.facts.writers = if read_only { Writers::Nobody } else { Writers::Guest };
        target_disk(&disk, &sessions.drivers)
    });
    Ok(as_the_file_says.collect())
}

/// The disks that a VM was last seen with, as they are opened while it is stopped.
pub fn known_disks(status: &VMTargetStatus) -> Vec<KnownDisk> {
    let known = |disk: &TargetDisk| KnownDisk {
        name: disk.name.0.clone(),
        path: disk.source.clone().into(),
        format: disk.format.clone(),
        read_only: disk.read_only,
    };
    status.disks.iter().map(known).collect()
}
