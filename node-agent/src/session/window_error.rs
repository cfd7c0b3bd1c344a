//! How a window can fail.

use std::time::Duration;

use freezeframe_guard::client::Error as GuardError;
use freezeframe_qemu::Error as QemuError;

use crate::causes::chain;
use crate::drivers::DriverError;

/// Why a window ended without a cut, or with one that isn't worth its name.
#[derive(Debug, thiserror::Error)]
pub enum WindowError {
    /// The guard didn't take the window on.
    #[error("the guard can't be reached or refused; without it no guest is frozen")]
    Arm(#[source] GuardError),
    /// The guard went away in the middle.
    #[error("the guard was lost while the window was open")]
    GuardLost,
    /// The guest refused to freeze.
    #[error("the guest agent failed to freeze the file systems")]
    Freeze(#[source] QemuError),
    /// The guest didn't freeze in time.
    #[error("the guest did not freeze its file systems within {0:?}")]
    FreezeTimeout(Duration),
    /// The freeze covered too little.
    #[error("the guest froze {frozen} file systems, {wanted} were named (0: at least one)")]
    FrozeTooLittle {
        /// How many were frozen.
        frozen: u64,
        /// How many mount points were named.
        wanted: usize,
    },
    /// Pausing failed.
    #[error("failed to pause the virtual CPUs")]
    Pause(#[source] QemuError),
    /// The transaction failed.
    #[error("QEMU refused the cut")]
    Cut(#[source] QemuError),
    /// The cut didn't end within the hold.
    #[error("the cut was not done within {0:?}")]
    HoldExceeded(Duration),
    /// A cut outside QEMU failed.
    #[error("failed to cut {0}")]
    HostCut(String, #[source] Box<DriverError>),
    /// A name couldn't change hands.
    #[error("failed to give the new layer the disk's name")]
    Exchange(#[source] freezeframe_guard::ExchangeError),
    /// It isn't known whether the cut took place, and the names are as they were; the guard goes on.
    #[error("the block graph can't be read after a failed cut; the guard goes on")]
    Look(#[source] QemuError),
    /// The guest wasn't seen thawed; the guard goes on.
    #[error("the guest was not seen thawed; the guard goes on thawing it")]
    ThawOwed(#[source] QemuError),
    /// The VM wasn't seen running again; the guard goes on.
    #[error("the virtual CPUs could not be resumed; the guard goes on")]
    ResumeOwed(#[source] QemuError),
    /// The last step of a merge failed.
    #[error("the merge's last step failed")]
    Switch(#[source] DriverError),
    /// One thing went wrong, and then the guest couldn't be let go.
    #[error("{}; and then {}", chain(cause), chain(owed))]
    Owed {
        /// What went wrong first.
        cause: Box<WindowError>,
        /// Why the guard goes on.
        owed: Box<WindowError>,
    },
}

impl WindowError {
    /// Whether nothing but the freeze went wrong, so that a cut without it may be tried. Not if the thaw is owed: the
    /// guard has the VM then.
    #[must_use]
    pub fn is_of_the_freeze(&self) -> bool {
        matches!(self, Self::Freeze(_) | Self::FreezeTimeout(_) | Self::FrozeTooLittle { .. })
    }
}
