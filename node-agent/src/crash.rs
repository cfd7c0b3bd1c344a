//! Named points at which an end-to-end test can crash, stop or hang the agent. Without feature `crash-points` they are
//! nothing.

#[cfg(feature = "crash-points")]
tokio::task_local! {
    /// The point at which the task that is given it ends, as it would with the agent, in a test that is the agent.
    pub static CUT_AT: &'static str;
}

/// Crashes, stops or hangs here if the environment asks for it: `FREEZEFRAME_CRASH_AT=<point>` ends the process as a power
/// cut would, `FREEZEFRAME_STOP_AT=<point>` freezes it, alive but deaf, and `FREEZEFRAME_HANG_AT=<point>:<file>` blocks
/// this one task until the file is there, as a file system that doesn't answer would.
#[cfg(feature = "crash-points")]
pub fn point(name: &str) {
    use rustix::process::{Signal, getpid, kill_process};
    if CUT_AT.try_with(|at| *at == name).unwrap_or(false) {
        std::panic::resume_unwind(Box::new(name.to_owned()));
    }
    let asked = |variable: &str| std::env::var(variable).is_ok_and(|wanted| wanted == name);
    hang(name);
    let signal = match () {
        () if asked("FREEZEFRAME_CRASH_AT") => Signal::KILL,
        () if asked("FREEZEFRAME_STOP_AT") => Signal::STOP,
        () => return,
    };
    tracing::warn!(point = name, "crash point reached");
    if let Err(error) = kill_process(getpid(), signal) {
        tracing::error!(%error, "crash point failed");
    }
    // The signal reaches the other threads first, and this one would run on for a moment.
    std::thread::sleep(std::time::Duration::from_millis(100));
}

#[cfg(feature = "crash-points")]
#[allow(clippy::disallowed_methods, reason = "no test that hangs the agent has it start a process")]
fn hang(name: &str) {
    let wanted = std::env::var("FREEZEFRAME_HANG_AT").unwrap_or_default();
    let Some((_, file)) = wanted.split_once(':').filter(|(point, _)| *point == name) else { return };
    tracing::warn!(point = name, "crash point reached");
    // In place, so that the runtime's other tasks, the heartbeat above all, don't notice.
    tokio::task::block_in_place(|| {
        while !std::path::Path::new(file).exists() {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    });
}

/// Nothing.
#[cfg(not(feature = "crash-points"))]
pub fn point(_: &str) {}
