//! An orderly stop: one token that every part of a program listens to.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::info;

/// The wish that the program stops. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    token: CancellationToken,
}

impl Shutdown {
    /// A shutdown that SIGTERM and SIGINT begin. A second signal kills the process at once, for an operator at a
    /// terminal who has waited long enough.
    pub fn on_signals() -> io::Result<Self> {
        let terminate = signal(SignalKind::terminate())?;
        let interrupt = signal(SignalKind::interrupt())?;
        let shutdown = Self::default();
        tokio::spawn(listen(terminate, interrupt, shutdown.token.clone()));
        Ok(shutdown)
    }

    /// Begins the shutdown from within.
    pub fn begin(&self) {
        self.token.cancel();
    }

    /// The token, for parts that take one.
    #[must_use]
    pub fn token(&self) -> CancellationToken {
        self.token.clone()
    }

    /// Whether the shutdown has begun.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Returns when the shutdown has begun.
    pub async fn wait(&self) {
        self.token.cancelled().await;
    }
}

/// Exit status of a process that a second signal ended: that of an interrupted one.
const INTERRUPTED: i32 = 130;

async fn listen(mut terminate: Signal, mut interrupt: Signal, token: CancellationToken) {
    let name = next(&mut terminate, &mut interrupt).await;
    info!(signal = name, "stopping");
    token.cancel();
    let name = next(&mut terminate, &mut interrupt).await;
    info!(signal = name, "stopping at once");
    std::process::exit(INTERRUPTED);
}

async fn next(terminate: &mut Signal, interrupt: &mut Signal) -> &'static str {
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_clone_sees_the_shutdown_that_another_one_began() {
        let shutdown = Shutdown::default();
        let clone = shutdown.clone();
        assert!(!clone.has_begun());
        shutdown.begin();
        clone.wait().await;
        assert!(clone.has_begun() && shutdown.token().is_cancelled());
    }
}
