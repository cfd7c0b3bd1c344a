//! Copying what images hold up into the layer above them, and leaving them out of the chain.
//!
//! QEMU changes the layer's header before it writes out the tables of what it copied: if it died in between, the header
//! would lead past data that is in no table. So there are two jobs. The first copies, and is cancelled before its last
//! step; then the tables are written; the second finds nothing to copy and changes the header alone. Cut off anywhere, it
//! is begun anew.

use freezeframe_qemu::Node;
use serde_json::json;

use super::place::Place;
use super::prepare::cache_options;
use crate::drivers::jobs::{self, Wanted};
use crate::drivers::{DriverError, Env, Result, qemu};
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
}

impl Upwards<'_> {
    /// Copies, and returns once the layer's header says so and all of it is on its way to the disk: the file must be synced.
    pub async fn copy(&self, env: &Env<'_>, vm: &Vm) -> Result<()> {
        // Another life of this agent may have begun it.
        jobs::cancel(vm.qmp(), self.job).await?;
        self.place.renew(env, vm).await?;
        self.start(vm, env.pace.speed, false).await?;
        env.pace.wait(vm.qmp(), self.job, Wanted::Pending).await?;
        jobs::cancel(vm.qmp(), self.job).await?;
        self.write_tables(vm).await?;
        crate::crash::point("copied-upwards");
        self.place.renew(env, vm).await?;
        // There is nothing left to copy.
        self.start(vm, 0, true).await?;
        jobs::wait(vm.qmp(), self.job, Wanted::Gone).await?;
        crate::crash::point("left-out");
        Ok(())
    }

    fn layer(&self) -> &Node {
        self.place.chain[self.into]
    }

    /// Dismissed by itself: on QEMU 7.2 a finished stream in the list of jobs leads to nodes that are freed already, and
    /// the next look at the block graph would end QEMU.
    async fn start(&self, vm: &Vm, speed: u64, to_the_end: bool) -> Result<()> {
        let mut job = json!({
            "job-id": self.job,
            "device": self.layer().name,
            "speed": speed,
            "auto-finalize": to_the_end,
            "auto-dismiss": true,
        });
        if let Some((base, name)) = &self.base {
            job["base-node"] = self.place.chain[*base].name.clone().into();
            job["backing-file"] = name.clone().into();
        }
        vm.qmp().block_stream(&job, QMP_TIMEOUT).await.map_err(qemu(format!("start {}", self.job)))
    }

    /// Has QEMU write the tables of what was copied. A layer below the disk's own was made read-only by the job's end,
    /// which does; the disk's own stays writable.
    async fn write_tables(&self, vm: &Vm) -> Result<()> {
        let graph = vm.graph().await.map_err(qemu("read the block graph"))?;
        let name = &self.layer().name;
        let now = graph.node(name).ok_or_else(|| DriverError::Verify(format!("node {name} is gone")))?;
        if self.into > 0 && now.read_only {
            return Ok(());
        }
        reopen_as_it_is(vm, now, self.into > 0).await
    }
}

/// Reopening flushes, even if nothing changes by it.
async fn reopen_as_it_is(vm: &Vm, node: &Node, read_only: bool) -> Result<()> {
    let options = json!({
        "driver": node.driver,
        "node-name": node.name,
        "file": node.file_child,
        "backing": node.backing,
        "read-only": read_only,
        "cache": cache_options(node),
        "detect-zeroes": node.detect_zeroes,
        "discard": "unmap",
    });
    let reopened = vm.qmp().blockdev_reopen(&[options], QMP_TIMEOUT).await;
    reopened.map_err(qemu(format!("have the tables of {} written", node.name)))
}
