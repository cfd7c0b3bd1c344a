//! Everything one does with this repository, with nothing but cargo: `cargo xtask --help`.

mod bench;
mod codegen;
mod demo;
mod lint;
mod progress;
mod setup;
mod test;
mod watch;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Everything one does with this repository", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install and build what the end-to-end tests need; seconds when all is there
    Setup,
    /// Take a snapshot of a writing guest, before your eyes, and prove it
    Demo(demo::Options),
    /// Measure hold, freeze and the rest beside a bare QMP script
    Bench(bench::Options),
    /// Write CRDs and other generated files
    Codegen {
        /// Write nothing; fail if a file is not as it would be written
        #[arg(long)]
        check: bool,
    },
    /// Check formatting and run clippy
    Lint,
    /// Run all checks and tests, cheapest first
    Test(test::Options),
}

fn main() -> ExitCode {
    run(Arguments::parse().command).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Setup => setup::run()?,
        Command::Demo(options) => demo::run(&options)?,
        Command::Bench(options) => bench::run(&options)?,
        Command::Codegen { check } => codegen::run(check)?,
        Command::Lint => lint::run()?,
        Command::Test(options) => return Ok(test::run(&options)),
    }
    Ok(ExitCode::SUCCESS)
}
