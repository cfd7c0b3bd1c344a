//! The cluster controller of Freezeframe: turns a `VMSnapshot` into a work order for the node that runs its VM, and
//! carries what the node reports back to the user. It holds no state of its own.

pub mod args;
pub mod caches;
pub mod clock;
pub mod content;
pub mod context;
pub mod controllers;
pub mod error;
pub mod events;
#[cfg(test)]
mod fixtures;
pub mod leader;
pub mod metrics;
pub mod restore;
mod retention;
pub mod retries;
pub mod schedule;
pub mod vmsnapshot;
mod wakes;
pub mod written;
