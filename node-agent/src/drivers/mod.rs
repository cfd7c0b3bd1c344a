//! Storage drivers: how one disk's data is taken, kept and given up.
//!
//! A driver gets a group of disks and offers `plan`, `prepare`, `cut`, `complete` and `remove`. It knows nothing of
//! freezing, of Kubernetes or of other drivers. Every function may be called again after a crash at any point of it:
//! what is there already is found, not made twice. A new driver is one file and one line in [`registry()`].

pub mod btrfs;
pub mod choice;
pub mod copy;
mod cut;
mod driver;
mod error;
mod facts;
pub mod jobs;
pub mod lvm;
mod naming;
pub mod overlay;
mod pace;
pub(crate) mod quantity;
pub mod reflink;
mod registry;
mod removal;
mod space;
mod task;
mod tool;
pub(crate) mod verify;

pub use cut::{Cut, HostCut};
pub use driver::SnapshotDriver;
pub(crate) use driver::no_parameters;
pub(crate) use error::qemu;
pub use error::{DriverError, Result};
pub use facts::{ChainImage, DiskFacts, Verdict, Writers};
pub use pace::Pace;
pub use registry::{Drivers, registry};
pub use removal::{Env, Removal, Sibling, Switch};
pub use space::{Fill, Need, Pool, PoolFree};
pub use task::{Artifact, DiskTask, Layer};
pub(crate) use tool::{btrfs, qemu_img};
