//! What drivers tell of the space that snapshots take.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Space that one disk's snapshot takes at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// A directory on the file system.
    pub directory: PathBuf,
    /// How much, in bytes.
    pub bytes: u64,
}

/// How full the space is that a snapshot's changes take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fill {
    /// Percent in use; of a pool, of its data or its metadata, whichever is fuller.
    pub percent: f64,
    /// Whether it was used up, so that the snapshot is worth nothing.
    pub overflowed: bool,
    /// Whether that is more than the class finds good.
    pub low: bool,
}

/// A thin pool, and what it has beyond what the class keeps free.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    /// Which.
    pub path: PathBuf,
    /// Room for data, in bytes.
    pub data: u64,
    /// Room for its own metadata, in bytes.
    pub metadata: u64,
    /// Bytes of data that it gives out at once.
    pub chunk: u64,
}

/// A thin pool, and how much of it is free, in whole percents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolFree {
    /// Which.
    pub path: PathBuf,
    /// Of its space for data.
    pub data: u64,
    /// Of its space for its own metadata.
    pub metadata: u64,
}
