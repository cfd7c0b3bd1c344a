//! Waiting for QEMU's block jobs: bounded by progress, not by time, since a large disk takes what it takes.

use std::time::Duration;

use freezeframe_qemu::{Job, Qmp};
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::{DriverError, Result, qemu};
use crate::causes::chain;
use crate::hypervisor::QMP_TIMEOUT;

/// A job that moves nothing for this long is stuck.
const NO_PROGRESS: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(20);

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// The job can be completed at any time.
    Ready,
    /// The job has done its work, and waits to be told to change the graph and the headers.
    Pending,
    /// The job is over, and in the list until it is dismissed.
    Concluded,
    /// The job is over, and was dismissed by itself; how it ended is for the caller to find out.
    Gone,
}

/// The job of that id.
pub async fn find(qmp: &Qmp, id: &str) -> Result<Option<Job>> {
    let jobs = qmp.query_jobs(QMP_TIMEOUT).await.map_err(qemu("list the block jobs"))?;
    Ok(jobs.into_iter().find(|job| job.id == id))
}

/// How far a job is, in percent; none while it doesn't know how much there is to do.
#[must_use]
pub fn percent(job: &Job) -> Option<u8> {
    let part = u128::from(job.current_progress) * 100;
    u8::try_from(part.checked_div(job.total_progress.into())?.min(100)).ok()
}

/// Waits until a job is where it is wanted; a failed or vanished job is an error, and a failed one is dismissed.
pub async fn wait(qmp: &Qmp, id: &str, wanted: Wanted) -> Result<()> {
    let failed = |why: &str| DriverError::Job { job: id.to_owned(), why: why.to_owned() };
    let (mut moved, mut progress) = (Instant::now(), 0);
    loop {
        let job = match find(qmp, id).await? {
            Some(job) => job,
            None if wanted == Wanted::Gone => return Ok(()),
            None => return Err(failed("it is gone")),
        };
        match job.status.as_str() {
            "concluded" => return conclude(qmp, &job).await,
            "ready" if wanted == Wanted::Ready => return Ok(()),
            "pending" if wanted == Wanted::Pending => return Ok(()),
            _ => {}
        }
        if job.current_progress != progress {
            (moved, progress) = (Instant::now(), job.current_progress);
        }
        if moved.elapsed() > NO_PROGRESS {
            return Err(failed("it makes no progress"));
        }
        sleep(POLL).await;
    }
}

async fn conclude(qmp: &Qmp, job: &Job) -> Result<()> {
    match &job.error {
        None => Ok(()),
        Some(why) => {
            qmp.job_dismiss(&job.id, QMP_TIMEOUT).await.map_err(qemu("dismiss a failed block job"))?;
            Err(DriverError::Job { job: job.id.clone(), why: why.clone() })
        }
    }
}

/// Removes a concluded job from QEMU's list; no job is fine.
pub async fn dismiss_if_concluded(qmp: &Qmp, id: &str) -> Result<()> {
    match find(qmp, id).await? {
        Some(job) if job.status == "concluded" => {
            qmp.job_dismiss(id, QMP_TIMEOUT).await.map_err(qemu("dismiss a block job"))
        }
        _ => Ok(()),
    }
}

/// Cancels a job that isn't over, and sees it over. One that ended in good order stays in the list, as the proof of that.
pub async fn end(qmp: &Qmp, id: &str) -> Result<()> {
    match find(qmp, id).await? {
        Some(job) if job.status != "concluded" => {}
        _ => return Ok(()),
    }
    qmp.job_cancel(id, QMP_TIMEOUT).await.map_err(qemu("cancel a block job"))?;
    match wait(qmp, id, Wanted::Concluded).await {
        // A cancelled job ends with an error, which is what was asked for.
        Ok(()) | Err(DriverError::Job { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Lets a job go as fast as it can, and on where it was made to rest. What is over by then needs neither.
pub async fn hurry(qmp: &Qmp, id: &str) {
    if let Err(error) = qmp.execute::<serde_json::Value>("job-resume", json!({"id": id}), QMP_TIMEOUT).await {
        tracing::debug!(job = id, %error, "a job was not resumed");
    }
    if let Err(error) = set_speed(qmp, id, 0).await {
        tracing::debug!(job = id, error = chain(&error), "a job was not hurried");
    }
}

/// Gives a job a speed, in bytes a second; 0 is as fast as it can. One that is over needs none.
pub async fn set_speed(qmp: &Qmp, id: &str, speed: u64) -> Result<()> {
    let arguments = json!({"device": id, "speed": speed});
    let set = qmp.execute::<serde_json::Value>("block-job-set-speed", arguments, QMP_TIMEOUT).await;
    if set.is_err() && find(qmp, id).await?.is_none_or(|job| job.status == "concluded") {
        return Ok(());
    }
    set.map(drop).map_err(qemu("set a block job's speed"))
}

/// Cancels a job, if there is one, and waits until it is gone.
pub async fn cancel(qmp: &Qmp, id: &str) -> Result<()> {
    let Some(job) = find(qmp, id).await? else { return Ok(()) };
    if job.status != "concluded" {
        qmp.job_cancel(id, QMP_TIMEOUT).await.map_err(qemu("cancel a block job"))?;
    }
    // A cancelled job ends with an error, which is what was asked for.
    match wait(qmp, id, Wanted::Concluded).await {
        Ok(()) => dismiss_if_concluded(qmp, id).await,
        Err(DriverError::Job { .. }) if find(qmp, id).await?.is_none() => Ok(()),
        Err(error) => Err(error),
    }
}
