//! The conformance suite of storage drivers: every driver of `drivers::registry()`, and what it must do.
//!
//! A new driver is covered by its registry line and one line in [`cases::NEEDS`]. The parts are real: a QEMU with no
//! guest but its BIOS, whose devices the tests write and read through a monitor of their own; a guard; XFS and btrfs
//! on loop devices. It needs root, `qemu-system-x86_64`, `qemu-utils`, `xfsprogs` and `btrfs-progs`, and fails without.
//! `CONFORMANCE_DRIVER=name` runs one driver alone.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod cases;
mod chains;
mod content;
mod instant;
mod loopcopy;
mod machine;
mod shapes;
mod snapshots;
mod steps;
mod storage;
mod world;
