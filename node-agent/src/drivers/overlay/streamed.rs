//! What was streamed up into a layer is on disk before the file that it came from can go.
//!
//! Into the layer that the VM runs on, which stays writable, QEMU streams without flushing it, and yet rewrites its header
//! at the end: if QEMU died then, the header would lead past data that is in no table. So the job waits before that last
//! step.

use freezeframe_qemu::Node;

use super::at_rest;
use super::place::name_of;
use super::state::State;
use crate::drivers::jobs::Wanted;
use crate::drivers::{DriverError, Env, Result, qemu};
use crate::hypervisor::image::ImageDirectory;
use crate::hypervisor::{QMP_TIMEOUT, Vm};

/// Ends a stream into the VM's own layer that was told to wait before its last step.
pub async fn finish(env: &Env<'_>, vm: &Vm, directory: &ImageDirectory, state: &State, layer: &Node) -> Result<()> {
    env.pace.wait(vm.qmp(), &state.job(), Wanted::Pending).await?;
    // From here first: while QEMU flushes, its main loop stands still.
    sync(directory, state)?;
    at_rest::flush(vm, layer).await?;
    crate::crash::point("streamed");
    vm.qmp().job_finalize(&state.job(), QMP_TIMEOUT).await.map_err(qemu("finish a stream"))
}

/// Makes durable what was streamed, and the header that no longer names the file that it came from.
pub fn sync(directory: &ImageDirectory, state: &State) -> Result<()> {
    let Some(into) = state.streamed_into else { return Ok(()) };
    match name_of(directory, Some(into)) {
        Ok(name) => Ok(directory.sync_file(&name)?),
        // Merged itself since then.
        Err(DriverError::NotNow(_)) => Ok(()),
        Err(error) => Err(error),
    }
}
