//! Fake peers for tests: a monitor and a guest agent that do what a test tells them to, also the wrong thing.
//!
//! Both keep their state in a cheap handle and serve one client at a time, as QEMU's sockets do: a second client is
//! accepted by the kernel and hears nothing until the first is gone. Not for use outside tests.

mod agent;
mod blocks;
mod qemu;
mod wire;

pub use agent::FakeAgent;
pub use blocks::FakeDisk;
pub use qemu::FakeQemu;

use std::time::Duration;

use serde_json::{Value, json};

/// How a fake answers one command.
#[derive(Debug, Clone, PartialEq)]
pub enum Reaction {
    /// With this, as the command's return value; the fake's state does not change.
    Return(Value),
    /// With an error.
    Refuse {
        /// Such as `GenericError`.
        class: String,
        /// The words.
        desc: String,
    },
    /// Not at all; the fake's state does not change.
    Silence,
    /// It does what was asked and answers after this long.
    Late(Duration),
    /// It does what was asked and closes the connection instead of answering.
    DisconnectAfter,
    /// It closes the connection and does nothing.
    DisconnectBefore,
}

impl Reaction {
    /// A `GenericError` with these words.
    #[must_use]
    pub fn refuse(desc: &str) -> Self {
        Self::Refuse { class: "GenericError".into(), desc: desc.into() }
    }
}

fn refusal(class: &str, desc: &str) -> Value {
    json!({ "error": { "class": class, "desc": desc } })
}
