//! Waiting for what somebody else does: the one place that looks again and again.

use std::time::Duration;

use anyhow::{Result, bail};

const TICK: Duration = Duration::from_millis(40);

/// Asks `probe` until it answers `Ok(Some(_))`, at most for `bound`.
///
/// `Ok(None)` and errors both mean "not yet"; the last error becomes part of the message when the bound is over, because a
/// wait for an API that is away fails in its own ways until the API is back.
pub async fn await_condition<T>(
    what: &str,
    bound: Duration,
    mut probe: impl AsyncFnMut() -> Result<Option<T>>,
) -> Result<T> {
    let mut last_error = None;
    let look = async {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            match probe().await {
                Ok(Some(found)) => return found,
                Ok(None) => {}
                Err(error) => last_error = Some(error),
            }
        }
    };
    if let Ok(found) = tokio::time::timeout(bound, look).await {
        return Ok(found);
    }
    match last_error {
        Some(error) => Err(error.context(format!("waited {bound:?} for {what}"))),
        None => bail!("waited {bound:?} for {what}"),
    }
}
