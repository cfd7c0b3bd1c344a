//! The guard against scripted VMs: its promises, each with a failure that it has to survive.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "clippy's own exception covers test functions only")]

mod fake_vm;
mod harness;
mod obligations;
mod program;
mod real_qemu;
mod records;
mod windows;
