//! The last step of a merge below a disk's own layer: it is taken once all that was merged is on disk.
//!
//! QEMU rewrites the header of the image above first, and writes out the tables of the image that was merged into after
//! it. If it died in between, or the host did, the header would lead past data that is in no table, and a VM that is
//! started before the deletion is gone on with would read old blocks, and write on. So the job waits before this step.

use freezeframe_qemu::{Node, Qmp};

use super::at_rest;
use super::state::State;
use crate::drivers::jobs::{self, Wanted};
use crate::drivers::{Result, qemu};
use crate::hypervisor::QMP_TIMEOUT;
use crate::hypervisor::image::ImageDirectory;

/// Has what was merged into `base` on disk, then lets the job change the graph and the header; returns once it is over.
pub async fn finalize(qmp: &Qmp, directory: &ImageDirectory, state: &State, base: &Node) -> Result<()> {
    let job = state.job();
    // One that an older agent began doesn't wait.
    let is_pending = jobs::find(qmp, &job).await?.is_some_and(|job| job.status == "pending");
    if is_pending {
        if let Err(error) = write_out(qmp, directory, state, base).await {
            // Left waiting, it would be in the way of every other.
            jobs::cancel(qmp, &job).await?;
            return Err(error);
        }
        crate::crash::point("merge-written-out");
        qmp.job_finalize(&job, QMP_TIMEOUT).await.map_err(qemu(format!("finish {job}")))?;
    }
    jobs::wait(qmp, &job, Wanted::Concluded).await?;
    crate::crash::point("merge-concluded");
    Ok(())
}

async fn write_out(qmp: &Qmp, directory: &ImageDirectory, state: &State, base: &Node) -> Result<()> {
    // From here first: while QEMU flushes, its main loop stands still.
    directory.sync_file(&state.layer)?;
    // A raw image has nothing in memory.
    if base.driver == "raw" { Ok(()) } else { at_rest::flush(qmp, base).await }
}
