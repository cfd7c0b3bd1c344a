//! The one error type of all drivers; callers match on kinds.

use std::path::PathBuf;

use crate::hypervisor::graph::HandOverError;
use crate::hypervisor::image::ImageError;
use crate::hypervisor::qcow2::HeaderError;

/// What can go wrong in a driver.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// A class parameter can't be used.
    #[error("parameter `{key}`: {why}")]
    Parameter {
        /// The parameter.
        key: String,
        /// What is wrong with it.
        why: String,
    },
    /// The file that the user made can't be used.
    #[error("target {path}: {why}")]
    Target {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Not enough space.
    #[error("not enough space for {path}: {needed} bytes are needed, {free} are free")]
    NoSpace {
        /// What was to be made.
        path: PathBuf,
        /// How much it needs, in bytes.
        needed: u64,
        /// How much is free, in bytes.
        free: u64,
    },
    /// QEMU refused or didn't answer.
    #[error("failed to {doing}")]
    Qemu {
        /// What we were doing.
        doing: String,
        /// QEMU's answer.
        #[source]
        source: freezeframe_qemu::Error,
    },
    /// A file couldn't be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A file couldn't be handed to QEMU.
    #[error(transparent)]
    HandOver(#[from] HandOverError),
    /// An image's header couldn't be read.
    #[error("failed to read {path}")]
    Header {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: HeaderError,
    },
    /// A tool of QEMU's failed.
    #[error("{tool} failed: {output}")]
    Tool {
        /// Which.
        tool: &'static str,
        /// What it said.
        output: String,
    },
    /// A block job failed or made no progress.
    #[error("block job {job} failed: {why}")]
    Job {
        /// The job.
        job: String,
        /// Why.
        why: String,
    },
    /// An artifact isn't what it should be.
    #[error("{0}")]
    Verify(String),
    /// It can't be done now, but may be later.
    #[error("{0}")]
    NotNow(String),
    /// A merge was cancelled for it.
    #[error("a snapshot of the VM goes first")]
    MadeWay,
    /// The journal holds something that this driver didn't write.
    #[error("the record of disk {disk} can't be read")]
    State {
        /// The disk.
        disk: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

impl DriverError {
    /// Whether the VM, or the directory of its images, couldn't be reached: that says nothing of what is there.
    #[must_use]
    pub fn is_out_of_reach(&self) -> bool {
        match self {
            Self::Qemu { source, .. } => source.class().is_none(),
            Self::Image(error) => matches!(error, ImageError::MaybeUnmounted { .. } | ImageError::Empty(_)),
            _ => false,
        }
    }
}

/// Result of a driver's function.
pub type Result<T> = std::result::Result<T, DriverError>;
/// Names what was being done when QEMU refused.
pub(crate) fn qemu(doing: impl Into<String>) -> impl FnOnce(freezeframe_qemu::Error) -> DriverError {
    let doing = doing.into();
    move |source| DriverError::Qemu { doing, source }
}
