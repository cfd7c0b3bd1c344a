//! The cut of a stopped VM's disks: no guest to hold, so no window and no guard.
//!
//! The QEMU that has the disks is ours and writes nothing by itself. A crash between transaction and exchange leaves an
//! empty layer under a name that nobody uses, and the disks as they were.

use std::path::Path;
use std::time::{Duration, Instant};

use freezeframe_api::conditions::reasons;
use k8s_openapi::jiff::Timestamp;

use super::Sessions;
use super::host_cuts::host_cuts;
use super::machine::Machine;
use super::measured::{Measured, Offsets};
use super::order::Order;
use super::outcome::Failure;
use super::window::{Plan, WindowError};
use crate::causes::chain;
use crate::crash;
use crate::drivers::DiskTask;
use crate::hypervisor::disks::{FoundDisk, disks};

impl Sessions {
    /// Cuts the disks of a stopped VM, and makes sure that it was stopped all the time.
    pub(super) async fn still_cut(
        &self,
        machine: &Machine,
        order: &Order,
        plan: &Plan,
        tasks: &[DiskTask],
    ) -> Result<Measured, Failure> {
        self.still_stopped(order).await?;
        let sent = Instant::now();
        let layers = async {
            if plan.actions.is_empty() {
                return Ok(None);
            }
            let done = machine.vm().qmp().transaction(&plan.actions, plan.max_hold).await;
            done.map(|()| Some(Instant::now())).map_err(WindowError::Cut)
        };
        // A cut outside QEMU can't be stopped once it runs, so both are waited for whatever the other comes to.
        let (layers, host) = tokio::join!(layers, host_cuts(plan.host.clone()));
        let offsets = Offsets::new(layers?, &host?);
        let (cut_at, skew) = (Timestamp::now(), sent.elapsed());
        crash::point("transaction");
        // Started now, it would run on the base: then the names must stay.
        self.still_stopped(order).await?;
        for exchange in &plan.exchanges {
            exchange.apply().map_err(WindowError::Exchange)?;
        }
        crash::point("cut");
        self.still_stopped(order).await?;
        still_ours(self, machine, tasks).await?;
        Ok(Measured { cut_at, frozen: None, thawed: None, hold: None, pause: Duration::ZERO, skew, offsets })
    }
}

/// How long the block graph may take to settle: a job that begins or ends puts a filter in or takes it out between two
/// questions of one look, and a disk is not found then.
const SETTLE: Duration = Duration::from_secs(2);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Whether each disk's path still leads to the image that our QEMU has open on top.
async fn still_ours(sessions: &Sessions, machine: &Machine, tasks: &[DiskTask]) -> Result<(), Failure> {
    let end = Instant::now() + SETTLE;
    loop {
        let found = disks(machine.vm(), &sessions.roots).await;
        let found = found.map_err(|error| Failure::new(reasons::CUT_FAILED, chain(&error)))?.found;
        let is = |task: &DiskTask| {
            let driver = sessions.drivers.find(&task.driver);
            let path = driver.map_or_else(|| task.path.clone(), |driver| driver.disk_after_cut(task));
            // A device is no file beneath a root, but has its name.
            let is_it = |disk: &FoundDisk| {
                disk.facts.path.clone().ok() == path || path.as_deref() == Some(Path::new(&disk.facts.source))
            };
            found.iter().any(|disk| disk.name == task.disk && is_it(disk))
        };
        match tasks.iter().find(|task| !is(task)) {
            None => return Ok(()),
            Some(task) if Instant::now() > end => {
                let message = format!("the image of disk `{}` was replaced while its snapshot was taken", task.disk);
                return Err(Failure::new(reasons::VM_CHANGED, message));
            }
            Some(_) => tokio::time::sleep(LOOK_AGAIN).await,
        }
    }
}
