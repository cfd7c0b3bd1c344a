//! When the guard acts, and when it does not.

use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use freezeframe_guard::client::Error;
use freezeframe_guard::{Record, Refusal, Server, ServerError, StateDir, Timing};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;

use crate::fake_vm::FakeVm;
use crate::harness::{Harness, soon, timing, until};

/// Says `bytes` to the guard and returns its answer, which must come: no input may leave a client waiting.
async fn ask(harness: &Harness, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(harness.socket()).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut answer = vec![0; 4096];
    let read = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut answer)).await.expect("an answer or EOF");
    String::from_utf8_lossy(&answer[..read.unwrap_or(0)]).into_owned()
}

fn refusal(error: &Error) -> Option<Refusal> {
    match error {
        Error::Refused { reason, .. } => Some(*reason),
        _ => None,
    }
}

#[tokio::test]
async fn an_armed_record_is_on_disk_before_the_answer() {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    let _window = harness.guard().arm(vm.record(), &[]).await.unwrap();
    assert_eq!(harness.records(), ["window-db.json"]);
    let stored: Value =
        serde_json::from_slice(&std::fs::read(harness.dir.path().join("state/window-db.json")).unwrap()).unwrap();
    assert_eq!(serde_json::from_value::<Record>(stored["record"].clone()).unwrap(), vm.record());
}

#[tokio::test]
async fn disarm_removes_the_record_and_leaves_the_vm_alone() {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    let window = harness.guard().arm(vm.record(), &[]).await.unwrap();
    assert!(harness.guard().owed("shop/db").await.unwrap());
    window.disarm().await.unwrap();
    assert!(harness.records().is_empty());
    while harness.guard().owed("shop/db").await.unwrap() {}
    assert!(vm.guest().log.is_empty());
}

#[tokio::test]
async fn a_broken_connection_thaws() {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    let window = harness.guard().arm(vm.record(), &[]).await.unwrap();
    window.abandon();
    vm.thawed().await;
    harness.settled().await;
}

#[tokio::test]
async fn a_silent_client_loses_its_sockets_and_the_guest_is_thawed() {
    let vm = FakeVm::start("db");
    let silence = Duration::from_millis(200);
    let harness = Harness::start_in(TempDir::new().unwrap(), Timing { silence, ..timing() });
    // The client holds the only place at the guest agent's socket, and goes on holding it.
    let mut held = UnixStream::connect(vm.path("qga.sock")).await.unwrap();
    let window = harness.guard().arm(vm.record(), &[held.as_fd()]).await.unwrap();
    // The client's heartbeat comes every 250 ms: one that is late for this guard's silence.
    soon(window.lost()).await;
    let mut rest = Vec::new();
    soon(held.read_to_end(&mut rest)).await.unwrap();
    vm.thawed().await;
    harness.settled().await;
}

#[tokio::test]
async fn a_heartbeat_in_time_keeps_the_window_open() {
    let vm = FakeVm::start("db");
    let silence = Duration::from_millis(700);
    let harness = Harness::start_in(TempDir::new().unwrap(), Timing { silence, ..timing() });
    let window = harness.guard().arm(Record { deadline_millis: 1500, ..vm.record() }, &[]).await.unwrap();
    let armed = std::time::Instant::now();
    soon(window.lost()).await;
    assert!(armed.elapsed() >= Duration::from_millis(1400), "acted at {:?}, before the deadline", armed.elapsed());
}

#[tokio::test]
async fn a_passed_deadline_thaws_although_the_client_is_alive() {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    let window = harness.guard().arm(Record { deadline_millis: 50, ..vm.record() }, &[]).await.unwrap();
    soon(window.lost()).await;
    vm.thawed().await;
    harness.settled().await;
    window.disarm().await.expect_err("a window that the guard took over cannot be disarmed");
}

#[tokio::test]
async fn a_window_held_for_too_long_goes_to_the_guard_while_its_holder_does_nothing() {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    let window = harness.guard().arm(vm.record(), &[]).await.unwrap();
    window.give_up_after(Duration::from_secs(3600));
    assert!(!window.is_lost());
    window.give_up_after(Duration::from_millis(10));
    vm.thawed().await;
    soon(window.lost()).await;
    assert!(matches!(window.disarm().await, Err(Error::GivenUp)));
}

#[tokio::test]
async fn a_second_window_for_the_same_vm_is_refused() {
    let (vm, other, harness) = (FakeVm::start("db"), FakeVm::start("web"), Harness::start());
    let window = harness.guard().arm(vm.record(), &[]).await.unwrap();
    let again = Record { id: "again".into(), ..vm.record() };
    let error = harness.guard().arm(again.clone(), &[]).await.unwrap_err();
    assert_eq!(refusal(&error), Some(Refusal::Busy));
    harness.guard().arm(other.record(), &[]).await.unwrap().disarm().await.unwrap();
    window.disarm().await.unwrap();
    // What is disarmed may be armed again at once.
    harness.guard().arm(again, &[]).await.unwrap().disarm().await.unwrap();
}

#[tokio::test]
async fn an_owed_vm_is_busy_until_it_is_settled() {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    vm.guest().idle_thaws = u32::MAX;
    harness.guard().arm(vm.record(), &[]).await.unwrap().abandon();
    until("the guard tried", || vm.guest().log.len() > 2).await;
    let error = harness.guard().arm(Record { id: "again".into(), ..vm.record() }, &[]).await.unwrap_err();
    assert_eq!(refusal(&error), Some(Refusal::Busy));
    vm.guest().idle_thaws = 0;
    harness.settled().await;
}

#[tokio::test]
async fn hostile_lines_are_refused_and_leave_nothing_behind() {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    let good = serde_json::to_value(vm.record()).unwrap();
    let arm_with = |field: &str, value: Value| {
        let mut record = good.clone();
        *record.pointer_mut(field).unwrap() = value;
        format!("{}\n", json!({"arm": record})).into_bytes()
    };
    let lines: Vec<(&str, Vec<u8>)> = vec![
        ("no JSON", b"armed and dangerous\n".to_vec()),
        ("not UTF-8", b"\"\xff\xfe\"\n".to_vec()),
        ("nothing", b"\n".to_vec()),
        ("deep", [vec![b'['; 50_000], b"\n".to_vec()].concat()),
        ("alive before arm", b"\"alive\"\n".to_vec()),
        ("disarm before arm", b"\"disarm\"\n".to_vec()),
        ("no record", b"{\"arm\":{}}\n".to_vec()),
        ("id leaves the directory", arm_with("/id", json!("../../etc/passwd"))),
        ("id is hidden", arm_with("/id", json!(".x"))),
        ("id with NUL", arm_with("/id", json!("a\0b"))),
        ("id too long", arm_with("/id", json!("x".repeat(300)))),
        ("vm without namespace", arm_with("/vm", json!("db"))),
        ("relative root", arm_with("/vm_root", json!("run"))),
        ("socket leaves the root", arm_with("/agent/path", json!("../other/qga.sock"))),
        ("absolute socket", arm_with("/qmp/path", json!("/run/qmp.sock"))),
        ("empty socket path", arm_with("/qmp/path", json!(""))),
        ("no agent to thaw", arm_with("/agent", json!(null))),
        ("no deadline", arm_with("/deadline_millis", json!(0))),
        ("endless deadline", arm_with("/deadline_millis", json!(u64::MAX))),
        ("negative deadline", arm_with("/deadline_millis", json!(-1))),
        (
            "exchange leaves its directory",
            arm_with(
                "/exchanges",
                json!([{"directory": "/tmp", "a": "a", "b": "../b",
            "a_inode": 1, "when_active": "n", "kind": "swap"}]),
            ),
        ),
    ];
    for (what, bytes) in lines {
        let answer = ask(&harness, &bytes).await;
        assert!(answer.contains("\"invalid\""), "{what}: {answer}");
        assert!(harness.records().is_empty(), "{what}");
    }
    harness.guard().arm(vm.record(), &[]).await.unwrap().disarm().await.unwrap();
}

#[tokio::test]
async fn a_line_without_an_end_is_not_read_to_its_end() {
    let harness = Harness::start_in(TempDir::new().unwrap(), Timing { silence: Duration::from_secs(60), ..timing() });
    let mut stream = UnixStream::connect(harness.socket()).await.unwrap();
    // Far more than the limit and what the kernel buffers together.
    let written = soon(stream.write_all(&vec![b'x'; 1024 * 1024])).await;
    written.expect_err("the guard hangs up long before");
}

#[tokio::test]
async fn a_client_that_says_nothing_is_dropped() {
    let silence = Duration::from_millis(50);
    let harness = Harness::start_in(TempDir::new().unwrap(), Timing { silence, ..timing() });
    assert_eq!(ask(&harness, b"{\"arm\":").await, "");
}

#[tokio::test]
async fn garbage_in_an_open_window_counts_as_a_broken_connection() {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    let mut stream = UnixStream::connect(harness.socket()).await.unwrap();
    let arm = format!("{}\n\"alive\"\n\"whatever\"\n", json!({"arm": vm.record()}));
    stream.write_all(arm.as_bytes()).await.unwrap();
    vm.thawed().await;
    harness.settled().await;
}

#[tokio::test]
async fn no_window_opens_when_its_record_cannot_be_written() {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    std::fs::remove_dir(harness.dir.path().join("state")).unwrap();
    let error = harness.guard().arm(vm.record(), &[]).await.unwrap_err();
    assert_eq!(refusal(&error), Some(Refusal::Storage));
    while harness.guard().owed("shop/db").await.unwrap() {}
    assert!(vm.guest().log.is_empty());
}

#[tokio::test]
async fn told_to_stop_the_guard_settles_open_windows_first() {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    let window = harness.guard().arm(vm.record(), &[]).await.unwrap();
    let dir = harness.stop().await;
    assert!(!vm.guest().frozen);
    soon(window.lost()).await;
    assert!(crate::harness::files(&dir.path().join("state")).is_empty());
    assert!(!dir.path().join("guard.sock").exists());
}

#[tokio::test]
async fn told_to_stop_the_guard_keeps_the_records_of_what_it_cannot_settle() {
    let vm = FakeVm::start("db");
    let grace = Duration::from_millis(100);
    let harness = Harness::start_in(TempDir::new().unwrap(), Timing { grace, ..timing() });
    vm.guest().idle_thaws = u32::MAX;
    let _window = harness.guard().arm(vm.record(), &[]).await.unwrap();
    let dir = harness.stop().await;
    vm.guest().idle_thaws = 0;
    assert!(vm.guest().frozen);
    let state = dir.path().join("state");
    until("the old guard is gone", || StateDir::open(&state).is_ok()).await;
    let harness = Harness::start_in(dir, timing());
    vm.thawed().await;
    harness.settled().await;
}

#[tokio::test]
async fn only_the_owner_may_connect_and_a_stale_socket_is_replaced() {
    let dir = TempDir::new().unwrap();
    drop(std::os::unix::net::UnixListener::bind(dir.path().join("guard.sock")).unwrap());
    let harness = Harness::start_in(dir, timing());
    let mode = std::fs::metadata(harness.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    let other_state = StateDir::open(&harness.dir.path().join("other")).unwrap();
    let (_stop, stopping) = watch::channel(false);
    let second = Server::bind(&harness.socket(), other_state, timing(), stopping);
    assert!(matches!(second, Err(ServerError::InUse(_))), "a living guard's socket is left alone");
}
