//! What other snapshots a removal concerns: whose files are near those that it changes, and who must be told of a move.

use std::fs::File;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::Sessions;
use super::journal::{SessionRecord, Stage};
use super::order::Order;
use super::outcome;
use super::removal::RemovalError;
use crate::drivers::{DiskTask, Drivers, Sibling};
use crate::hypervisor::backing::backing_of;
use crate::hypervisor::image::{FileId, ImageRoots};

impl Sessions {
    /// The records of other snapshots. Those of other VMs too: a VM may have got another name since, and its images not.
    pub(super) fn others(&self, record: &SessionRecord) -> Result<Vec<SessionRecord>, RemovalError> {
        let mut drivers = record.tasks.iter().filter_map(|task| self.drivers.find(&task.driver));
        let all = if drivers.any(|driver| driver.merges()) {
            self.journal.every().map_err(RemovalError::Unreadable)?
        } else {
            self.journal.all()?
        };
        let is_other = |other: &SessionRecord| other.order.uid != record.order.uid && other.stage != Stage::Removed;
        Ok(all.into_iter().filter(is_other).collect())
    }

    /// Fails if another VM's snapshot is half removed, and is of the same chain as this one. Not once both are: neither
    /// would ever go on.
    pub(super) fn refuse_if_first(&self, record: &SessionRecord, other: &SessionRecord) -> Result<(), RemovalError> {
        let is_half = other.stage != Stage::Retained && !self.half_removed(other).is_empty();
        if !is_half || !self.half_removed(record).is_empty() || !self.share_a_chain(record, other) {
            return Ok(());
        }
        let (snapshot, vm) = (other.order.snapshot.1.clone(), other.order.vm.clone());
        Err(RemovalError::OtherFirst { snapshot, vm })
    }

    /// Whether a file of one is among the images that one of the other's is read through.
    fn share_a_chain(&self, one: &SessionRecord, other: &SessionRecord) -> bool {
        let chains = |record: &SessionRecord| -> Vec<Vec<FileId>> {
            let places = record.tasks.iter().filter_map(|task| place(&self.drivers, task));
            places.filter_map(|place| chain_of(&self.roots, &place)).collect()
        };
        let (ours, theirs) = (chains(one), chains(other));
        let mut pairs = ours.iter().flat_map(|ours| theirs.iter().map(move |theirs| (ours, theirs)));
        pairs.any(|(ours, theirs)| ours.contains(&theirs[0]) || theirs.contains(&ours[0]))
    }

    /// Files of other snapshots.
    pub(super) fn siblings(&self, record: &SessionRecord) -> Result<Vec<Sibling>, RemovalError> {
        let files = self.others(record)?.into_iter().flat_map(|other| {
            let retained = other.stage == Stage::Retained;
            let places = other.tasks.iter().filter_map(|task| place(&self.drivers, task)).collect::<Vec<_>>();
            places.into_iter().map(move |handle| Sibling { handle, retained })
        });
        Ok(files.collect())
    }

    /// Disks, by their places among the tasks, whose removal may have moved another snapshot's data already.
    pub(super) fn half_removed(&self, record: &SessionRecord) -> Vec<usize> {
        let tasks = record.tasks.iter().enumerate();
        tasks.filter(|(_, task)| self.is_half_removed(task)).map(|(at, _)| at).collect()
    }

    pub(super) fn is_half_removed(&self, task: &DiskTask) -> bool {
        self.drivers.find(&task.driver).is_some_and(|driver| driver.is_half_removed(task))
    }

    /// Lets the record of the snapshot whose artifact moved follow it.
    pub(super) fn follow(
        &self,
        order: &Order,
        from: &Path,
        to: &Path,
        format: &str,
    ) -> Result<Vec<String>, RemovalError> {
        let mut moved = vec![];
        let all = self.journal.every().map_err(RemovalError::Unreadable)?;
        for mut other in all.into_iter().filter(|other| other.order.uid != order.uid) {
            let tasks = other.tasks.iter_mut().filter(|task| place(&self.drivers, task).as_deref() == Some(from));
            let mut changed = false;
            for task in tasks {
                if let Some(driver) = self.drivers.find(&task.driver) {
                    let followed = driver.follow(task, to, format, &self.roots);
                    followed.map_err(|source| RemovalError::Follow(Box::new(source)))?;
                    changed = true;
                }
            }
            if changed {
                outcome::follow(&mut other, from, to, format);
                self.journal.save(&other)?;
                moved.push(other.order.content.clone());
            }
        }
        Ok(moved)
    }
}

/// An image and those below it, by their headers, as far as they are beside each other; none where it is gone.
fn chain_of(roots: &ImageRoots, image: &Path) -> Option<Vec<FileId>> {
    let (directory, mut name) = roots.directory_of(image).ok()?;
    let mut chain = vec![directory.id(&name).ok()??];
    while let Some(below) =
        directory.open(&name, OFlags::RDONLY).ok().and_then(|file| backing_of(&mut File::from(file)).ok()?)
    {
        match directory.id(&below).ok().flatten() {
            Some(id) if !chain.contains(&id) => chain.push(id),
            _ => break,
        }
        name = below;
    }
    Some(chain)
}

/// Where a task's data is, whether it was completed or not.
fn place(drivers: &Drivers, task: &DiskTask) -> Option<PathBuf> {
    drivers.find(&task.driver)?.place(task)
}
