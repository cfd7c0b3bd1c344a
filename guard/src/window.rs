//! One window: who is heard, when the guard acts, and that it does not stop before the end.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::Shutdown;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::obligation::Obligation;
use crate::protocol::{Lines, Refusal, Reply, Request};
use crate::record::Record;
use crate::server::{Claim, Shared};

/// How a window ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Disarm,
    Act(Cause),
}

/// Why the guard acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    Broken,
    Silent,
    Deadline,
    Stopping,
    NotRemoved,
}

/// One connection, from its first line to the end of what it owes.
pub(crate) async fn serve(stream: UnixStream, shared: Arc<Shared>) {
    let ours = rustix::process::geteuid().as_raw();
    if !stream.peer_cred().is_ok_and(|peer| peer.uid() == ours) {
        return tracing::warn!("connection of another user refused");
    }
    let mut lines = Lines::new(stream);
    let reply = match timeout(shared.timing.silence, lines.next()).await {
        Ok(Ok(Some(Request::Arm(record)))) => return arm(lines, *record, shared).await,
        Ok(Ok(Some(Request::Owes(vm)))) => Reply::Owes(shared.owes(&vm)),
        Ok(Ok(Some(request))) => refused(Refusal::Invalid, format!("{request:?} without a window")),
        Ok(Err(error)) => refused(Refusal::Invalid, error.to_string()),
        Ok(Ok(None)) | Err(_) => return,
    };
    say(&mut lines, &reply, shared.timing.step).await;
}

async fn arm(mut lines: Lines, record: Record, shared: Arc<Shared>) {
    let deadline = Instant::now() + Duration::from_millis(record.deadline_millis);
    match open_window(&record, &shared).await {
        Ok(claim) => window(lines, claim, record, deadline).await,
        Err((reason, detail)) => {
            tracing::error!(vm = record.vm, ?reason, detail, "arm refused");
            say(&mut lines, &refused(reason, detail), shared.timing.step).await;
        }
    }
}

async fn open_window(record: &Record, shared: &Arc<Shared>) -> Result<Claim, (Refusal, String)> {
    record.validate().map_err(|invalid| (Refusal::Invalid, invalid.to_string()))?;
    let claim = shared.claim(record)?;
    let to_save = record.clone();
    let saved = shared.on_disk(move |state| state.save(&to_save)).await;
    saved.map(|()| claim).map_err(|error| (Refusal::Storage, error.to_string()))
}

/// An open window, to its end and to the end of what it leaves owed.
async fn window(mut lines: Lines, claim: Claim, record: Record, deadline: Instant) {
    let shared = Arc::clone(&claim.shared);
    let descriptors = lines.take_descriptors();
    let mut end = End::Act(Cause::Broken);
    if say(&mut lines, &Reply::Armed, shared.timing.step).await {
        end = listen_to(&mut lines, deadline, &shared).await;
    }
    let cause = match end {
        End::Act(cause) => cause,
        End::Disarm => match shared.remove(&record.id).await {
            Ok(()) => {
                // Before the answer, so that the agent may arm for this VM again at once.
                drop(claim);
                say(&mut lines, &Reply::Disarmed, shared.timing.step).await;
                return;
            }
            Err(error) => {
                say(&mut lines, &refused(Refusal::Storage, error.to_string()), shared.timing.step).await;
                Cause::NotRemoved
            }
        },
    };
    tracing::error!(vm = record.vm, id = record.id, ?cause, "the guard takes over");
    cut_off(&descriptors);
    drop((lines, descriptors));
    settle(claim, record).await;
}

/// Listens to the agent until the window ends.
async fn listen_to(lines: &mut Lines, deadline: Instant, shared: &Shared) -> End {
    let mut heard = Instant::now();
    loop {
        tokio::select! {
            // In this order: no flood of lines may hide the deadline, and a line that is there counts as heard.
            biased;
            () = sleep_until(deadline) => return End::Act(Cause::Deadline),
            () = shared.told_to_stop() => return End::Act(Cause::Stopping),
            line = lines.next() => match line {
                Ok(Some(Request::Alive)) => heard = Instant::now(),
                Ok(Some(Request::Disarm)) => return End::Disarm,
                Ok(Some(Request::Arm(_) | Request::Owes(_)) | None) | Err(_) => return End::Act(Cause::Broken),
            },
            () = sleep_until(heard + shared.timing.silence) => return End::Act(Cause::Silent),
        }
    }
}

/// Takes the VM's sockets from whoever shares them. A stopped agent cannot close them; this does it for all copies.
fn cut_off(descriptors: &[OwnedFd]) {
    for descriptor in descriptors {
        match rustix::net::shutdown(descriptor, Shutdown::Both) {
            Ok(()) | Err(rustix::io::Errno::NOTCONN) => {}
            Err(error) => tracing::error!(%error, "the agent's connection cannot be shut down"),
        }
    }
}

pub(crate) async fn settle(claim: Claim, record: Record) {
    let (id, vm) = (record.id.clone(), record.vm.clone());
    let Shared { timing, .. } = *claim.shared;
    Obligation::new(record, timing).settle().await;
    // A record left behind would be acted on at the next start, when the VM is in other hands.
    while let Err(error) = claim.shared.remove(&id).await {
        tracing::error!(vm, id, %error, "settled, but the record cannot be removed");
        sleep(timing.retry).await;
    }
    tracing::warn!(vm, id, "settled");
}

/// Sends `reply`; whether that worked.
async fn say(lines: &mut Lines, reply: &Reply, bound: Duration) -> bool {
    matches!(timeout(bound, lines.send(reply)).await, Ok(Ok(())))
}

fn refused(reason: Refusal, detail: String) -> Reply {
    Reply::Refused { reason, detail }
}
