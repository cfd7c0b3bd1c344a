//! A monitor that runs no machine.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::sync::Notify;

use super::blocks::{Blocks, FakeDisk};
use super::wire::{self, Mind, Response};
use super::{Reaction, refusal};

/// A fake QEMU monitor; clones share one state.
#[derive(Clone, Default)]
pub struct FakeQemu {
    state: Arc<Mutex<State>>,
    spoken: Arc<Notify>,
}

struct State {
    status: String,
    busy: bool,
    blocks: Blocks,
    commands: Vec<(String, Value)>,
    always: BTreeMap<String, Reaction>,
    once: BTreeMap<String, VecDeque<Reaction>>,
    fdsets: BTreeMap<i64, Vec<Value>>,
    events: VecDeque<Value>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            status: "running".into(),
            busy: false,
            blocks: Blocks::default(),
            commands: Vec::new(),
            always: BTreeMap::new(),
            once: BTreeMap::new(),
            fdsets: BTreeMap::new(),
            events: VecDeque::new(),
        }
    }
}

impl FakeQemu {
    /// A running machine without disks.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The same with one more disk.
    #[must_use]
    pub fn with_disk(self, disk: FakeDisk) -> Self {
        self.state().blocks.add_disk(disk);
        self
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes it react so to this command, always.
    pub fn react(&self, command: &str, reaction: Reaction) {
        self.state().always.insert(command.into(), reaction);
    }

    /// Makes it react so to the next command of this name that has no such reaction yet.
    pub fn react_once(&self, command: &str, reaction: Reaction) {
        self.state().once.entry(command.into()).or_default().push_back(reaction);
    }

    /// Ends all reactions.
    pub fn behave(&self) {
        let mut state = self.state();
        state.always.clear();
        state.once.clear();
    }

    /// Makes it accept clients without a greeting, as a monitor does that serves another client.
    pub fn set_busy(&self, busy: bool) {
        self.state().busy = busy;
    }

    /// Puts the machine in this state, such as `paused` or `io-error`.
    pub fn set_status(&self, status: &str) {
        self.state().status = status.into();
    }

    /// The machine's state.
    #[must_use]
    pub fn status(&self) -> String {
        self.state().status.clone()
    }

    /// All commands it got and their arguments, in order; null where there were none.
    #[must_use]
    pub fn commands(&self) -> Vec<(String, Value)> {
        self.state().commands.clone()
    }

    /// The names of all commands it got, in order.
    #[must_use]
    pub fn command_names(&self) -> Vec<String> {
        self.state().commands.iter().map(|(name, _)| name.clone()).collect()
    }

    /// The node that is inserted in a device.
    #[must_use]
    pub fn inserted(&self, device: &str) -> Option<String> {
        self.state().blocks.inserted(device)
    }

    /// Tells its client of an event.
    pub fn emit(&self, event: &str, data: &Value) {
        let timestamp = json!({ "seconds": 1, "microseconds": 5 });
        self.state().events.push_back(json!({ "event": event, "data": data, "timestamp": timestamp }));
        self.spoken.notify_one();
    }

    /// A connection to it.
    pub fn connect(&self) -> io::Result<UnixStream> {
        wire::pair(self.clone())
    }

    /// Serves at `path`, one client at a time.
    pub fn listen(&self, path: &Path) -> io::Result<()> {
        wire::listen(self.clone(), path)
    }

    fn stop_or_cont(&self, state: &mut State, status: &str, event: &str) -> Value {
        if state.status != status {
            state.status = status.into();
            let timestamp = json!({ "seconds": 1, "microseconds": 5 });
            state.events.push_back(json!({ "event": event, "timestamp": timestamp }));
            self.spoken.notify_one();
        }
        json!({ "return": {} })
    }

    fn run(&self, state: &mut State, command: &str, arguments: &Value) -> Value {
        if let Some(answer) = state.blocks.run(command, arguments) {
            return answer;
        }
        match command {
            "stop" => self.stop_or_cont(state, "paused", "STOP"),
            "cont" => self.stop_or_cont(state, "running", "RESUME"),
            "query-status" => json!({ "return": { "status": state.status, "running": state.status == "running" } }),
            "add-fd" => state.add_fd(arguments),
            "remove-fd" => state.remove_fd(arguments),
            "query-fdsets" => json!({ "return": state.fdsets() }),
            "query-jobs" | "query-iothreads" | "query-chardev" | "query-qmp-schema" => json!({ "return": [] }),
            "qmp_capabilities" | "query-name" | "query-migrate" | "system_powerdown" | "quit" => {
                json!({ "return": {} })
            }
            _ => refusal("CommandNotFound", "The command has not been found"),
        }
    }
}

impl State {
    fn reaction(&mut self, command: &str) -> Option<Reaction> {
        let once = self.once.get_mut(command).and_then(VecDeque::pop_front);
        once.or_else(|| self.always.get(command).cloned())
    }

    fn add_fd(&mut self, arguments: &Value) -> Value {
        let id = arguments["fdset-id"].as_i64().unwrap_or_default();
        let fds = self.fdsets.entry(id).or_default();
        let fd = json!({ "fd": fds.len(), "opaque": arguments["opaque"] });
        fds.push(fd.clone());
        json!({ "return": { "fdset-id": id, "fd": fd["fd"] } })
    }

    fn remove_fd(&mut self, arguments: &Value) -> Value {
        match self.fdsets.remove(&arguments["fdset-id"].as_i64().unwrap_or_default()) {
            Some(_) => json!({ "return": {} }),
            None => refusal("GenericError", "File descriptor named was not found"),
        }
    }

    fn fdsets(&self) -> Vec<Value> {
        self.fdsets.iter().map(|(id, fds)| json!({ "fdset-id": id, "fds": fds })).collect()
    }
}

impl Mind for FakeQemu {
    fn greeting(&self) -> Option<Vec<u8>> {
        let version = json!({ "qemu": { "major": 7, "minor": 2, "micro": 22 }, "package": "" });
        let greeting = json!({ "QMP": { "version": version, "capabilities": ["oob"] } });
        (!self.state().busy).then(|| wire::line(&greeting))
    }

    fn hear(&self, line: &[u8]) -> Response {
        let Ok(request) = serde_json::from_slice::<Value>(line) else {
            return Response::Say(wire::line(&refusal("GenericError", "JSON parse error")));
        };
        let command = request["execute"].as_str().unwrap_or_default();
        let arguments = &request["arguments"];
        let mut state = self.state();
        if state.busy {
            return Response::Nothing;
        }
        state.commands.push((command.to_owned(), arguments.clone()));
        let reaction = state.reaction(command);
        let say = |mut answer: Value| {
            answer["id"] = request["id"].clone();
            wire::line(&answer)
        };
        match reaction {
            None => Response::Say(say(self.run(&mut state, command, arguments))),
            Some(Reaction::Return(value)) => Response::Say(say(json!({ "return": value }))),
            Some(Reaction::Refuse { class, desc }) => Response::Say(say(refusal(&class, &desc))),
            Some(Reaction::Silence) => Response::Nothing,
            Some(Reaction::Late(delay)) => Response::SayLater(delay, say(self.run(&mut state, command, arguments))),
            Some(Reaction::DisconnectAfter) => {
                self.run(&mut state, command, arguments);
                Response::HangUp
            }
            Some(Reaction::DisconnectBefore) => Response::HangUp,
        }
    }

    async fn speak(&self) -> Vec<u8> {
        loop {
            let event = self.state().events.pop_front();
            match event {
                Some(event) => return wire::line(&event),
                None => self.spoken.notified().await,
            }
        }
    }
}
