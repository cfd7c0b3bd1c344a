//! The overlay driver on a real QEMU with a guard, without a guest: patterns instead of file systems, every order
//! instead of a few, a crash at every await instead of at a named one.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "the helpers of a test fail as the test does")]

#[cfg(feature = "crash-points")]
mod between;
mod crashes;
mod follow;
mod governor;
mod lab;
mod machine;
mod names;
mod orders;
mod refusals;
#[path = "../restore/order.rs"]
mod restore_order;
mod sequences;
mod shapes;
#[path = "../conformance/snapshot_order.rs"]
mod snapshot_order;
mod stopped;
mod templates;
mod ways;
