//! Makes a bare Debian 12 with Rust and Go ready for the end-to-end tests, as root: packages, control plane, guest,
//! node VM.

mod control_plane;
mod guest;
mod initramfs;
mod node_vm;
mod packages;
mod stamp;

use anyhow::{Result, ensure};
use freezeframe_e2e::Cache;

use crate::progress::say;

/// Does what is missing, and only that.
pub fn run() -> Result<()> {
    prepare(true, true)
}

/// The same without the node VM, which the demo and the benchmark have no use for.
pub fn run_without_node_vm() -> Result<()> {
    prepare(true, false)
}

/// The same without a control plane of our own, for one who brings a cluster.
pub fn run_for_a_guest() -> Result<()> {
    prepare(false, false)
}

fn prepare(control_plane: bool, node_vm: bool) -> Result<()> {
    let cache = Cache::locate()?;
    say(format_args!("setup: into {}", cache.root().display()));
    let debian = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    ensure!(debian.contains("VERSION_CODENAME=bookworm"), "setup knows Debian 12 (bookworm) alone");
    let mut apt = packages::Apt::default();
    apt.install_missing()?;
    if control_plane {
        control_plane::build(&cache)?;
    }
    guest::build(&cache, &mut apt)?;
    if node_vm {
        node_vm::build(&cache, &mut apt)?;
    }
    say("setup: done");
    Ok(())
}
