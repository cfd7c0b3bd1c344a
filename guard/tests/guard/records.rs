//! What a guard finds when it starts.

use freezeframe_guard::{Record, StateDir, StateError};
use serde_json::json;
use tempfile::TempDir;
use tokio::net::UnixStream;

use crate::fake_vm::FakeVm;
use crate::harness::{Harness, files, soon, timing, until};

/// A state directory with a record as a guard of this boot would have left it.
fn left_behind(record: &Record) -> TempDir {
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    left_behind_at(record, boot_id.trim())
}

fn left_behind_at(record: &Record, boot_id: &str) -> TempDir {
    let dir = TempDir::new().unwrap();
    std::fs::create_dir(dir.path().join("state")).unwrap();
    let stored = json!({"boot_id": boot_id, "record": record}).to_string();
    std::fs::write(dir.path().join(format!("state/{}.json", record.id)), stored).unwrap();
    dir
}

#[tokio::test]
async fn a_guard_that_died_in_an_open_window_thaws_when_it_is_back() {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    let window = harness.guard().arm(vm.record(), &[]).await.unwrap();
    let dir = harness.kill().await;
    soon(window.lost()).await;
    assert!(vm.guest().frozen);
    let harness = Harness::start_in(dir, timing());
    vm.thawed().await;
    harness.settled().await;
}

#[tokio::test]
async fn a_restarted_guard_waits_for_the_agent_to_let_go_of_the_socket() {
    let vm = FakeVm::start("db");
    let held = UnixStream::connect(vm.path("qga.sock")).await.unwrap();
    vm.guest().run_state = "paused";
    let harness = Harness::start_in(left_behind(&Record { may_resume: true, ..vm.record() }), timing());
    until("the guard is at work", || vm.guest().run_state == "running").await;
    assert!(vm.guest().frozen);
    drop(held);
    vm.thawed().await;
    harness.settled().await;
}

#[tokio::test]
async fn a_vm_with_a_record_from_before_is_owed_from_the_start() {
    let vm = FakeVm::start("db");
    vm.guest().idle_thaws = u32::MAX;
    let harness = Harness::start_in(left_behind(&vm.record()), timing());
    assert!(harness.guard().owed("shop/db").await.unwrap());
}

#[tokio::test]
async fn an_unreadable_record_is_set_aside_and_the_others_are_served() {
    let vm = FakeVm::start("db");
    let dir = left_behind(&vm.record());
    let state = dir.path().join("state");
    std::fs::write(state.join("torn.json"), "{\"boot_id\": \"").unwrap();
    std::fs::write(state.join("misnamed.json"), std::fs::read(state.join("window-db.json")).unwrap()).unwrap();
    std::fs::write(state.join("unfinished.tmp"), "{").unwrap();
    std::fs::create_dir(state.join("directory.json")).unwrap();
    let harness = Harness::start_in(dir, timing());
    vm.thawed().await;
    let kept = ["directory.json.corrupt", "misnamed.json.corrupt", "torn.json.corrupt"];
    until("only what is unreadable is left", || harness.records() == kept).await;
}

#[tokio::test]
async fn a_record_of_another_boot_is_dropped() {
    let vm = FakeVm::start("db");
    let dir = left_behind_at(&vm.record(), "11111111-2222-3333-4444-555555555555");
    let harness = Harness::start_in(dir, timing());
    harness.settled().await;
    assert!(!harness.guard().owed("shop/db").await.unwrap());
    assert!(vm.guest().log.is_empty());
}

#[tokio::test]
async fn two_guards_never_share_a_state_directory() {
    let dir = TempDir::new().unwrap();
    let first = StateDir::open(dir.path()).unwrap();
    assert!(matches!(StateDir::open(dir.path()), Err(StateError::InUse { .. })));
    drop(first);
    StateDir::open(dir.path()).unwrap();
    assert!(files(dir.path()).is_empty());
}
