//! Telling what is being done, and how long after the start.

use std::fmt::Display;
use std::process::Command;
use std::sync::OnceLock;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

/// Prints one line with the seconds since the first one.
pub fn say(what: impl Display) {
    static START: OnceLock<Instant> = OnceLock::new();
    let elapsed = START.get_or_init(Instant::now).elapsed();
    println!("[{:7.1} s] {what}", elapsed.as_secs_f64());
}

/// Runs a command with its output on ours; an exit code other than 0 is an error that names it.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting {}", line(command)))?;
    ensure!(status.success(), "{}: {status}", line(command));
    Ok(())
}

/// Runs a command and returns its stdout.
pub fn capture(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("starting {}", line(command)))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {}\n{stderr}", line(command), output.status);
    String::from_utf8(output.stdout).with_context(|| format!("{} printed no text", line(command)))
}

/// The command as one would type it.
pub fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Cargo, the one that runs us.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// The top of the repository.
pub fn root() -> &'static std::path::Path {
    std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}
