//! Programs that drivers run, outside the window: bounded, never through a shell.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::process::Command;

use super::{DriverError, Result};
use crate::hypervisor::image::ImageDirectory;

/// Bound of one run of `qemu-img` on an image's metadata.
const METADATA_TIMEOUT: Duration = Duration::from_secs(60);
/// Deleting a subvolume is done when the kernel has cleaned it up; with many extents that takes long.
const DELETE_TIMEOUT: Duration = Duration::from_secs(300);

/// Runs `qemu-img` with arguments, an image and what follows it.
pub(crate) async fn qemu_img(
    arguments: &[&str],
    image: &Path,
    after: Option<&str>,
) -> std::result::Result<(), ToolError> {
    let mut command = Command::new("qemu-img");
    command.args(arguments).arg(image).args(after);
    run(command, METADATA_TIMEOUT).await.map_err(|output| ToolError { image: image.to_owned(), output })
}

/// Runs `btrfs` with arguments and a path.
pub(crate) async fn btrfs(arguments: &[&str], path: &Path) -> Result<()> {
    let mut command = Command::new("btrfs");
    command.args(arguments).arg("--").arg(path);
    run(command, DELETE_TIMEOUT).await.map_err(|output| DriverError::Tool { tool: "btrfs", output })
}

/// Runs `qemu-img` on an image that something else may have open, to whatever end; nothing is written.
pub(crate) async fn look(arguments: &[&str], image: &Path, after: &[&str], bound: Duration) -> Result<Ended> {
    let mut command = Command::new("qemu-img");
    command.args(arguments).arg(image).args(after);
    let ended = output(command, bound).await.map_err(|output| DriverError::Tool { tool: "qemu-img", output })?;
    Ok(Ended { code: ended.status.code(), said: said(&ended), printed: String::from_utf8_lossy(&ended.stdout).into() })
}

/// How a program ended.
pub(crate) struct Ended {
    /// Its exit code; none if a signal ended it.
    pub(crate) code: Option<i32>,
    /// What it wrote to its standard error.
    pub(crate) said: String,
    /// What it wrote to its standard output.
    pub(crate) printed: String,
}

/// Runs a program to its end, or says what it said.
async fn run(command: Command, bound: Duration) -> std::result::Result<(), String> {
    let ended = output(command, bound).await?;
    if ended.status.success() { Ok(()) } else { Err(said(&ended)) }
}

async fn output(mut command: Command, bound: Duration) -> std::result::Result<Output, String> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    match tokio::time::timeout(bound, command.output()).await {
        Ok(ended) => ended.map_err(|error| error.to_string()),
        Err(_) => Err(format!("no end after {bound:?}")),
    }
}

fn said(ended: &Output) -> String {
    String::from_utf8_lossy(&ended.stderr).trim().to_owned()
}

/// A run of `qemu-img` that failed.
pub(crate) struct ToolError {
    image: PathBuf,
    output: String,
}

impl ToolError {
    /// `qemu-img` tells a full disk in words only, so the free space is looked at instead.
    pub(crate) fn or_no_space(self, directory: &ImageDirectory) -> DriverError {
        const NEARLY_NOTHING: u64 = 1 << 20;
        match directory.free_bytes() {
            Ok(free) if free < NEARLY_NOTHING => {
                DriverError::NoSpace { path: self.image, needed: NEARLY_NOTHING, free }
            }
            _ => self.into(),
        }
    }
}

impl From<ToolError> for DriverError {
    fn from(error: ToolError) -> Self {
        Self::Tool { tool: "qemu-img", output: error.output }
    }
}
