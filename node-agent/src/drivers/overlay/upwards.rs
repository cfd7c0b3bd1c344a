//! Copying what images hold up into the layer above them, and leaving them out of the chain.
//!
//! QEMU changes the layer's header before it writes out the tables of what it copied: if it died in between, the header
//! would lead past data that is in no table. So the job waits before its last step until all of it is on disk. Cut off
//! anywhere, it is begun anew.

use std::ops::Range;

use freezeframe_qemu::Node;
use serde_json::json;

use super::at_rest;
use super::place::{Place, name_of};
use super::state::State;
use crate::drivers::jobs::{self, Wanted};
use crate::drivers::{DriverError, Env, Result, qemu};
use crate::hypervisor::device;
use crate::hypervisor::filesystem::Room;
use crate::hypervisor::graph::NodeFile;
use crate::hypervisor::image::ImageDirectory;
use crate::hypervisor::{QMP_TIMEOUT, Vm};

/// What is copied where.
pub struct Upwards<'a> {
    /// The job's id.
    pub job: &'a str,
    /// The chain.
    pub place: &'a Place<'a>,
    /// Where in it the layer is that is copied into.
    pub into: usize,
    /// Where in it the first image is that stays below, and what the layer's header is to call it; none for no image.
    pub base: Option<(usize, String)>,
    /// Where the layer's file is.
    pub directory: &'a ImageDirectory,
}

impl Upwards<'_> {
    /// Copies, and returns once the layer's header says so and the copied data is on disk; the header must yet be synced.
    pub async fn copy(&self, env: &Env<'_>, vm: &Vm) -> Result<()> {
        // Another life of this agent may have begun it.
        jobs::cancel(vm.qmp(), self.job).await?;
        self.place.renew(env, vm).await?;
        self.start(vm, env.pace.speed).await?;
        env.pace.wait(vm.qmp(), self.job, Wanted::Pending).await?;
        if let Err(error) = self.write_out(env, vm).await {
            // Left waiting for its last step, it would be in the way of every other.
            jobs::cancel(vm.qmp(), self.job).await?;
            return Err(error);
        }
        crate::crash::point("copied-upwards");
        vm.qmp().job_finalize(self.job, QMP_TIMEOUT).await.map_err(qemu(format!("finish {}", self.job)))?;
        jobs::wait(vm.qmp(), self.job, Wanted::Gone).await?;
        crate::crash::point("left-out");
        Ok(())
    }

    /// Has all of what was copied on disk while the job waits. A layer below the disk's own may be one that QEMU named
    /// itself and doesn't reopen for us: but the end of a job makes it read-only, which writes it out, and another job
    /// finds nothing to copy.
    async fn write_out(&self, env: &Env<'_>, vm: &Vm) -> Result<()> {
        // From here first: while QEMU flushes, its main loop stands still.
        match self.place.file(self.into) {
            Some(NodeFile::Device { path, .. }) => device::sync(path)?,
            _ => self.directory.sync_file(&name_of(self.directory, self.place.id(self.directory, self.into))?)?,
        }
        if self.into == 0 {
            return at_rest::flush(vm, self.layer()).await;
        }
        jobs::cancel(vm.qmp(), self.job).await?;
        if !at_rest::is_read_only(vm, self.layer()).await? {
            let why = "was left writable by QEMU, so it isn't known whether all of it is on disk";
            return Err(DriverError::NotNow(format!("{} {why}", self.layer().file)));
        }
        self.place.renew(env, vm).await?;
        self.start(vm, 0).await?;
        jobs::wait(vm.qmp(), self.job, Wanted::Pending).await
    }

    fn layer(&self) -> &Node {
        self.place.chain[self.into]
    }

    /// Dismissed by itself: on QEMU 7.2 a finished stream in the list of jobs leads to nodes that are freed already, and
    /// the next look at the block graph would end QEMU.
    async fn start(&self, vm: &Vm, speed: u64) -> Result<()> {
        let mut job = json!({
            "job-id": self.job,
            "device": self.layer().name,
            "speed": speed,
            "auto-finalize": false,
            "auto-dismiss": true,
        });
        if let Some((base, name)) = &self.base {
            job["base-node"] = self.place.chain[*base].name.clone().into();
            job["backing-file"] = name.clone().into();
        }
        vm.qmp().block_stream(&job, QMP_TIMEOUT).await.map_err(qemu(format!("start {}", self.job)))
    }
}

/// Whether a layer can be copied into: QEMU reopens it writable by our descriptor, or by a name that still leads to it.
/// That QEMU gave the node its name is no hindrance: it doesn't let its options be changed, but writes it out as it makes
/// it read-only again, which is waited for before the header changes. The disk's own is written out by changing them.
pub fn may_take(place: &Place<'_>, at: usize) -> bool {
    let known = matches!(place.file(at), Some(NodeFile::Pinned { .. } | NodeFile::Named { .. }));
    known && may_take_itself(place, at)
}

/// The same for a layer whose file, or device, is known.
pub fn may_take_itself(place: &Place<'_>, at: usize) -> bool {
    let node = place.chain[at];
    node.driver == "qcow2" && (at > 0 || at_rest::may_be_reopened(node))
}

/// All that is copied must fit, and leave as much free as the classes want.
pub fn room(env: &Env<'_>, place: &Place<'_>, images: Range<usize>, directory: &ImageDirectory) -> Result<()> {
    let copied: u64 = place.chain[images].iter().map(|image| image.actual_size).sum();
    let Some(room) = Room::of(directory.path()) else { return Ok(()) };
    let kept = env.pace.keep.iter().map(|keep| keep.of(room.total)).max().unwrap_or(0);
    let needed = copied.saturating_add(kept);
    if room.free >= needed {
        return Ok(());
    }
    Err(DriverError::NoSpace { path: directory.path().to_owned(), needed, free: room.free })
}

/// Makes durable what was copied up from a snapshot's file, and the header that no longer names that file.
pub fn sync(directory: &ImageDirectory, state: &State) -> Result<()> {
    let Some(into) = state.streamed_into else { return Ok(()) };
    match name_of(directory, Some(into)) {
        Ok(name) => Ok(directory.sync_file(&name)?),
        // Merged itself since then.
        Err(DriverError::NotNow(_)) => Ok(()),
        Err(error) => Err(error),
    }
}
