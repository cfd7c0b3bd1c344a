//! The conformance suite of storage drivers: every driver of `drivers::registry()`, and what it must do.
//!
//! A new driver is covered by its registry line and one line in [`cases::NEEDS`]. The parts are real: a QEMU with no
//! guest but its BIOS, whose devices the tests write and read through a monitor of their own; a guard; XFS and btrfs
//! on loop devices. It needs root, `qemu-system-x86_64`, `qemu-utils`, `xfsprogs` and `btrfs-progs`, and fails without.
//! `CONFORMANCE_DRIVER=name` runs one driver alone. It syncs much: with `TMPDIR` on a tmpfs it takes half the time.
//!
//! # What catches what
//!
//! Each was broken on purpose once, and these tests failed:
//!
//! - Cuts outside QEMU come before the pause, so QEMU's caches aren't flushed and the guest runs: `the_artifacts_keep_…`
//!   (qcow2 on reflink and btrfs), `cuts_that_are_far_apart_…`.
//! - reflink doesn't point clones at clones: `a_backing_file_named_by_its_whole_path_…`, `snapshots_of_several_drivers_…`.
//! - btrfs takes its snapshot in `prepare`, not in the window: `the_artifacts_keep_…`, `every_function_…`.
//! - overlay doesn't exchange the names: `the_artifacts_keep_…`, `every_function_…`.
//! - copy doesn't wait for its job: `every_function_…`.
//! - Nothing looks whether the file system is mounted: `a_snapshot_whose_file_system_is_not_mounted_…` (reflink, btrfs,
//!   copy, loopcopy).
//! - A removal doesn't write down that it began: `a_removal_that_left_its_directory_empty_…`.
//! - Exchanges don't wait for each other's lock: `snapshots_of_several_drivers_…` now and then, the guard's own always.
//!
//! Not caught: reflink without its `fdatasync`. Cloning writes out what is dirty by itself on XFS and btrfs; the call
//! is there for the error that it would report.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod cases;
mod chains;
mod content;
mod copies;
mod counting;
mod full;
mod hostile;
mod instant;
mod loopcopy;
mod machine;
mod merges;
mod shapes;
mod snapshot_order;
mod snapshots;
mod space;
mod steps;
mod stopped;
mod storage;
mod unmounted;
mod verify;
mod world;
