//! Running a command-line tool to its end.

use std::ffi::OsStr;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Runs `program` and returns what it printed on stdout; an exit code other than 0 is an error with all it said.
pub fn run<A: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = A>) -> Result<String> {
    run_command(Command::new(program).args(arguments))
}

/// As [`run`], for a command with its own directory or environment.
pub(crate) fn run_command(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("{command:?}: {}\n{stdout}{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(stdout)
}

/// Runs a checker whose exit code is its answer, and returns code and everything it printed.
pub(crate) fn ask<A: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = A>) -> Result<(i32, String)> {
    let mut command = Command::new(program);
    let output = command.args(arguments).output().with_context(|| format!("starting {program}"))?;
    let code = output.status.code().with_context(|| format!("{program} was killed by a signal"))?;
    let text = [output.stdout, output.stderr].concat();
    Ok((code, String::from_utf8_lossy(&text).into_owned()))
}
