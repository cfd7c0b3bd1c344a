//! A merge whose end nobody saw: whether the file that was merged into really has the data.
//!
//! The header of the layer above is rewritten once all is on disk ([`super::finalize`]). An older agent had QEMU rewrite it
//! before that: if it died in between, or the host did, the headers say that the merge is done, and the data isn't there.
//! The file that the data came from still is, and nobody needs it any more but for this.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::state::{Merging, State};
use crate::drivers::tool::look;
use crate::drivers::{DriverError, Env, Result};
use crate::hypervisor::device::number_of;
use crate::hypervisor::image::ImageDirectory;

/// Both files are read in full, and a layer may have terabytes.
const LONGEST: Duration = Duration::from_secs(6 * 3600);

/// Whether the merged file reads as the file that it was merged from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Comparison {
    Same,
    Different,
}

/// Fails unless the merge has all data. While the VM is stopped, what is missing is merged once more.
/// It makes way for a snapshot while it compares, as a merge does.
pub async fn prove(env: &Env<'_>, directory: &ImageDirectory, state: &State, merging: &Merging) -> Result<()> {
    if merging.seen || !directory.holds(&merging.above, merging.above_id)? {
        return Ok(());
    }
    let compared = tokio::select! {
        biased;
        () = env.pace.waiting.for_snapshot() => return Err(DriverError::MadeWay),
        compared = compare(directory, state, merging) => compared?,
    };
    if compared == Comparison::Same {
        return Ok(());
    }
    let above = directory.join(&merging.above);
    if env.vm.is_some() {
        let why = "has data that a merge which was cut off has lost: stop the VM, and it is merged once more";
        return Err(DriverError::NotNow(format!("{} {why}", above.display())));
    }
    tracing::warn!(file = %above.display(), "a merge that was cut off had lost data; merging once more");
    let ended = look(&["commit", "-q", "-d", "-f", "qcow2"], &above, &[], LONGEST).await?;
    match ended.code {
        Some(0) => directory.sync_file(&state.layer).map_err(DriverError::from),
        _ => Err(DriverError::NotNow(format!("{} can't be merged once more: {}", above.display(), ended.said))),
    }
}

async fn compare(directory: &ImageDirectory, state: &State, merging: &Merging) -> Result<Comparison> {
    let (above, merged) = (directory.join(&merging.above), directory.join(&state.layer));
    let mut over = unlocked(&above, "qcow2");
    over["backing"] = unlocked(&merged, &state.format);
    let (one, other) = (format!("json:{over}"), format!("json:{}", unlocked(&merged, &state.format)));
    let ended = look(&["compare", "-q", "-U"], Path::new(&one), &[&other], LONGEST).await?;
    match ended.code {
        Some(0) => Ok(Comparison::Same),
        Some(1) => Ok(Comparison::Different),
        _ => Err(DriverError::NotNow(format!(
            "{} can't be compared with what it was merged into: {}",
            above.display(),
            ended.said
        ))),
    }
}

/// An image as `qemu-img` opens it while a QEMU has locks on it that it left behind at a merge. Neither file is written
/// any more: the one is no longer in the chain, the other is a snapshot.
fn unlocked(image: &Path, format: &str) -> Value {
    let protocol = if number_of(image).is_ok() { "host_device" } else { "file" };
    json!({"driver": format, "file": {"driver": protocol, "filename": image, "locking": "off"}})
}
