//! A guest agent that freezes nothing but its own counter.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};
use tokio::net::UnixStream;

use super::wire::{self, Mind, Response};
use super::{Reaction, refusal};

/// A fake guest agent; clones share one state, which outlives its connections as a guest's does.
#[derive(Clone, Default)]
pub struct FakeAgent {
    state: Arc<Mutex<State>>,
}

struct Fault {
    command: String,
    reaction: Reaction,
    once: bool,
}

struct State {
    frozen: bool,
    filesystems: u64,
    thawed_count: Option<u64>,
    exit_code: i64,
    commands: Vec<String>,
    faults: Vec<Fault>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            frozen: false,
            filesystems: 1,
            thawed_count: None,
            exit_code: 0,
            commands: Vec::new(),
            faults: Vec::new(),
        }
    }
}

impl FakeAgent {
    /// An agent of a guest with this many file systems, thawed.
    #[must_use]
    pub fn new(filesystems: u64) -> Self {
        let agent = Self::default();
        agent.state().filesystems = filesystems;
        agent
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes it react so to this command, always.
    pub fn react(&self, command: &str, reaction: Reaction) {
        self.fault(command, reaction, false);
    }

    /// Makes it react so to the next command of this name only.
    pub fn react_once(&self, command: &str, reaction: Reaction) {
        self.fault(command, reaction, true);
    }

    fn fault(&self, command: &str, reaction: Reaction, once: bool) {
        self.state().faults.push(Fault { command: command.into(), reaction, once });
    }

    /// Ends all faults.
    pub fn behave(&self) {
        self.state().faults.clear();
    }

    /// Makes thaws report this many, whatever was frozen.
    pub fn report_thawed(&self, count: u64) {
        self.state().thawed_count = Some(count);
    }

    /// Makes programs end with this code.
    pub fn exit_with(&self, code: i64) {
        self.state().exit_code = code;
    }

    /// Freezes or thaws the guest behind everybody's back.
    pub fn set_frozen(&self, frozen: bool) {
        self.state().frozen = frozen;
    }

    /// Whether the guest is frozen.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.state().frozen
    }

    /// The names of all commands it got, in order, syncs included.
    #[must_use]
    pub fn commands(&self) -> Vec<String> {
        self.state().commands.clone()
    }

    /// A connection to it.
    pub fn connect(&self) -> io::Result<UnixStream> {
        wire::pair(self.clone())
    }

    /// Serves at `path`, one client at a time.
    pub fn listen(&self, path: &Path) -> io::Result<()> {
        wire::listen(self.clone(), path)
    }
}

impl State {
    fn reaction(&mut self, command: &str) -> Option<Reaction> {
        let matching = |once: bool| self.faults.iter().position(|fault| fault.command == command && fault.once == once);
        let at = matching(true).or_else(|| matching(false))?;
        let reaction = self.faults[at].reaction.clone();
        if self.faults[at].once {
            self.faults.remove(at);
        }
        Some(reaction)
    }

    fn run(&mut self, command: &str, arguments: &Value) -> Value {
        let allowed =
            ["guest-ping", "guest-info", "guest-sync-delimited", "guest-fsfreeze-status", "guest-fsfreeze-thaw"];
        if self.frozen && !allowed.contains(&command) {
            return refusal("CommandNotFound", "the command is not allowed while frozen");
        }
        match command {
            "guest-sync-delimited" => json!({ "return": arguments["id"] }),
            "guest-ping" => json!({ "return": {} }),
            "guest-info" => json!({ "return": info() }),
            "guest-fsfreeze-status" => json!({ "return": if self.frozen { "frozen" } else { "thawed" } }),
            "guest-fsfreeze-freeze" => self.freeze(self.filesystems),
            "guest-fsfreeze-freeze-list" => {
                let asked = arguments["mountpoints"].as_array().map_or(0, |list| list.len() as u64);
                self.freeze(asked.min(self.filesystems))
            }
            "guest-fsfreeze-thaw" => self.thaw(),
            "guest-get-fsinfo" => json!({ "return": self.mounts() }),
            "guest-exec" => json!({ "return": { "pid": 1 } }),
            "guest-exec-status" => json!({ "return": { "exited": true, "exitcode": self.exit_code } }),
            _ => refusal("CommandNotFound", "the command is unknown"),
        }
    }

    fn freeze(&mut self, count: u64) -> Value {
        self.frozen = count > 0;
        json!({ "return": count })
    }

    fn thaw(&mut self) -> Value {
        let thawed = if self.frozen { self.filesystems } else { 0 };
        self.frozen = false;
        json!({ "return": self.thawed_count.unwrap_or(thawed) })
    }

    fn mounts(&self) -> Vec<Value> {
        let mount =
            |n| json!({ "name": format!("vda{n}"), "mountpoint": format!("/mnt/{n}"), "type": "ext4", "disk": [] });
        (0..self.filesystems).map(mount).collect()
    }
}

const COMMANDS: [&str; 10] = [
    "guest-ping",
    "guest-info",
    "guest-sync-delimited",
    "guest-fsfreeze-status",
    "guest-fsfreeze-freeze",
    "guest-fsfreeze-freeze-list",
    "guest-fsfreeze-thaw",
    "guest-get-fsinfo",
    "guest-exec",
    "guest-exec-status",
];

fn info() -> Value {
    let command = |name: &&str| json!({ "name": name, "enabled": true, "success-response": true });
    json!({ "version": "0.0.0-fake", "supported_commands": COMMANDS.iter().map(command).collect::<Vec<_>>() })
}

impl Mind for FakeAgent {
    fn greeting(&self) -> Option<Vec<u8>> {
        None
    }

    fn hear(&self, line: &[u8]) -> Response {
        // The real agent drops what stands before a 0xFF, and complains about it first.
        let (complaint, text) = match line.iter().rposition(|&byte| byte == 0xFF) {
            Some(at) => (wire::line(&refusal("GenericError", "JSON parse error, stray '\u{FFFD}'")), &line[at + 1..]),
            None => (Vec::new(), line),
        };
        let Ok(request) = serde_json::from_slice::<Value>(text) else {
            return Response::Say(wire::line(&refusal("GenericError", "JSON parse error")));
        };
        let command = request["execute"].as_str().unwrap_or_default();
        let mut state = self.state();
        state.commands.push(command.to_owned());
        let reaction = state.reaction(command);
        let mut run = || {
            let mut bytes = complaint.clone();
            bytes.extend((command == "guest-sync-delimited").then_some(0xFF));
            bytes.extend(wire::line(&state.run(command, &request["arguments"])));
            bytes
        };
        match reaction {
            None => Response::Say(run()),
            Some(Reaction::Return(value)) => Response::Say(wire::line(&json!({ "return": value }))),
            Some(Reaction::Refuse { class, desc }) => Response::Say(wire::line(&refusal(&class, &desc))),
            Some(Reaction::Silence) => Response::Nothing,
            Some(Reaction::Late(delay)) => Response::SayLater(delay, run()),
            Some(Reaction::DisconnectAfter) => {
                run();
                Response::HangUp
            }
            Some(Reaction::DisconnectBefore) => Response::HangUp,
        }
    }

    async fn speak(&self) -> Vec<u8> {
        std::future::pending().await
    }
}
