//! The one error type of this crate; callers match on kinds and never on text.

use std::io;
use std::time::Duration;

/// What can go wrong between us and QEMU or a guest agent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("failed to {doing}")]
    Io {
        /// What we were doing, as it follows "failed to".
        doing: &'static str,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// The peer closed the connection, or we did after it broke the protocol.
    #[error("the connection is closed")]
    Closed,
    /// No answer in time. The command may still run later.
    #[error("{command} was not answered within {after:?}")]
    Timeout {
        /// The command we waited for.
        command: String,
        /// How long we waited.
        after: Duration,
    },
    /// The peer sent something that is malformed, too long or nested too deep.
    #[error("the peer broke the protocol: {reason}")]
    Protocol {
        /// What was wrong with it.
        reason: String,
    },
    /// The monitor accepted the connection and sent no greeting, or its queue is full: it serves another client.
    #[error("the monitor is busy with another client")]
    Busy,
    /// The peer answered with an error.
    #[error("{command} was refused: {desc} ({class})")]
    Command {
        /// The command that was refused.
        command: String,
        /// The peer's error class, such as `GenericError` or `CommandNotFound`.
        class: String,
        /// The peer's words: for display only.
        desc: String,
    },
    /// An earlier call did not finish; the guest agent's stream needs a sync.
    #[error("the guest agent's stream is out of step and needs a sync")]
    Poisoned,
    /// The arguments of a command could not be written as JSON.
    #[error("failed to encode the arguments of {command}")]
    Encode {
        /// The command that was not sent.
        command: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The peer answered, but not with what this command returns.
    #[error("failed to decode the answer to {command}")]
    Decode {
        /// The command that was answered.
        command: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// What a path names is not a socket.
    #[error("{path} is not a socket")]
    NotASocket {
        /// The path, relative to its root.
        path: String,
    },
}

impl Error {
    /// Whether the peer does not have the command, or does not allow it now (a frozen guest agent says the same).
    #[must_use]
    pub fn is_command_not_found(&self) -> bool {
        self.class() == Some("CommandNotFound")
    }

    /// The peer's error class, if the peer answered with an error.
    #[must_use]
    pub fn class(&self) -> Option<&str> {
        match self {
            Self::Command { class, .. } => Some(class),
            _ => None,
        }
    }

    pub(crate) fn protocol(reason: impl Into<String>) -> Self {
        Self::Protocol { reason: reason.into() }
    }
}

/// A result with this crate's [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;
