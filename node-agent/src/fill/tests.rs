//! A snapshot that overflows after it was ready, from LVM's word to the API.

use std::collections::BTreeMap;
use std::sync::Mutex;

use async_trait::async_trait;
use freezeframe_api::conditions::{condition, find, reasons, types};
use freezeframe_api::v1alpha1::VMSnapshotContentStatus;
use freezeframe_guard::client::Guard;
use freezeframe_qemu::BlockGraph;
use http::{Method, Request, Response};
use k8s_openapi::jiff::Timestamp;
use kube::client::Body;
use serde_json::{Value, json};
use tempfile::TempDir;
use tower_test::mock::{Handle, pair};

use super::*;
use crate::boot::{Accelerator, Boots};
use crate::drivers::{Cut, DiskFacts, Drivers, Env, Removal, Result, SnapshotDriver, Verdict};
use crate::hypervisor::image::ImageRoots;
use crate::hypervisor::{Vm, VmKey};
use crate::session::journal::Journal;
use crate::session::machine::StoppedVms;
use crate::session::order::Order;
use crate::session::space_watch::SpaceWatch;

const PATIENCE: Duration = Duration::from_secs(30);
const EVERY: Duration = Duration::from_millis(20);

/// A driver whose snapshots are as full as the test says.
struct Filling(Arc<Mutex<Fill>>);

#[async_trait]
impl SnapshotDriver for Filling {
    fn name(&self) -> &'static str {
        "filling"
    }

    fn check_parameters(&self, _: &BTreeMap<String, String>) -> Result<()> {
        Ok(())
    }

    fn can_take(&self, _: &DiskFacts, _: &BTreeMap<String, String>) -> Verdict {
        Verdict::Usable(String::new())
    }

    fn plan(&self, _: &mut DiskTask, _: &BlockGraph, _: &ImageRoots) -> Result<()> {
        Ok(())
    }

    async fn prepare(&self, _: &Vm, _: &ImageRoots, _: &mut DiskTask) -> Result<()> {
        Ok(())
    }

    fn cut(&self, _: &[&DiskTask], _: &ImageRoots) -> Result<Cut> {
        Ok(Cut::default())
    }

    async fn complete(&self, _: &Vm, _: &ImageRoots, _: &mut DiskTask) -> Result<()> {
        Ok(())
    }

    async fn remove(&self, _: &Env<'_>, _: &mut DiskTask) -> Result<Removal> {
        Ok(Removal::Done)
    }

    async fn fill(&self, _: &DiskTask) -> Result<Option<Fill>> {
        Ok(Some(*self.0.lock().unwrap()))
    }
}

/// A watch over one complete snapshot of one disk, and the API's side of it.
struct Lab {
    fill: Arc<Mutex<Fill>>,
    sessions: Arc<Sessions>,
    locks: VmLocks,
    api: Handle<Request<Body>, Response<Body>>,
    stop: CancellationToken,
    _state: TempDir,
}

fn content(status: &VMSnapshotContentStatus) -> Value {
    json!({
        "apiVersion": "freezeframe.dev/v1alpha1", "kind": "VMSnapshotContent",
        "metadata": {"name": "vmsnap-1", "uid": "uid-1"},
        "spec": {"nodeName": "n", "vmSnapshotRef": {"namespace": "shop", "name": "a", "uid": "u"}, "vmName": "db",
            "consistency": {}, "quiesce": {}, "deadline": "2026-01-01T00:00:00Z"},
        "status": status,
    })
}

fn ready() -> VMSnapshotContentStatus {
    let disk = json!({"name": "vda", "driver": "filling", "state": "Ready", "sizeBytes": 1});
    VMSnapshotContentStatus {
        phase: Some(ContentPhase::Ready),
        disks: vec![serde_json::from_value(disk).unwrap()],
        conditions: vec![condition(types::READY, true, reasons::COMPLETED, "", None, Timestamp::UNIX_EPOCH)],
        ..Default::default()
    }
}

fn record() -> SessionRecord {
    let order = Order::new(&serde_json::from_value(content(&ready())).unwrap());
    let task = json!({"disk": "vda", "driver": "filling", "reason": "", "parameters": {}, "id": "1", "index": 0,
        "node": "n", "format": "raw", "size": 1, "path": null, "vm": {"namespace": "shop", "name": "db"},
        "state": null, "artifact": null});
    let nothing = SessionRecord::nothing(&order);
    let tasks = vec![serde_json::from_value(task).unwrap()];
    SessionRecord { stage: Stage::Complete, tasks, status: Some(ready()), ..nothing }
}

impl Lab {
    fn start() -> Self {
        let state = TempDir::new().unwrap();
        let journal = Journal::open(state.path().join("contents")).unwrap();
        journal.save(&record()).unwrap();
        let fill = Arc::new(Mutex::new(Fill { percent: 1.0, overflowed: false, low: false }));
        let sessions = Arc::new(Sessions {
            vm_root: state.path().into(),
            roots: ImageRoots::new(vec![]),
            guard: Guard::new(state.path().join("no-guard.sock")),
            journal,
            restores: Journal::open(state.path().join("restores")).unwrap(),
            drivers: Drivers::new(vec![Box::new(Filling(fill.clone()))]),
            stopped: StoppedVms::with_files_only(),
            boots: Arc::new(Boots::new(64, PATIENCE, 1, Accelerator::Tcg)),
            space: SpaceWatch::default(),
        });
        let (service, api) = pair();
        let (stop, locks) = (CancellationToken::new(), VmLocks::default());
        let watch = FillWatch {
            client: Client::new(service, "default"),
            sessions: sessions.clone(),
            locks: locks.clone(),
            metrics: Metrics::new(&mut prometheus_client::registry::Registry::default()),
            every: EVERY,
        };
        tokio::spawn(watch.run(stop.clone()));
        Self { fill, sessions, locks, api, stop, _state: state }
    }

    fn set(&self, percent: f64) {
        *self.fill.lock().unwrap() = Fill { percent, overflowed: percent >= 100.0, low: percent >= 80.0 };
    }

    /// Answers the next call, which must be of this method, and returns what it said.
    async fn answer(&mut self, method: Method, code: u16, status: &VMSnapshotContentStatus) -> Value {
        let (request, reply) = tokio::time::timeout(PATIENCE, self.api.next_request()).await.expect("no call").unwrap();
        assert_eq!(request.method(), method, "{}", request.uri());
        assert!(request.uri().path().contains("/vmsnapshotcontents/vmsnap-1"), "{}", request.uri());
        let said = request.into_body().collect_bytes().await.unwrap();
        let failure = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code,
            "reason": "InternalError", "message": "as the test has it"});
        let answer = if code == 200 { content(status) } else { failure };
        let body = Body::from(serde_json::to_vec(&answer).unwrap());
        reply.send_response(Response::builder().status(code).body(body).unwrap());
        serde_json::from_slice(&said).unwrap_or_default()
    }

    /// What is reported next, of a content that has this status in the API.
    async fn reported(&mut self, before: &VMSnapshotContentStatus) -> VMSnapshotContentStatus {
        self.answer(Method::GET, 200, before).await;
        let patch = self.answer(Method::PATCH, 200, before).await;
        serde_json::from_value(patch["status"].clone()).unwrap()
    }

    fn kept(&self) -> VMSnapshotContentStatus {
        self.sessions.journal.load("uid-1").unwrap().unwrap().status.unwrap()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn reason(status: &VMSnapshotContentStatus, type_: &str) -> Option<String> {
    find(&status.conditions, type_).map(|found| found.reason.clone())
}

#[tokio::test]
async fn a_snapshot_that_overflows_after_it_was_ready_is_warned_of_and_then_failed_in_the_api() {
    let mut lab = Lab::start();
    let quiet = lab.reported(&ready()).await;
    assert_eq!((quiet.phase, reason(&quiet, types::SPACE_LOW)), (Some(ContentPhase::Ready), None));
    lab.set(85.0);
    let low = lab.reported(&quiet).await;
    assert_eq!(reason(&low, types::SPACE_LOW).as_deref(), Some(reasons::SPACE_LOW));
    assert_eq!(low.phase, Some(ContentPhase::Ready));
    lab.set(100.0);
    let lost = lab.reported(&low).await;
    assert_eq!(lost.phase, Some(ContentPhase::Failed));
    assert_eq!(reason(&lost, types::READY).as_deref(), Some(reasons::SNAPSHOT_OVERFLOWED));
    assert_eq!(lab.kept(), lost, "what was reported is on disk");
}

#[tokio::test]
async fn that_a_snapshot_overflowed_is_reported_again_until_the_api_has_it() {
    let mut lab = Lab::start();
    lab.set(100.0);
    lab.answer(Method::GET, 200, &ready()).await;
    lab.answer(Method::PATCH, 500, &ready()).await;
    assert_eq!(reason(&lab.kept(), types::READY).as_deref(), Some(reasons::SNAPSHOT_OVERFLOWED));
    lab.answer(Method::GET, 500, &ready()).await;
    let lost = lab.reported(&ready()).await;
    assert_eq!(reason(&lost, types::READY).as_deref(), Some(reasons::SNAPSHOT_OVERFLOWED));
}

#[tokio::test]
async fn an_overflow_is_not_written_down_while_somebody_works_on_the_vm_but_afterwards() {
    let mut lab = Lab::start();
    let before = lab.reported(&ready()).await;
    let turn = lab.locks.turn(&VmKey { namespace: "shop".into(), name: "db".into() }).await;
    lab.set(100.0);
    let call = tokio::time::timeout(10 * EVERY, lab.api.next_request()).await;
    assert!(call.is_err(), "a report in the middle of a turn");
    assert_eq!(lab.kept().phase, Some(ContentPhase::Ready));
    drop(turn);
    let lost = lab.reported(&before).await;
    assert_eq!(lost.phase, Some(ContentPhase::Failed));
}
