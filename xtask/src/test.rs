//! All checks and tests in stages, cheapest first; the first that fails ends the run.

use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};

use crate::progress::{cargo, line, run as run_command, say};
use crate::{codegen, lint, setup};

/// What to leave out.
#[derive(clap::Args)]
pub struct Options {
    /// No end-to-end tests, and no setup for them
    #[arg(long)]
    quick: bool,
    /// Of the end-to-end tests this one topic alone: a file of e2e/tests, without .rs
    #[arg(long, conflicts_with = "quick")]
    topic: Option<String>,
    /// All of the LVM suite in a node VM and more random lives of overlay chains as well: half an hour more
    #[arg(long, conflicts_with = "quick")]
    all: bool,
}

/// Tests that passed and failed, by cargo test's own result lines.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
}

/// Lets the end-to-end tests crash the agent where they want.
const FEATURES: &str = "--features freezeframe-node-agent/crash-points";

/// A stage: what it is called, how one runs it alone, and what it does.
type Stage = (&'static str, String, Box<dyn FnOnce(&mut Tally) -> Result<()>>);

/// Runs the stages and prints `N passed, N failed` at last.
pub fn run(options: &Options) -> ExitCode {
    let stages = stages(options);
    let (count, mut tally, mut failure) = (stages.len(), Tally::default(), None);
    for (number, (name, rerun, stage)) in stages.into_iter().enumerate() {
        say(format_args!("stage {} of {count}: {name}", number + 1));
        if let Err(error) = stage(&mut tally) {
            failure = Some(error.context(format!("stage \"{name}\" failed; run it again with: {rerun}")));
            break;
        }
    }
    if let Some(error) = &failure {
        say(format_args!("{error:#}"));
    } else {
        say("all stages passed");
    }
    println!("{} passed, {} failed", tally.passed, tally.failed);
    if failure.is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn stages(options: &Options) -> Vec<Stage> {
    // Every stage selects the whole workspace with the same features: cargo would build kube anew for each other choice.
    let units = format!("test --no-fail-fast --workspace --exclude freezeframe-e2e {FEATURES}");
    let rerun_units = format!("cargo {units}");
    let lives = if options.all { "60" } else { "0" };
    let mut stages: Vec<Stage> = vec![
        ("format and clippy", "cargo xtask lint".into(), Box::new(|_| lint::run())),
        ("unit tests", rerun_units, Box::new(move |tally| tests(&units, lives, tally))),
        ("generated files", "cargo xtask codegen --check".into(), Box::new(|_| codegen::run(true))),
    ];
    if !options.quick {
        stages.insert(0, ("setup", "cargo xtask setup".into(), Box::new(|_| setup::run())));
        stages.push(end_to_end(options));
    }
    stages
}

fn end_to_end(options: &Options) -> Stage {
    let mut chosen = options.topic.as_ref().map(|topic| format!(" --test {topic}")).unwrap_or_default();
    if options.all {
        chosen += " --features node-vm";
    }
    // Each test has a control plane and guests of its own: more than two at once would only wait for one another.
    let arguments = format!("test --no-fail-fast --package freezeframe-e2e{chosen} -- --test-threads=2");
    let build = format!("build --workspace --bins {FEATURES}");
    let rerun = format!("cargo {build} && cargo {arguments}");
    let stage = move |tally: &mut Tally| {
        run_command(cargo().args(build.split(' ')))?;
        tests(&arguments, "0", tally)
    };
    ("end-to-end tests", rerun, Box::new(stage))
}

/// Runs cargo test, passing its output on and adding up its result lines; with so many random lives of overlay chains
/// beside the fixed ones.
fn tests(arguments: &str, lives: &str, tally: &mut Tally) -> Result<()> {
    let mut command = cargo();
    command.args(arguments.split(' ')).stdout(Stdio::piped()).env("CHAIN_LIVES", lives);
    // A test that returns an error would print where the error was made, fifty lines of it; panics still do.
    command.env("RUST_LIB_BACKTRACE", "0");
    let status = counted(&mut command, tally)?;
    if !status.success() {
        bail!("{}: {status}", line(&command));
    }
    Ok(())
}

fn counted(command: &mut Command, tally: &mut Tally) -> Result<std::process::ExitStatus> {
    let mut child = command.spawn().with_context(|| format!("starting {}", line(command)))?;
    let output = child.stdout.take().context("cargo has no output")?;
    for line in BufReader::new(output).lines() {
        let line = line?;
        println!("{line}");
        tally.add(&line);
    }
    Ok(child.wait()?)
}

impl Tally {
    /// `test result: ok. 3 passed; 0 failed; 0 ignored; ...`
    fn add(&mut self, line: &str) {
        let Some(result) = line.strip_prefix("test result: ") else { return };
        let words: Vec<&str> = result.split([' ', ';']).collect();
        let before = |word: &str| words.windows(2).find(|pair| pair[1] == word).and_then(|pair| pair[0].parse().ok());
        self.passed += before("passed").unwrap_or(0);
        self.failed += before("failed").unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use super::Tally;

    #[test]
    fn result_lines_are_added_up() {
        let mut tally = Tally::default();
        tally.add("running 4 tests");
        tally.add("test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s");
        tally.add("test result: FAILED. 10 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s");
        assert_eq!(tally, Tally { passed: 13, failed: 2 });
    }
}
