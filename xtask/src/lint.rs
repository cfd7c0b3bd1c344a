//! Formatting and clippy.

use anyhow::Result;

use crate::progress::{self, cargo, line, say};

/// Fails on the first file that is not formatted and on any warning.
pub fn run() -> Result<()> {
    for arguments in [
        "fmt --all --check",
        "clippy --quiet --workspace --all-targets --features freezeframe-node-agent/crash-points -- -D warnings",
        // No target of `cargo test`, so none of `--all-targets`.
        "clippy --quiet --workspace --exclude freezeframe-e2e --test lvm --features freezeframe-node-agent/crash-points -- -D warnings",
    ] {
        let mut command = cargo();
        command.args(arguments.split(' '));
        say(format_args!("lint: {}", line(&command)));
        progress::run(&mut command)?;
    }
    Ok(())
}
