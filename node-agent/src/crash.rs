//! Named points at which an end-to-end test can crash or stop the agent. Without feature `crash-points` they are nothing.

/// Crashes or stops the process here if the environment asks for it: `FREEZEFRAME_CRASH_AT=<point>` ends it as a power
/// cut would, `FREEZEFRAME_STOP_AT=<point>` freezes it, alive but deaf.
#[cfg(feature = "crash-points")]
pub fn point(name: &str) {
    use rustix::process::{Signal, getpid, kill_process};
    let asked = |variable: &str| std::env::var(variable).is_ok_and(|wanted| wanted == name);
    let signal = match () {
        () if asked("FREEZEFRAME_CRASH_AT") => Signal::KILL,
        () if asked("FREEZEFRAME_STOP_AT") => Signal::STOP,
        () => return,
    };
    tracing::warn!(point = name, "crash point reached");
    if let Err(error) = kill_process(getpid(), signal) {
        tracing::error!(%error, "crash point failed");
    }
}

/// Nothing.
#[cfg(not(feature = "crash-points"))]
pub fn point(_: &str) {}
