//! The driver `lvm` against real logical volumes, in the node VM: this host needs no device-mapper.
//!
//! What is tested is in `node-agent/tests/lvm`; here it is built, put into the VM and run there as root.

#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use freezeframe_e2e::{Cache, NodeVm, NodeVmConfig};

/// The one test of each run: both kinds of volume, one cut, what it kept, and its removal.
const ONE: &str = "thin_and_thick_volumes_of_one_group_are_cut_in_one_pause_and_keep_what_was_before_it";
/// Emulated in an emulator, on a machine that does other things too.
const SUITE: Duration = Duration::from_secs(7200);
const OWN_PACKAGE: [&str; 4] = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CRATE_", "CARGO_BIN_"];

#[tokio::test(flavor = "multi_thread")]
async fn the_lvm_driver_passes_its_suite_on_a_node_with_real_volumes() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let cache = Cache::locate()?;
    let config = NodeVmConfig {
        directory: directory.path().to_owned(),
        memory_mib: 2048,
        data_mib: 2048,
        share: vec![
            (build_suite()?, "lvm".to_owned()),
            (cache.guest_file("vmlinuz")?, "vmlinuz".to_owned()),
            (cache.guest_file("initrd")?, "initrd".to_owned()),
        ],
    };
    let mut node = NodeVm::boot(&config).await?;
    // `LVM_TEST` runs some of its tests alone, to work on them.
    let chosen = if cfg!(feature = "node-vm") { "" } else { ONE };
    let only = std::env::var("LVM_TEST").unwrap_or_else(|_| chosen.to_owned());
    let suite = format!("/share/lvm --test-threads=1 --nocapture {only}");
    let environment = "LVM_TEST_DISK=/dev/vdb FREEZEFRAME_CACHE=/tmp/cache RUST_BACKTRACE=0";
    // On the console it can be read before the end.
    let command = format!("set -o pipefail; {environment} {suite} 2>&1 | tee /dev/console");
    let ended = node.ask(&command, SUITE).await?;
    println!("{}", ended.output);
    ensure!(ended.code == 0, "the suite ended with {}", ended.code);
    ensure!(!ended.output.contains("test result: ok. 0 passed"), "no test of the suite is called `{only}`");
    Ok(())
}

/// The suite's executable. It isn't part of `cargo test`, so nobody has built it yet.
fn build_suite() -> Result<PathBuf> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    // What `cargo xtask test` chooses for all tests, or kube would be built anew.
    cargo.args([
        "test",
        "--no-run",
        "--message-format=json-render-diagnostics",
        "--workspace",
        "--exclude",
        "freezeframe-e2e",
    ]);
    cargo.args(["--features", "freezeframe-node-agent/crash-points", "--test", "lvm"]);
    // What cargo told this test of the package it is in: build scripts that look at it would run again.
    for (name, _) in std::env::vars().filter(|(name, _)| OWN_PACKAGE.iter().any(|prefix| name.starts_with(prefix))) {
        cargo.env_remove(name);
    }
    let output = cargo.output().context("starting cargo")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let messages = String::from_utf8(output.stdout)?;
    let executable = |line: &str| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let path = message["target"]["name"].eq("lvm").then(|| message["executable"].as_str())??;
        Some(PathBuf::from(path))
    };
    messages.lines().find_map(executable).context("cargo built no executable `lvm`")
}
