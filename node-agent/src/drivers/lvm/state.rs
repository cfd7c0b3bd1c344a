//! What the driver remembers of one disk.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::parameters::Size;
use super::volume::Volume;
use crate::drivers::Pool;

/// The driver's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The disk's volume.
    pub origin: Volume,
    /// The snapshot, which may not be there yet or any more.
    pub snapshot: Volume,
    /// Whether the origin's data is in a thin pool; `size` means nothing then.
    pub thin: bool,
    /// Space for a thick snapshot's changes.
    pub size: Option<Size>,
    /// The device that QEMU writes to.
    pub device: PathBuf,
    /// For a thick snapshot, in bytes: what it takes of the group, and what was free there, when `prepare` looked.
    pub needs: Option<Needs>,
    /// For a thin snapshot: its pool, when `prepare` looked.
    #[serde(default)]
    pub pool: Option<Pool>,
}

/// Space in a volume group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Needs {
    /// What one snapshot takes.
    pub bytes: u64,
    /// What is free.
    pub free: u64,
}
