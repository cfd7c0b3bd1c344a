//! Removing a disk's artifacts: what a driver is given for it, and what it says is left to do.

use std::path::PathBuf;

use freezeframe_guard::Exchange;

use super::Pace;
use crate::hypervisor::Vm;
use crate::hypervisor::image::ImageRoots;

/// What is left to do to remove a disk's artifacts.
#[derive(Debug)]
pub enum Removal {
    /// The task's state changed and must be on disk before the next call.
    Again,
    /// The active layer is merged but for the last step, which needs the virtual CPUs stopped.
    Switch(Switch),
    /// An artifact of another snapshot moved; its record must follow before the next call.
    Moved {
        /// Where it was.
        from: PathBuf,
        /// Where it is now.
        to: PathBuf,
        /// Its format there.
        format: String,
    },
    /// Nothing is left.
    Done,
    /// Kept, because something else needs it.
    Kept(String),
}

/// The last step of merging an active layer: let the job finish and hand the disk's name to the merged file.
#[derive(Debug)]
pub struct Switch {
    /// The image that the job wrote to, which is flushed first.
    pub merged: PathBuf,
    /// The job to complete; none if it is complete already.
    pub job: Option<String>,
    /// The name's change of hands.
    pub exchange: Exchange,
}

/// What a driver works with.
pub struct Env<'a> {
    /// The VM's QEMU; none while no process runs.
    pub vm: Option<&'a Vm>,
    /// Where images may be.
    pub roots: &'a ImageRoots,
    /// Other snapshots' disks that still have files, of other VMs too.
    pub siblings: &'a [Sibling],
    /// How fast merges go, and what they make way for.
    pub pace: &'a Pace,
}

/// A file of another snapshot.
#[derive(Clone, Debug)]
pub struct Sibling {
    /// Where it is.
    pub handle: PathBuf,
    /// Whether its snapshot is gone and the file is kept on purpose, so that nobody would learn of a move.
    pub retained: bool,
}
