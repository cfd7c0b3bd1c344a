//! Bringing one guest back.

use std::time::Duration;

use freezeframe_qemu::causes::chain;
use freezeframe_qemu::{BlockGraph, Error as PeerError, FreezeStatus, GuestAgent, Qmp};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::Timing;
use crate::exchange::{Applied, Error as ExchangeError, Exchange};
use crate::reach::{Reach, reach};
use crate::record::{Endpoint, Record};

/// One attempt in so many is worth a warning; the others are repeated twice a second.
const WARN_EVERY: u64 = 60;

/// What is still owed to a VM. What is done once is never done again: by then the VM may be in its owner's hands.
#[derive(Debug)]
pub(crate) struct Obligation {
    record: Record,
    timing: Timing,
    names_due: bool,
    resume_due: bool,
    thaw_due: bool,
    /// Kept over rounds: it is our place in the queue for the socket.
    agent: Option<GuestAgent>,
    /// Renames under way, possibly stuck in the file system. Never started again beside themselves.
    renaming: Option<JoinHandle<Result<(), ExchangeError>>>,
}

/// Why a part of the obligation is not settled.
#[derive(Debug, thiserror::Error)]
enum Unsettled {
    #[error("the VM is gone: {0}")]
    Gone(&'static str),
    #[error("reach QEMU or the guest agent")]
    Peer(#[from] PeerError),
    #[error("exchange names")]
    Exchange(#[from] ExchangeError),
    #[error("exchange names: the thread died")]
    Thread(#[from] tokio::task::JoinError),
    #[error("nothing heard in {0:?}")]
    Late(Duration),
    #[error("a block job isn't over yet")]
    Job,
    #[error("the guest says that it is frozen")]
    Frozen,
}

impl Obligation {
    pub(crate) fn new(record: Record, timing: Timing) -> Self {
        Self {
            names_due: !record.exchanges.is_empty(),
            resume_due: record.may_resume,
            thaw_due: record.freeze,
            agent: None,
            renaming: None,
            record,
            timing,
        }
    }

    /// Returns when nothing is owed any more: all was done and seen, or the VM is gone.
    pub(crate) async fn settle(mut self) {
        let mut round = 0;
        while self.names_due || self.resume_due || self.thaw_due {
            if round > 0 {
                sleep(self.timing.retry).await;
            }
            self.settle_qemu_part(round).await;
            self.settle_thaw(round).await;
            round += 1;
        }
    }

    async fn settle_qemu_part(&mut self, round: u64) {
        let (true, Some(monitor)) = (self.names_due || self.resume_due, self.record.qmp.clone()) else { return };
        // As a whole, too, it may not hold up the thaw.
        let bound = self.timing.step * 2;
        let settled = timeout(bound, self.names_and_resume(&monitor)).await;
        let Err(unsettled) = settled.unwrap_or(Err(Unsettled::Late(bound))) else { return };
        self.report("names and resume", &unsettled, round);
        if matches!(unsettled, Unsettled::Gone(_)) {
            (self.names_due, self.resume_due) = (false, false);
        }
    }

    async fn names_and_resume(&mut self, monitor: &Endpoint) -> Result<(), Unsettled> {
        let step = self.timing.step;
        let stream = match reach(&self.record.vm_root, monitor, step).await {
            Reach::Connected(stream) => stream,
            Reach::Gone(how) => return Err(Unsettled::Gone(how)),
            Reach::Unclear(error) => return Err(error.into()),
        };
        let qmp = Qmp::connect(stream, step).await?;
        let names = self.settle_names(&qmp).await;
        // A failed rename is no reason to keep a guest stopped.
        self.resume(&qmp).await.and(names)
    }

    async fn settle_names(&mut self, qmp: &Qmp) -> Result<(), Unsettled> {
        if !self.names_due {
            return Ok(());
        }
        if self.renaming.is_none() {
            self.end_job(qmp).await?;
            let graph = BlockGraph::read(qmp, self.timing.step).await?;
            let mut exchanges = self.record.exchanges.clone();
            exchanges.retain(|exchange| is_active(&graph, &exchange.when_active));
            self.renaming = Some(tokio::task::spawn_blocking(move || rename_all(&exchanges)));
        }
        if let Some(renaming) = self.renaming.as_mut() {
            let renamed = timeout(self.timing.step, renaming).await.map_err(|_| Unsettled::Late(self.timing.step))?;
            self.renaming = None;
            renamed??;
        }
        self.names_due = false;
        Ok(())
    }

    /// A job that still runs may put another node in the disk's place at any moment: it is cancelled, and seen to be over.
    async fn end_job(&self, qmp: &Qmp) -> Result<(), Unsettled> {
        let Some(id) = &self.record.job else { return Ok(()) };
        if self.is_over(qmp, id).await? {
            return Ok(());
        }
        match qmp.job_cancel(id, self.timing.step).await {
            Ok(()) => Err(Unsettled::Job),
            // It ended by itself meanwhile: the names are due before the guest goes on.
            Err(PeerError::Command { .. }) if self.is_over(qmp, id).await? => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    async fn is_over(&self, qmp: &Qmp, id: &str) -> Result<bool, Unsettled> {
        let jobs = qmp.query_jobs(self.timing.step).await?;
        Ok(jobs.iter().all(|job| job.id != *id || job.status == "concluded"))
    }

    async fn resume(&mut self, qmp: &Qmp) -> Result<(), Unsettled> {
        if !self.resume_due {
            return Ok(());
        }
        let state = qmp.query_status(self.timing.step).await?;
        // Only what `stop` makes of a running VM. An I/O error, a panic or an inward migration is not ours to end.
        if state.status == "paused" {
            qmp.cont(self.timing.step).await?;
            tracing::warn!(vm = self.record.vm, "resumed");
        }
        self.resume_due = false;
        Ok(())
    }

    async fn settle_thaw(&mut self, round: u64) {
        let (true, Some(socket)) = (self.thaw_due, self.record.agent.clone()) else { return };
        let Err(unsettled) = self.thaw(&socket).await else { return self.thaw_due = false };
        self.report("thaw", &unsettled, round);
        match unsettled {
            Unsettled::Gone(_) => self.thaw_due = false,
            // Slow or unwilling: a new connection would be no better, and would lose our place.
            Unsettled::Peer(PeerError::Timeout { .. } | PeerError::Command { .. }) | Unsettled::Frozen => {}
            _ => self.agent = None,
        }
    }

    async fn thaw(&mut self, socket: &Endpoint) -> Result<(), Unsettled> {
        let agent = match self.agent.as_mut() {
            Some(agent) => agent,
            None => match reach(&self.record.vm_root, socket, self.timing.step).await {
                Reach::Connected(stream) => self.agent.insert(GuestAgent::new(stream)),
                Reach::Gone(how) => return Err(Unsettled::Gone(how)),
                Reach::Unclear(error) => return Err(error.into()),
            },
        };
        see_thawed(agent, &self.record.vm, self.timing).await?;
        sleep(self.timing.confirm).await;
        see_thawed(agent, &self.record.vm, self.timing).await
    }

    fn report(&self, part: &str, unsettled: &Unsettled, round: u64) {
        let vm = &self.record.vm;
        let error = chain(unsettled);
        match unsettled {
            Unsettled::Gone(_) => tracing::warn!(vm, part, error, "nothing left to settle"),
            _ if round.is_multiple_of(WARN_EVERY) => tracing::warn!(vm, part, error, round, "still owed"),
            _ => tracing::debug!(vm, part, error, round, "still owed"),
        }
    }
}

/// Passes if the guest says `thawed` after a sync; thaws it if it says anything else.
async fn see_thawed(agent: &mut GuestAgent, vm: &str, timing: Timing) -> Result<(), Unsettled> {
    agent.sync(timing.step).await?;
    match agent.fsfreeze_status(timing.step).await {
        Ok(FreezeStatus::Thawed) => return Ok(()),
        // An agent that may not tell may still thaw.
        Ok(FreezeStatus::Frozen) | Err(PeerError::Command { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    match agent.thaw(timing.thaw).await {
        Ok(filesystems) => tracing::warn!(vm, filesystems, "thawed"),
        // Windows answers with an error when it has thawed by itself: the status that follows is what counts.
        Err(error @ PeerError::Command { .. }) => tracing::warn!(vm, %error, "thaw refused"),
        Err(error) => return Err(error.into()),
    }
    match agent.fsfreeze_status(timing.step).await? {
        FreezeStatus::Thawed => Ok(()),
        FreezeStatus::Frozen => Err(Unsettled::Frozen),
    }
}

/// Whether a device writes to `node`, directly or through filters: then the cut took place.
fn is_active(graph: &BlockGraph, node: &str) -> bool {
    graph.disks().iter().any(|disk| [&disk.root, &disk.top].into_iter().flatten().any(|name| name == node))
}

fn rename_all(exchanges: &[Exchange]) -> Result<(), ExchangeError> {
    // Each is tried: one bad directory must not keep the other disks' names wrong.
    exchanges.iter().map(rename).fold(Ok(()), Result::and)
}

fn rename(exchange: &Exchange) -> Result<(), ExchangeError> {
    let Exchange { directory, a, .. } = exchange;
    let applied = match exchange.apply() {
        // The agent was stopped in the middle of it, and may never go on: the guest can't wait for that.
        Err(ExchangeError::Busy) => exchange.apply_over_lock()?,
        applied => applied?,
    };
    if applied == Applied::Now {
        tracing::warn!(directory = %directory.display(), name = a, "names exchanged");
    }
    Ok(())
}
