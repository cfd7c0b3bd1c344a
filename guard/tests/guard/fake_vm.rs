//! A VM with two sockets that, like QEMU's, serve one client at a time and let the next one wait.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use freezeframe_guard::{Endpoint, Exchange, Kind, Record};
use freezeframe_qemu::SocketIdentity;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

use crate::harness::until;

/// What the VM is like and how it misbehaves.
pub struct Guest {
    pub frozen: bool,
    pub run_state: &'static str,
    pub active_node: &'static str,
    /// Commands that changed something, in order; with the inode that `watched` had then.
    pub log: Vec<String>,
    pub watched: Option<PathBuf>,
    /// How often somebody came to the agent's socket.
    pub agent_clients: u32,
    /// So many syncs stay without an answer.
    pub deaf_for: u32,
    /// So many status questions are answered with an error, and thaws too.
    pub errors: u32,
    /// So many thaws have no effect.
    pub idle_thaws: u32,
    /// A freeze that comes to run right after the next time the guest said `thawed`.
    pub late_freeze: bool,
    /// The monitor takes clients and says nothing to them.
    pub mute_monitor: bool,
    /// Status of a block job `merge`, which has put its node in the disk's place by the time that it is cancelled.
    pub merge: &'static str,
    /// Why that job can't be cancelled: it is over just before it is asked to be.
    pub too_late: Option<&'static str>,
}

pub struct FakeVm {
    pub root: TempDir,
    pub name: &'static str,
    guest: Arc<Mutex<Guest>>,
    tasks: Vec<JoinHandle<()>>,
}

impl FakeVm {
    pub fn start(name: &'static str) -> Self {
        let guest = Guest {
            frozen: true,
            run_state: "running",
            active_node: "disk0",
            log: Vec::new(),
            watched: None,
            agent_clients: 0,
            deaf_for: 0,
            errors: 0,
            idle_thaws: 0,
            late_freeze: false,
            mute_monitor: false,
            merge: "concluded",
            too_late: None,
        };
        let root = TempDir::new().unwrap();
        let mut vm = Self { root, name, guest: Arc::new(Mutex::new(guest)), tasks: Vec::new() };
        vm.listen();
        vm
    }

    fn listen(&mut self) {
        let monitor = UnixListener::bind(self.path("qmp.sock")).unwrap();
        let agent = UnixListener::bind(self.path("qga.sock")).unwrap();
        let (for_monitor, for_agent) = (Arc::clone(&self.guest), Arc::clone(&self.guest));
        self.tasks.push(tokio::spawn(async move {
            while let Ok((client, _)) = monitor.accept().await {
                serve_monitor(client, &for_monitor).await;
            }
        }));
        self.tasks.push(tokio::spawn(async move {
            while let Ok((client, _)) = agent.accept().await {
                serve_agent(client, &for_agent).await;
            }
        }));
    }

    /// The process ends; its socket files stay behind.
    pub async fn kill(&mut self) {
        for task in self.tasks.drain(..) {
            task.abort();
            assert!(task.await.unwrap_err().is_cancelled());
        }
    }

    /// Another VM takes the place.
    pub fn replace(&mut self) {
        // Both are alive for a moment, so that the inode differs for certain.
        for socket in ["qmp.sock", "qga.sock"] {
            std::fs::rename(self.path(socket), self.path(&format!("former-{socket}"))).unwrap();
        }
        let former: Vec<_> = self.tasks.drain(..).collect();
        self.listen();
        former.iter().for_each(JoinHandle::abort);
    }

    pub fn guest(&self) -> MutexGuard<'_, Guest> {
        self.guest.lock().unwrap()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// A record that asks for a thaw and nothing else.
    pub fn record(&self) -> Record {
        Record {
            id: format!("window-{}", self.name),
            vm: format!("shop/{}", self.name),
            vm_root: self.root.path().to_owned(),
            qmp: Some(endpoint(self.root.path(), "qmp.sock")),
            agent: Some(endpoint(self.root.path(), "qga.sock")),
            may_resume: false,
            freeze: true,
            deadline_millis: 60_000,
            exchanges: Vec::new(),
            job: None,
        }
    }

    /// A disk's file, a new layer's file, and their exchange for when the node `overlay0` is active.
    pub fn exchange(&self, kind: Kind) -> Exchange {
        std::fs::write(self.path("disk"), "old layer").unwrap();
        std::fs::write(self.path("disk.new"), "new layer").unwrap();
        Exchange {
            directory: self.root.path().to_owned(),
            a: "disk".into(),
            b: "disk.new".into(),
            a_inode: std::fs::metadata(self.path("disk")).unwrap().ino(),
            when_active: "overlay0".into(),
            kind,
        }
    }

    pub fn content(&self, name: &str) -> Option<String> {
        std::fs::read_to_string(self.path(name)).ok()
    }

    pub async fn thawed(&self) {
        until("the guest is thawed", || !self.guest().frozen).await;
    }
}

impl Drop for FakeVm {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

pub fn endpoint(root: &Path, name: &str) -> Endpoint {
    endpoint_of(root, name, std::process::id())
}

/// The endpoint of a VM whose process is `pid`.
pub fn endpoint_of(root: &Path, name: &str, pid: u32) -> Endpoint {
    let found = std::fs::symlink_metadata(root.join(name)).unwrap();
    let peer_pid = i32::try_from(pid).unwrap();
    let identity = SocketIdentity { device: found.dev(), inode: found.ino(), peer_pid, peer_uid: found.uid() };
    Endpoint::new(name, &identity)
}

impl Guest {
    fn note(&mut self, command: &str) {
        let inode = self.watched.as_ref().map(|path| std::fs::metadata(path).unwrap().ino());
        self.log.push(inode.map_or(command.to_owned(), |inode| format!("{command} at inode {inode}")));
    }

    fn answer_agent(&mut self, command: &str) -> Value {
        match command {
            "guest-fsfreeze-status" | "guest-fsfreeze-thaw" if self.errors > 0 => {
                self.errors -= 1;
                json!({"error": {"class": "GenericError", "desc": "couldn't hold writes"}})
            }
            "guest-fsfreeze-status" if self.frozen => json!({"return": "frozen"}),
            "guest-fsfreeze-status" => {
                self.frozen = std::mem::take(&mut self.late_freeze);
                json!({"return": "thawed"})
            }
            "guest-fsfreeze-thaw" => {
                self.note("thaw");
                let works = self.idle_thaws == 0 && self.run_state == "running";
                self.idle_thaws = self.idle_thaws.saturating_sub(1);
                let thawed = u8::from(self.frozen && works);
                self.frozen &= !works;
                json!({"return": thawed})
            }
            _ => json!({"error": {"class": "CommandNotFound", "desc": "no such command"}}),
        }
    }

    fn answer_monitor(&mut self, command: &str) -> Value {
        match command {
            "qmp_capabilities" => json!({}),
            "query-status" => json!({"status": self.run_state, "running": self.run_state == "running"}),
            "cont" => {
                self.note("cont");
                self.run_state = "running";
                json!({})
            }
            "query-jobs" => {
                json!([{"id": "merge", "type": "commit", "status": self.merge, "current-progress": 1, "total-progress": 1}])
            }
            "job-cancel" => {
                self.merge = "concluded";
                self.active_node = "overlay0";
                self.too_late.map_or(json!({}), |why| json!({"error": {"class": "GenericError", "desc": why}}))
            }
            "query-block" => json!([{
                "device": "", "qdev": "/machine/peripheral/vd0/virtio-backend", "type": "unknown",
                "removable": false, "locked": false,
                "inserted": {"node-name": self.active_node, "ro": false, "drv": "qcow2", "file": "disk"},
            }]),
            "query-named-block-nodes" => json!([{"node-name": self.active_node, "drv": "qcow2", "file": "disk"}]),
            "query-blockstats" => json!([{"device": "", "node-name": self.active_node, "stats": {}}]),
            "x-debug-query-block-graph" => json!({"nodes": [], "edges": []}),
            _ => panic!("the guard has no business with {command}"),
        }
    }
}

async fn serve_agent(client: UnixStream, guest: &Mutex<Guest>) {
    guest.lock().unwrap().agent_clients += 1;
    let mut client = BufReader::new(client);
    let mut line = Vec::new();
    while client.read_until(b'\n', &mut line).await.is_ok_and(|read| read > 0) {
        let marked = line.first() == Some(&0xFF);
        let text = std::mem::take(&mut line).into_iter().skip_while(|&byte| byte == 0xFF).collect::<Vec<_>>();
        let request: Value = serde_json::from_slice(&text).unwrap();
        let mut answer = Vec::new();
        if marked {
            answer.extend(b"{\"error\":{\"class\":\"GenericError\",\"desc\":\"JSON parse error\"}}\n");
        }
        if request["execute"] == "guest-sync-delimited" {
            let mut guest = guest.lock().unwrap();
            if guest.deaf_for > 0 {
                guest.deaf_for -= 1;
                continue;
            }
            answer.push(0xFF);
            answer.extend(json!({"return": request["arguments"]["id"]}).to_string().bytes());
        } else {
            let said = guest.lock().unwrap().answer_agent(request["execute"].as_str().unwrap());
            answer.extend(said.to_string().bytes());
        }
        answer.push(b'\n');
        if client.get_mut().write_all(&answer).await.is_err() {
            return;
        }
    }
}

async fn serve_monitor(client: UnixStream, guest: &Mutex<Guest>) {
    let mut client = BufReader::new(client);
    let greeting = b"{\"QMP\":{\"version\":{\"qemu\":{\"major\":7,\"minor\":2,\"micro\":22},\"package\":\"\"},\"capabilities\":[]}}\n";
    if !guest.lock().unwrap().mute_monitor && client.get_mut().write_all(greeting).await.is_err() {
        return;
    }
    let mut line = String::new();
    while client.read_line(&mut line).await.is_ok_and(|read| read > 0) {
        let request: Value = serde_json::from_str(&std::mem::take(&mut line)).unwrap();
        let said = guest.lock().unwrap().answer_monitor(request["execute"].as_str().unwrap());
        let kind = if said.get("error").is_some() { "error" } else { "return" };
        let said = said.get("error").unwrap_or(&said);
        let answer = format!("{}\n", json!({kind: said, "id": request["id"]}));
        if client.get_mut().write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}
