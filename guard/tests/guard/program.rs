//! The program itself, killed and stopped as a node does it.

use std::path::Path;
use std::process::Stdio;

use freezeframe_guard::client::Guard;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::process::{Child, Command};

use crate::fake_vm::FakeVm;
use crate::harness::{files, soon, until};

async fn start(dir: &Path) -> (Child, Guard) {
    let socket = dir.join("guard.sock");
    let mut command = Command::new(env!("CARGO_BIN_EXE_freezeframe-guard"));
    command.arg("--socket").arg(&socket).arg("--state-dir").arg(dir.join("state")).args(["--log-format", "json"]);
    let child = command.stderr(Stdio::null()).kill_on_drop(true).spawn().unwrap();
    let listens = || std::os::unix::net::UnixStream::connect(&socket).is_ok();
    until("the program listens", listens).await;
    (child, Guard::new(socket))
}

#[tokio::test]
async fn a_program_killed_in_a_window_thaws_when_it_is_started_again() {
    let (vm, dir) = (FakeVm::start("db"), TempDir::new().unwrap());
    let (mut child, guard) = start(dir.path()).await;
    let window = guard.arm(vm.record(), &[]).await.unwrap();
    child.kill().await.unwrap();
    soon(window.lost()).await;
    assert!(vm.guest().frozen);
    let (_child, _) = start(dir.path()).await;
    vm.thawed().await;
    until("no record is left", || files(&dir.path().join("state")).is_empty()).await;
}

#[tokio::test]
async fn a_program_told_to_terminate_settles_its_windows_and_ends_well() {
    let (vm, dir) = (FakeVm::start("db"), TempDir::new().unwrap());
    let (mut child, guard) = start(dir.path()).await;
    let _window = guard.arm(vm.record(), &[]).await.unwrap();
    let pid = Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    assert!(soon(child.wait()).await.unwrap().success());
    assert!(!vm.guest().frozen);
    assert!(files(&dir.path().join("state")).is_empty());
}
