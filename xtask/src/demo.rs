//! `cargo xtask demo`: one snapshot of a guest that keeps writing, from an empty machine to a proof.

mod cluster;
mod follow;
mod play;
mod proof;
mod stage;
mod summary;

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};

use crate::progress::{cargo, run as run_command, say};
use crate::setup;
use stage::Stage;

/// What to do differently.
#[derive(clap::Args)]
pub struct Options {
    /// Leave all of it running at the end, until Ctrl-C
    #[arg(long)]
    keep: bool,
    /// Use this cluster, in which Freezeframe is not installed, instead of building one; what was made there is removed
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// What the guest writes besides its records
    #[arg(long, value_enum, default_value_t)]
    load: Load,
}

/// The guest's write load.
#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
pub enum Load {
    /// Records alone, each synced to both disks
    #[default]
    Light,
    /// Two more writers that fill the page cache and never sync
    Heavy,
}

impl From<Load> for freezeframe_e2e::Load {
    fn from(load: Load) -> Self {
        match load {
            Load::Light => Self::Light,
            Load::Heavy => Self::Heavy,
        }
    }
}

/// Runs it; whatever happens, nothing is left.
pub fn run(options: &Options) -> Result<()> {
    if options.kubeconfig.is_some() {
        setup::run_for_a_guest()?;
    } else {
        setup::run_without_node_vm()?;
    }
    build_programs()?;
    Runtime::new()?.block_on(perform(options))
}

/// Builds the three programs, in the profile this one was built in: they are looked for beside it.
pub fn build_programs() -> Result<()> {
    say("building operator, node agent and guard (some minutes the first time)");
    let packages = ["freezeframe-operator", "freezeframe-node-agent", "freezeframe-guard"];
    let mut build = cargo();
    build.args(["build", "--bins"]).args(packages.iter().flat_map(|package| ["--package", package]));
    run_command(if cfg!(debug_assertions) { &mut build } else { build.arg("--release") })
}

async fn perform(options: &Options) -> Result<()> {
    let mut stage = Stage::new(options.kubeconfig.as_deref(), options.load.into())?;
    let mut asked_to_end = false;
    let outcome = tokio::select! {
        outcome = play::play(&mut stage, options.keep) => outcome,
        stop = interrupted() => {
            stop?;
            asked_to_end = true;
            Err(anyhow!("interrupted"))
        }
    };
    if asked_to_end {
        // Nothing went wrong that the programs could tell of.
    } else if outcome.is_err() {
        stage.print_logs();
    } else if options.keep {
        stage.print_what_to_try()?;
        interrupted().await?;
    }
    say("cleaning up");
    let cleared = stage.clear().context("cleaning up");
    outcome.and(cleared)?;
    say("done: nothing is left");
    Ok(())
}

/// Returns on Ctrl-C or SIGTERM.
async fn interrupted() -> Result<()> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    Ok(())
}
