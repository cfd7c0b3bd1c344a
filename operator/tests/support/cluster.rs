//! A server that keeps the objects of one schedule, and a clock that a test sets: months pass in a second.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use freezeframe_api::v1alpha1::{VMRestore, VMSnapshot, VMSnapshotSchedule, VMTarget};
use freezeframe_operator::caches::{Caches, Sources};
use freezeframe_operator::clock::Clock;
use freezeframe_operator::context::Context;
use freezeframe_operator::error::Error;
use freezeframe_operator::metrics::Metrics;
use freezeframe_operator::schedule;
use http::Method;
use k8s_openapi::jiff::Timestamp;
use kube::core::DeserializeGuard;
use serde_json::{Value, json};

use super::{Call, Server, objects, server};

/// What the server has, and what time it is.
pub struct State {
    pub now: Timestamp,
    pub schedule: Value,
    pub snapshots: BTreeMap<String, Value>,
    pub restores: Value,
    pub class: Value,
    /// Names in the order in which they were created, and deleted.
    pub created: Vec<String>,
    pub deleted: Vec<String>,
    /// Calls that change something, or read what is to be deleted, in their order.
    pub calls: Vec<String>,
    /// How the next deletion is answered, and what happens just before it.
    pub before_deletion: Option<fn(&mut State)>,
    /// Snapshots that a quota leaves room for.
    pub quota: usize,
    /// VMs of which an admission policy denies every snapshot.
    pub denied: Vec<&'static str>,
    version: u64,
}

/// An operator, its server and its clock.
pub struct Cluster {
    state: Arc<Mutex<State>>,
    ctx: Arc<Context>,
    sources: Sources,
    targets: Vec<VMTarget>,
}

pub fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

/// A VM that has been there for long.
pub fn vm(name: &str) -> VMTarget {
    serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "shop", "uid": format!("uid-{name}"), "resourceVersion": "4",
            "creationTimestamp": "2020-01-01T00:00:00Z"},
        "spec": {}, "status": {"nodeName": "node-a", "runState": "Running"},
    }))
    .unwrap()
}

impl Cluster {
    /// A schedule `s` that is created at `now`.
    pub fn new(now: &str, spec: &Value, targets: Vec<VMTarget>) -> Self {
        let now = at(now);
        let metadata = json!({"name": "s", "namespace": "shop", "uid": "uid-s", "resourceVersion": "10",
            "generation": 1, "creationTimestamp": now.strftime("%FT%TZ").to_string()});
        let state = State {
            now,
            schedule: json!({"apiVersion": "freezeframe.dev/v1alpha1", "kind": "VMSnapshotSchedule",
                "metadata": metadata, "spec": spec}),
            snapshots: BTreeMap::new(),
            restores: json!([]),
            class: serde_json::to_value(objects::class()).unwrap(),
            created: vec![],
            deleted: vec![],
            calls: vec![],
            before_deletion: None,
            quota: usize::MAX,
            denied: vec![],
            version: 100,
        };
        let state = Arc::new(Mutex::new(state));
        let (client, server) = server();
        tokio::spawn(serve(server, state.clone()));
        let (caches, sources) = Caches::new();
        let clock = state.clone();
        let clock = Clock::new(move || clock.lock().unwrap().now);
        let ctx = Context { clock, ..Context::new(client, caches, Metrics::default(), None) };
        Self { state, ctx: Arc::new(ctx), sources, targets }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Shows the operator all that the server has.
    pub fn refresh(&mut self) {
        let (schedule, snapshots) = {
            let state = self.state();
            let snapshots: Vec<VMSnapshot> =
                state.snapshots.values().map(|snapshot| serde_json::from_value(snapshot.clone()).unwrap()).collect();
            (parsed(&state), snapshots)
        };
        self.sources.schedules.fill([schedule]);
        self.sources.snapshots.fill(snapshots);
        let restores = serde_json::from_value::<Vec<VMRestore>>(self.state().restores.clone()).unwrap();
        self.sources.restores.fill(restores);
        self.sources.contents.fill([]);
        self.sources.targets.fill(self.targets.clone());
        self.sources.classes.fill([objects::class()]);
    }

    pub fn schedule(&self) -> VMSnapshotSchedule {
        parsed(&self.state())
    }

    /// Has the operator look at the schedule by what it was last shown.
    pub async fn look(&self) -> Result<(), Error> {
        self.look_at(self.schedule()).await
    }

    /// The same, where the operator has seen that version of the schedule.
    pub async fn look_at(&self, schedule: VMSnapshotSchedule) -> Result<(), Error> {
        schedule::reconcile(Arc::new(DeserializeGuard(Ok(schedule))), self.ctx.clone()).await.map(drop)
    }

    /// Has the operator look at everything as it is, until it has nothing more to do.
    pub async fn settle(&mut self) {
        for _ in 0..10 {
            let before = self.state().calls.len();
            self.refresh();
            self.look().await.unwrap();
            if self.state().calls.len() == before {
                return;
            }
        }
        panic!("the operator never comes to rest: {:#?}", self.state().calls);
    }

    pub async fn settle_at(&mut self, now: &str) {
        self.state().now = at(now);
        self.settle().await;
    }

    /// The nodes take every snapshot that is under way, with this outcome.
    pub fn take_all(&self, outcome: fn(&VMSnapshot) -> Value) {
        let mut state = self.state();
        let (now, version) = (state.now, state.version + 1);
        state.version = version;
        for snapshot in state.snapshots.values_mut().filter(|snapshot| snapshot.get("status").is_none()) {
            let parsed: VMSnapshot = serde_json::from_value(snapshot.clone()).unwrap();
            snapshot["status"] = outcome(&parsed);
            if snapshot["status"].get("creationTime").is_none() && snapshot["status"]["phase"] == "Ready" {
                snapshot["status"]["creationTime"] = json!(now.strftime("%FT%T%.6fZ").to_string());
            }
            snapshot["metadata"]["resourceVersion"] = json!(version.to_string());
        }
    }

    /// Goes from one time at which something is due to the next, up to `end`; all snapshots become good at once.
    pub async fn run_until(&mut self, end: &str) {
        let end = at(end);
        loop {
            self.refresh();
            self.look().await.unwrap();
            self.take_all(|_| good());
            self.refresh();
            self.look().await.unwrap();
            let status = self.schedule().status.unwrap_or_default();
            let next = status.vms.iter().filter_map(|vm| vm.next_time.as_ref()).map(|time| time.0).min().unwrap_or(end);
            let mut state = self.state();
            assert!(next > state.now, "time must pass: {status:#?}");
            state.now = next.min(end);
            if next >= end {
                return;
            }
        }
    }

    pub fn names(&self) -> Vec<String> {
        self.state().snapshots.keys().cloned().collect()
    }
}

fn parsed(state: &State) -> VMSnapshotSchedule {
    let mut schedule = state.schedule.clone();
    schedule["metadata"]["resourceVersion"] = json!(state.version.to_string());
    serde_json::from_value(schedule).unwrap()
}

pub fn good() -> Value {
    json!({"phase": "Ready", "readyToUse": true, "consistency": {"level": "Filesystem"}})
}

async fn serve(mut server: Server, state: Arc<Mutex<State>>) {
    while let Some(call) = server.poll().await {
        answer(call, &mut state.lock().unwrap());
    }
}

fn answer(call: Call, state: &mut State) {
    let path = call.path.clone();
    let name = path.rsplit('/').next().unwrap().to_owned();
    let method = call.method.clone();
    if !["/events", "/vmrestores", "/vmsnapshotclasses"].iter().any(|quiet| path.ends_with(quiet)) {
        state.calls.push(format!("{method} {}", path.rsplit("/shop/").next().unwrap()));
    }
    match (method, path.as_str()) {
        (_, path) if path.ends_with("/events") => call.fail(503, "ServiceUnavailable"),
        (_, path) if path.ends_with("/vmrestores") => {
            let items = state.restores.clone();
            call.answer(&json!({"metadata": {}, "items": items}));
        }
        (_, path) if path.ends_with("/vmsnapshotclasses") => {
            let items = [state.class.clone()];
            call.answer(&json!({"metadata": {}, "items": items}));
        }
        (Method::POST, _) => create(call, state),
        (Method::GET, path) if path.ends_with("/vmsnapshots") => {
            assert!(!call.query.contains("resourceVersion"), "a list that a cache may answer: {}", call.query);
            assert!(call.query.contains("labelSelector=freezeframe.dev%2Fschedule-uid%3Duid-s"), "{}", call.query);
            let items: Vec<Value> = state.snapshots.values().cloned().collect();
            call.answer(&json!({"metadata": {}, "items": items}));
        }
        (Method::GET, path) if path.contains("/vmsnapshotschedules/") => call.answer(&state.schedule.clone()),
        (Method::GET, _) => match state.snapshots.get(&name) {
            Some(snapshot) => call.answer(&snapshot.clone()),
            None => call.fail(404, "NotFound"),
        },
        (Method::PATCH, path) if path.ends_with("/status") => {
            state.schedule["status"] = call.body["status"].clone();
            state.version += 1;
            let mut schedule = state.schedule.clone();
            schedule["metadata"]["resourceVersion"] = json!(state.version.to_string());
            call.answer(&schedule);
        }
        (Method::PATCH, _) => {
            state.version += 1;
            let version = state.version;
            let snapshot = state.snapshots.get_mut(&name).unwrap();
            snapshot["metadata"]["ownerReferences"] = call.body["metadata"]["ownerReferences"].clone();
            snapshot["metadata"]["resourceVersion"] = json!(version.to_string());
            let snapshot = snapshot.clone();
            call.answer(&snapshot);
        }
        (Method::DELETE, _) => delete(call, &name, state),
        (method, path) => panic!("{method} {path}"),
    }
}

fn create(call: Call, state: &mut State) {
    let mut snapshot = call.body.clone();
    let name = snapshot["metadata"]["name"].as_str().unwrap().to_owned();
    if state.snapshots.contains_key(&name) {
        return call.fail(409, "AlreadyExists");
    }
    let denied = state.denied.iter().any(|vm| snapshot["spec"]["vmName"] == **vm);
    if denied || state.snapshots.len() >= state.quota {
        return call.fail(403, "Forbidden");
    }
    state.version += 1;
    snapshot["metadata"]["uid"] = json!(format!("uid-{name}"));
    snapshot["metadata"]["resourceVersion"] = json!(state.version.to_string());
    snapshot["metadata"]["creationTimestamp"] = json!(state.now.strftime("%FT%TZ").to_string());
    state.created.push(name.clone());
    state.snapshots.insert(name, snapshot.clone());
    call.answer(&snapshot);
}

fn delete(call: Call, name: &str, state: &mut State) {
    if let Some(happens) = state.before_deletion.take() {
        happens(state);
    }
    let Some(snapshot) = state.snapshots.get(name) else { return call.fail(404, "NotFound") };
    let expected = &call.body["preconditions"];
    assert!(expected["uid"].is_string() && expected["resourceVersion"].is_string(), "{expected}");
    if snapshot["metadata"]["uid"] != expected["uid"]
        || snapshot["metadata"]["resourceVersion"] != expected["resourceVersion"]
    {
        return call.fail(409, "Conflict");
    }
    let snapshot = state.snapshots.remove(name).unwrap();
    state.deleted.push(name.to_owned());
    call.answer(&snapshot);
}
