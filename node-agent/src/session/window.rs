//! The window: freeze, pause, cut, resume, thaw. Nothing else in the agent may freeze, thaw, pause or resume.
//!
//! ```text
//!   arm ─► freeze ─► pause? ─► transaction ─► exchange names ─► resume ─► thaw ─► seen thawed ─► disarm
//!    │        └──────────┴───────────┴──── any failure ────────────┴─────────┘             │
//!    └─ the guard owes the thaw from here ─────────────────────────────────────────────────┘
//! ```
//!
//! What must stay true:
//! - The guard has its record on disk before the freeze is sent (the verbs take the armed window).
//! - A freeze that failed or timed out counts as *maybe frozen*: it may run later in the guest.
//! - Names change hands before the guest goes on: it must not be told that a write is durable which its old command
//!   line would not find. Where they can't, the guard gets the guest as it is.
//! - Resume comes before thaw: a guest whose virtual CPUs are stopped can't answer its agent.
//! - If the thaw isn't *seen*, the window isn't disarmed but given up to the guard.
//! - No call leaves this module with the guest held, unless the guard has it.

use std::time::{Duration, Instant};

use freezeframe_guard::client::{Guard, Window};
use freezeframe_guard::{Endpoint, Exchange, Record};
use freezeframe_qemu::{Error as QemuError, FreezeStatus};
use k8s_openapi::jiff::Timestamp;
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::host_cuts::{Made, host_cuts};
pub use super::measured::Measured;
use super::measured::Offsets;
pub use super::window_error::WindowError;
use crate::crash;
use crate::drivers::jobs::{self, Wanted};
use crate::drivers::{HostCut, Switch};
use crate::hypervisor::Vm;

/// Bound of resuming, and of one attempt to thaw.
const LET_GO: Duration = Duration::from_secs(2);
/// Bound of looking what became of a cut, while the guest waits.
const LOOK: Duration = Duration::from_millis(500);
/// Held for longer than the order allows plus this, the guest is the guard's: the code below may hang in a system call
/// that no timeout ends, while the heartbeat goes on.
const HOLD_SLACK: Duration = Duration::from_millis(1200);
/// What the guard's deadline has beyond the sum of ours: it acts when we failed to.
const GUARD_SLACK: Duration = Duration::from_secs(1);
/// How long anything may take while the virtual CPUs are stopped, at the default hold of 5 s.
const PAUSE_BOUND: Duration = Duration::from_millis(1500);

/// What is to be done in a window.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Names the guard's record.
    pub id: String,
    /// The freeze; none when the snapshot is to be crash-consistent.
    pub freeze: Option<Freeze>,
    /// Whether the virtual CPUs are stopped over the cut.
    pub pause: bool,
    /// Whether the VM runs; one that doesn't is neither paused nor resumed.
    pub running: bool,
    /// How long the guest may be held once it is frozen.
    pub max_hold: Duration,
    /// The actions of the one transaction.
    pub actions: Vec<Value>,
    /// The names that change hands.
    pub exchanges: Vec<Exchange>,
    /// Cuts outside QEMU, beside the transaction.
    pub host: Vec<HostCut>,
    /// The block job whose completion is the cut, in place of a transaction.
    pub job: Option<String>,
}

/// What is to be frozen.
#[derive(Clone, Debug)]
pub struct Freeze {
    /// Mount points in the guest; all when empty.
    pub mountpoints: Vec<String>,
    /// How long the guest may take.
    pub timeout: Duration,
}

/// Opens a window, cuts, and lets the guest go.
pub async fn run(vm: &mut Vm, guard: &Guard, plan: &Plan) -> Result<Measured, WindowError> {
    let armed = arm(vm, guard, plan).await?;
    crash::point("armed");
    let mut hold = Hold::default();
    let lost = armed.lost();
    let cut = tokio::select! {
        biased;
        () = lost => Err(WindowError::GuardLost),
        cut = hold.cut(vm, &armed, plan) => cut,
    };
    crash::point("cut");
    let let_go = hold.let_go(vm, &armed, plan).await;
    crash::point("thawed");
    let ended = end(armed, cut, let_go).await;
    hold.await_host_cuts().await;
    ended?;
    Ok(hold.measured())
}

/// If the guest is free, the obligation ends; a guard that can't be told any more will see that for itself.
async fn end(armed: Window, done: Result<(), WindowError>, let_go: Result<(), WindowError>) -> Result<(), WindowError> {
    match (done, let_go) {
        (done, Ok(())) => {
            armed.disarm().await.unwrap_or_else(|error| tracing::warn!(%error, "the guard was not told"));
            done
        }
        (Ok(()), Err(owed)) => {
            armed.abandon();
            Err(owed)
        }
        (Err(cause), Err(owed)) => {
            armed.abandon();
            Err(WindowError::Owed { cause: Box::new(cause), owed: Box::new(owed) })
        }
    }
}

/// The last step of merging an active layer: the job completes and its file takes the disk's name while no virtual
/// CPU can write.
pub async fn switch(vm: &mut Vm, guard: &Guard, id: String, switch: &Switch) -> Result<(), WindowError> {
    let running = vm.run_state().await.map_err(WindowError::Pause)?.running;
    let plan = Plan {
        id,
        freeze: None,
        pause: true,
        running,
        max_hold: PAUSE_BOUND,
        actions: vec![],
        exchanges: vec![switch.exchange.clone()],
        host: vec![],
        job: switch.job.clone(),
    };
    let armed = arm(vm, guard, &plan).await?;
    let mut hold = Hold::default();
    let done = hold.switch(vm, &armed, &plan).await;
    crash::point("switched");
    let let_go = hold.let_go(vm, &armed, &plan).await;
    end(armed, done, let_go).await
}

async fn arm(vm: &Vm, guard: &Guard, plan: &Plan) -> Result<Window, WindowError> {
    let freeze = plan.freeze.as_ref().map_or(Duration::ZERO, |freeze| freeze.timeout);
    let deadline = freeze + plan.max_hold + GUARD_SLACK;
    let endpoint = |file: &str, identity| Endpoint::new(vm.key().socket(file), &identity);
    let record = Record {
        id: plan.id.clone(),
        vm: vm.key().to_string(),
        vm_root: vm.root().to_owned(),
        qmp: Some(endpoint("qmp.sock", vm.qmp_identity())),
        agent: vm.agent_identity().map(|identity| endpoint("qga.sock", identity)),
        may_resume: plan.pause && plan.running,
        freeze: plan.freeze.is_some(),
        deadline_millis: u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX),
        exchanges: plan.exchanges.clone(),
        job: plan.job.clone(),
    };
    guard.arm(record, &vm.stream_fds()).await.map_err(WindowError::Arm)
}

/// An order that raises the hold for a slow layer raises the pause with it; none gets less than the default.
fn pause_bound(max_hold: Duration) -> Duration {
    PAUSE_BOUND.max(max_hold * 3 / 10)
}

/// What is held at this moment, and what was measured.
#[derive(Default)]
struct Hold {
    freeze_sent: bool,
    frozen: Option<(u64, Duration)>,
    frozen_at: Option<Instant>,
    paused_at: Option<Instant>,
    cut_sent: bool,
    cut_at: Option<Timestamp>,
    skew: Duration,
    offsets: Offsets,
    exchanged: bool,
    paused_for: Duration,
    frozen_for: Option<Duration>,
    thawed: Option<u64>,
    host: Option<JoinHandle<Result<Vec<Made>, WindowError>>>,
}

impl Hold {
    async fn cut(&mut self, vm: &mut Vm, armed: &Window, plan: &Plan) -> Result<(), WindowError> {
        if let Some(freeze) = &plan.freeze {
            self.freeze(vm, armed, freeze).await?;
        }
        armed.give_up_after(plan.max_hold + HOLD_SLACK);
        crash::point("frozen");
        let left = plan.max_hold.saturating_sub(self.held());
        let left = if plan.pause { left.min(pause_bound(plan.max_hold)) } else { left };
        timeout(left, self.cut_held(vm, armed, plan)).await.unwrap_or(Err(WindowError::HoldExceeded(left)))
    }

    async fn freeze(&mut self, vm: &mut Vm, armed: &Window, freeze: &Freeze) -> Result<(), WindowError> {
        self.freeze_sent = true;
        let sent = Instant::now();
        let frozen = vm.freeze(armed, &freeze.mountpoints, freeze.timeout).await.map_err(|error| match error {
            QemuError::Timeout { .. } => WindowError::FreezeTimeout(freeze.timeout),
            error => WindowError::Freeze(error),
        })?;
        self.frozen = Some((frozen, sent.elapsed()));
        self.frozen_at = Some(Instant::now());
        let wanted = freeze.mountpoints.len();
        let enough = frozen > 0 && (wanted == 0 || usize::try_from(frozen) == Ok(wanted));
        if enough { Ok(()) } else { Err(WindowError::FrozeTooLittle { frozen, wanted }) }
    }

    async fn cut_held(&mut self, vm: &Vm, armed: &Window, plan: &Plan) -> Result<(), WindowError> {
        self.pause(vm, armed, plan).await?;
        self.cut_sent = true;
        let sent = Instant::now();
        // Started first: a blocking thread takes a moment to start, and the transaction is quick.
        let host = self.host.insert(tokio::spawn(host_cuts(plan.host.clone())));
        let mut transaction = None;
        if !plan.actions.is_empty() {
            vm.qmp().transaction(&plan.actions, plan.max_hold).await.map_err(WindowError::Cut)?;
            transaction = Some(Instant::now());
        }
        let made = host.await.unwrap_or(Err(WindowError::HoldExceeded(plan.max_hold)));
        self.host = None;
        self.offsets = Offsets::new(transaction, &made?);
        self.cut_at = Some(Timestamp::now());
        self.skew = sent.elapsed();
        crash::point("transaction");
        self.exchange(plan)
    }

    async fn switch(&mut self, vm: &Vm, armed: &Window, plan: &Plan) -> Result<(), WindowError> {
        armed.give_up_after(plan.max_hold + HOLD_SLACK);
        let begun = Instant::now();
        self.pause(vm, armed, plan).await?;
        self.cut_sent = true;
        if let Some(job) = &plan.job {
            let completed = async {
                vm.qmp().job_complete(job, plan.max_hold).await.map_err(crate::drivers::qemu("complete the merge"))?;
                jobs::wait(vm.qmp(), job, Wanted::Concluded).await
            };
            // The guard's deadline is for both.
            timeout(plan.max_hold.saturating_sub(begun.elapsed()), completed)
                .await
                .map_err(|_| WindowError::HoldExceeded(plan.max_hold))?
                .map_err(WindowError::Switch)?;
        }
        crash::point("job-completed");
        self.exchange(plan)
    }

    async fn pause(&mut self, vm: &Vm, armed: &Window, plan: &Plan) -> Result<(), WindowError> {
        if plan.pause && plan.running {
            self.paused_at = Some(Instant::now());
            vm.pause(armed, plan.max_hold).await.map_err(WindowError::Pause)?;
        }
        Ok(())
    }

    /// A cut outside QEMU can't be stopped once it runs. What it makes must be there before anybody takes it back.
    async fn await_host_cuts(&mut self) {
        let Some(host) = self.host.take() else { return };
        match host.await {
            Ok(Ok(_)) => tracing::warn!("a cut outside QEMU was made too late"),
            Ok(Err(error)) => tracing::warn!(%error, "a cut outside QEMU failed"),
            Err(error) => tracing::warn!(%error, "a cut outside QEMU was given up"),
        }
    }

    fn exchange(&mut self, plan: &Plan) -> Result<(), WindowError> {
        for exchange in &plan.exchanges {
            exchange.apply().map_err(WindowError::Exchange)?;
        }
        self.exchanged = true;
        Ok(())
    }

    fn held(&self) -> Duration {
        self.frozen_at.map_or(Duration::ZERO, |at| at.elapsed())
    }

    /// Undoes the hold, in reverse, whatever came before.
    async fn let_go(&mut self, vm: &mut Vm, armed: &Window, plan: &Plan) -> Result<(), WindowError> {
        let mut settled = Ok(());
        if self.cut_sent && !self.exchanged {
            let ended = end_job(vm, plan).await;
            let names = self.exchange_if_cut(vm, plan).await;
            if matches!(names, Err(WindowError::Exchange(_))) && !armed.is_lost() {
                // The guard has ways to the names that the agent hasn't, and lets the guest go after them.
                return names;
            }
            settled = ended.and(names);
        }
        if let Some(at) = self.paused_at {
            resume(vm, armed).await.map_err(WindowError::ResumeOwed)?;
            self.paused_for = at.elapsed();
        }
        if self.freeze_sent {
            self.frozen_for = self.frozen_at.map(|at| at.elapsed());
            self.thawed = self.thaw(vm, armed, plan).await.map_err(WindowError::ThawOwed)?;
        }
        settled
    }

    /// Thaws once; or, when the guard died, for as long as the freeze may take: nobody else is left who would.
    async fn thaw(&self, vm: &mut Vm, armed: &Window, plan: &Plan) -> Result<Option<u64>, QemuError> {
        let alone = plan.freeze.as_ref().map_or(Duration::ZERO, |freeze| freeze.timeout) + LET_GO;
        let give_up = Instant::now() + alone;
        loop {
            match thaw(vm, armed, self.frozen_at.is_some()).await {
                // A guard that took over has shut our sockets down, and the error is another.
                Err(QemuError::Timeout { .. }) if armed.is_lost() && Instant::now() < give_up => {}
                thawed => return thawed,
            }
        }
    }

    /// The cut's answer never came or said no: the graph tells whether it happened, and the names must follow it. Where
    /// QEMU doesn't answer, the guest is let go all the same, and the names are left to the guard.
    async fn exchange_if_cut(&mut self, vm: &Vm, plan: &Plan) -> Result<(), WindowError> {
        let graph = timeout(LOOK, vm.graph()).await.map_err(|_| WindowError::HoldExceeded(LOOK))?;
        let graph = graph.map_err(WindowError::Look)?;
        let active = |node: &str| graph.disks().iter().any(|disk| disk.top.as_deref() == Some(node));
        let due = plan.exchanges.iter().filter(|exchange| active(&exchange.when_active));
        // Each is tried: one bad directory must not keep the other disks' names wrong.
        due.map(|exchange| exchange.apply().map(drop)).fold(Ok(()), Result::and).map_err(WindowError::Exchange)
    }

    fn measured(self) -> Measured {
        Measured {
            cut_at: self.cut_at.unwrap_or_else(Timestamp::now),
            frozen: self.frozen,
            thawed: self.thawed,
            hold: self.frozen_for,
            pause: self.paused_for,
            skew: self.skew,
            offsets: self.offsets,
        }
    }
}

/// A job that was told to complete and didn't in time would put its node in the disk's place whenever it likes, with the
/// guest running and the names as they were. It is cancelled and seen to be over; else that is the guard's to do.
async fn end_job(vm: &Vm, plan: &Plan) -> Result<(), WindowError> {
    let Some(job) = &plan.job else { return Ok(()) };
    timeout(LOOK, jobs::end(vm.qmp(), job))
        .await
        .map_err(|_| WindowError::HoldExceeded(LOOK))?
        .map_err(WindowError::Switch)
}

async fn resume(vm: &Vm, armed: &Window) -> Result<(), QemuError> {
    // Somebody else may have resumed it, or an I/O error may hold it: only our own `paused` is ours to end.
    match timeout(LOOK, vm.run_state()).await {
        Ok(Ok(state)) if state.status != "paused" => Ok(()),
        _ => vm.resume(armed, LET_GO).await,
    }
}

/// Thaws and sees the guest thawed. After a freeze that wasn't answered, a sync comes first, so that what is read next
/// is the answer to the thaw and not to the freeze; commands run in the order they were sent.
async fn thaw(vm: &mut Vm, armed: &Window, freeze_answered: bool) -> Result<Option<u64>, QemuError> {
    let bounded = async {
        if !freeze_answered {
            vm.agent().ok_or(QemuError::Closed)?.sync(LET_GO).await?;
        }
        let thawed = vm.thaw(armed, LET_GO).await;
        let agent = vm.agent().ok_or(QemuError::Closed)?;
        match agent.fsfreeze_status(LET_GO).await? {
            FreezeStatus::Thawed => Ok(thawed.ok()),
            FreezeStatus::Frozen => Err(thawed.err().unwrap_or(QemuError::Poisoned)),
        }
    };
    timeout(LET_GO, bounded)
        .await
        .unwrap_or_else(|_| Err(QemuError::Timeout { command: "guest-fsfreeze-thaw".into(), after: LET_GO }))
}
