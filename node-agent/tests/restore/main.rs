//! Restores on real storage: in place and to new VMs, of every driver's snapshots, killed at every effect.
//!
//! The VM is the conformance suite's: a QEMU with no guest but its BIOS. It needs root, `qemu-system-x86_64`,
//! `qemu-utils`, `xfsprogs` and `btrfs-progs`, and fails without.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

#[allow(dead_code, reason = "shared with the conformance suite")]
#[path = "../conformance/cases.rs"]
mod cases;
#[allow(dead_code, reason = "shared with the conformance suite")]
#[path = "../conformance/content.rs"]
mod content;
#[path = "../conformance/loader.rs"]
mod loader;
#[path = "../conformance/loopcopy.rs"]
mod loopcopy;
#[allow(dead_code, reason = "shared with the conformance suite")]
#[path = "../conformance/machine.rs"]
mod machine;
#[path = "../conformance/snapshot_order.rs"]
mod snapshot_order;
#[allow(dead_code, reason = "shared with the conformance suite")]
#[path = "../conformance/storage.rs"]
mod storage;
#[allow(dead_code, reason = "shared with the conformance suite")]
#[path = "../conformance/world.rs"]
mod world;

mod copying;
#[cfg(feature = "crash-points")]
mod crashes;
mod dependence;
mod elsewhere;
mod in_place;
mod lab;
mod meanwhile;
mod node;
mod order;
mod refusals;
mod to_new;
