//! Programs that drivers run, outside the window: bounded, never through a shell.

use std::path::{Path, PathBuf};
use std::process::Stdio;
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

/// Runs a program to its end, or says what it said.
async fn run(mut command: Command, bound: Duration) -> std::result::Result<(), String> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    match tokio::time::timeout(bound, command.output()).await {
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no end after {bound:?}")),
    }
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
