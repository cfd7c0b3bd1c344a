//! What was copied up into a layer, and its header, are on disk before the file that the data came from goes.

use super::place::name_of;
use super::state::State;
use crate::drivers::{DriverError, Result};
use crate::hypervisor::image::ImageDirectory;

/// Makes durable what was copied, and the header that no longer names the file that it came from. Also for an agent that
/// begins after the copying: another one may have died ahead of this.
pub fn sync(directory: &ImageDirectory, state: &State) -> Result<()> {
    let Some(into) = state.streamed_into else { return Ok(()) };
    match name_of(directory, Some(into)) {
        Ok(name) => Ok(directory.sync_file(&name)?),
        // Merged itself since then.
        Err(DriverError::NotNow(_)) => Ok(()),
        Err(error) => Err(error),
    }
}
