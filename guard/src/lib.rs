//! The guest always comes back.
//!
//! A node agent that freezes a guest can crash, hang or be killed a moment later, and the thaw it owes would be lost
//! with it. So it first *arms* a window with this process, over a unix socket. The guard writes down what may have to
//! be undone, syncs that to disk, and only then answers. From that answer on the obligation is the guard's as well,
//! until the agent *disarms* (it has seen the guest thawed) or the guard has brought the guest back itself.
//!
//! ```text
//!            arm (record synced)                  disarm (record removed)
//!   (none) ─────────────────────► open window ─────────────────────────────► (none)
//!                                     │                                        ▲
//!                                     │ connection broken · silent for 1.5 s   │ seen thawed twice,
//!                                     │ deadline · guard told to stop          │ or the VM is gone
//!                                     ▼                                        │
//!   start, record found ──────────► owed ── every 500 ms: names, resume, thaw ─┘
//! ```
//!
//! An owed window is settled in this order, each step bounded in time ([`Timing`]):
//!
//! 1. The agent's own connections to the VM are shut down through the duplicates that came with `arm`, so even a
//!    stopped agent lets go of them, and QEMU takes the guard as its next client.
//! 2. *Names*: where the cut took place, the disk's name and the new layer's name change hands ([`Exchange`]). Before
//!    any write is acknowledged, or the VM's old command line would open a file without that write.
//! 3. *Resume*: only if the record says so, and only a VM that is exactly `paused`.
//! 4. *Thaw*: sync, ask, thaw, ask again, until the guest says `thawed`, and says so once more a little later.
//!
//! A step that fails never holds up the ones after it; it is tried again in the next round. An obligation ends only by
//! what was *seen*: no number of failures ends it. While it lasts, the VM is *owed* and no new window opens for it.
//!
//! # Why a freeze cannot surface after the end
//!
//! A freeze that timed out may still sit in QEMU's or the guest's buffers. But a VM's agent port is one ordered queue:
//! QEMU serves one connection at a time, and passes on or drops the bytes of the old one before it reads the next.
//! So the reply to a fresh sync proves that a freeze sent before it has run or never will, and a status after it is
//! final. The second look guards against the one thing outside that queue: an agent killed in the middle of a freeze,
//! whose last system call ends while its successor already answers.
//!
//! # What it does not do
//!
//! It knows no Kubernetes, keeps no other state than the records, and judges nothing about the snapshot.

pub mod client;
mod exchange;
mod listen;
mod obligation;
mod protocol;
mod reach;
mod record;
mod server;
mod state_dir;
mod window;

pub use exchange::{Applied, Error as ExchangeError, Exchange, Kind};
pub use protocol::{Error as ProtocolError, MAX_LINE, Refusal};
pub use record::{Endpoint, Invalid, Record};
pub use server::{Error as ServerError, Server};
pub use state_dir::{Error as StateError, StateDir};

use std::time::Duration;

/// How long the guard waits for what. The default is what the project promises; tests shorten it.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// An agent silent for longer is wedged.
    pub silence: Duration,
    /// Between two rounds of an owed window.
    pub retry: Duration,
    /// Between the two times the guest has to say that it is thawed.
    pub confirm: Duration,
    /// For one exchange of messages with QEMU or the guest agent.
    pub step: Duration,
    /// For the thaw itself, which may run the guest's own hooks.
    pub thaw: Duration,
    /// After the order to stop, for owed windows to be settled; the records of the others stay for the next start.
    pub grace: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            silence: Duration::from_millis(1500),
            retry: Duration::from_millis(500),
            confirm: Duration::from_millis(300),
            step: Duration::from_secs(1),
            thaw: Duration::from_secs(5),
            grace: Duration::from_secs(10),
        }
    }
}
