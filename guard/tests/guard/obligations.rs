//! How a guest is brought back.

use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};

use freezeframe_guard::{Applied, Kind, Record};

use crate::fake_vm::{FakeVm, endpoint_of};
use crate::harness::{Harness, until};

/// Arms `record` and has the guard act on it at once.
async fn owe(harness: &Harness, record: Record) {
    // The task of a former window may still be ending.
    while harness.guard().owed(&record.vm).await.unwrap() {}
    harness.guard().arm(record, &[]).await.unwrap().abandon();
}

/// Whether a VM in `run_state` was resumed under a record that says `may_resume`.
async fn is_resumed(run_state: &'static str, may_resume: bool) -> bool {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    vm.guest().run_state = run_state;
    vm.guest().frozen = false;
    owe(&harness, Record { may_resume, ..vm.record() }).await;
    harness.settled().await;
    vm.guest().log.contains(&"cont".to_owned())
}

#[tokio::test]
async fn only_a_vm_that_we_paused_is_resumed() {
    assert!(is_resumed("paused", true).await);
    assert!(!is_resumed("paused", false).await);
    for run_state in ["running", "io-error", "guest-panicked", "inmigrate", "postmigrate", "watchdog", "prelaunch"] {
        assert!(!is_resumed(run_state, true).await, "{run_state}");
    }
}

#[tokio::test]
async fn the_vm_is_resumed_before_the_thaw_that_needs_its_processors() {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    vm.guest().run_state = "paused";
    owe(&harness, Record { may_resume: true, ..vm.record() }).await;
    harness.settled().await;
    assert_eq!(vm.guest().log, ["cont", "thaw"]);
}

#[tokio::test]
async fn names_change_hands_before_resume_and_thaw() {
    for (kind, old_layer) in [(Kind::Swap, Some("old layer")), (Kind::Replace, None)] {
        let (vm, harness) = (FakeVm::start("db"), Harness::start());
        let exchange = vm.exchange(kind);
        let new_inode = std::fs::metadata(vm.path("disk.new")).unwrap().ino();
        vm.guest().run_state = "paused";
        vm.guest().active_node = "overlay0";
        vm.guest().watched = Some(vm.path("disk"));
        owe(&harness, Record { may_resume: true, exchanges: vec![exchange], ..vm.record() }).await;
        harness.settled().await;
        assert_eq!(vm.guest().log, [format!("cont at inode {new_inode}"), format!("thaw at inode {new_inode}")]);
        assert_eq!(vm.content("disk").as_deref(), Some("new layer"));
        assert_eq!(vm.content("disk.new").as_deref(), old_layer);
    }
}

#[tokio::test]
async fn names_stay_if_the_cut_did_not_take_place() {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    owe(&harness, Record { exchanges: vec![vm.exchange(Kind::Swap)], ..vm.record() }).await;
    harness.settled().await;
    assert_eq!(vm.content("disk").as_deref(), Some("old layer"));
    assert_eq!(vm.content("disk.new").as_deref(), Some("new layer"));
}

#[tokio::test]
async fn a_job_that_may_still_take_the_disks_place_is_ended_before_the_names_are_settled() {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    vm.guest().merge = "running";
    let (exchanges, job) = (vec![vm.exchange(Kind::Replace)], Some("merge".to_owned()));
    owe(&harness, Record { exchanges, job, ..vm.record() }).await;
    harness.settled().await;
    assert_eq!(vm.guest().merge, "concluded");
    assert!(!vm.guest().frozen);
    assert_eq!(vm.content("disk").as_deref(), Some("new layer"));
}

#[tokio::test]
async fn a_job_that_ends_as_it_is_cancelled_has_its_names_settled_before_the_guest_goes_on() {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    let (exchanges, job) = (vec![vm.exchange(Kind::Replace)], Some("merge".to_owned()));
    let new_inode = std::fs::metadata(vm.path("disk.new")).unwrap().ino();
    vm.guest().run_state = "paused";
    vm.guest().watched = Some(vm.path("disk"));
    vm.guest().merge = "running";
    vm.guest().too_late = Some("the job is concluded");
    owe(&harness, Record { may_resume: true, exchanges, job, ..vm.record() }).await;
    harness.settled().await;
    assert_eq!(vm.guest().log[0], format!("cont at inode {new_inode}"));
}

#[tokio::test]
async fn names_that_changed_hands_already_are_not_changed_back() {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    vm.guest().active_node = "overlay0";
    let exchange = vm.exchange(Kind::Swap);
    assert_eq!(exchange.apply().unwrap(), Applied::Now);
    assert_eq!(exchange.apply().unwrap(), Applied::Before);
    owe(&harness, Record { exchanges: vec![exchange], ..vm.record() }).await;
    harness.settled().await;
    assert_eq!(vm.content("disk").as_deref(), Some("new layer"));
}

#[tokio::test]
async fn an_exchange_whose_lock_a_stopped_agent_holds_is_made_over_it_before_the_thaw() {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    vm.guest().active_node = "overlay0";
    let exchange = vm.exchange(Kind::Swap);
    let lock = std::fs::File::open(vm.root.path()).unwrap();
    lock.lock().unwrap();
    owe(&harness, Record { exchanges: vec![exchange], ..vm.record() }).await;
    vm.thawed().await;
    assert_eq!(vm.content("disk").as_deref(), Some("new layer"));
    harness.settled().await;
    drop(lock);
}

#[tokio::test]
async fn a_hung_monitor_does_not_hold_up_the_thaw_and_is_asked_again() {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    vm.guest().mute_monitor = true;
    owe(&harness, Record { may_resume: true, ..vm.record() }).await;
    vm.thawed().await;
    assert!(harness.guard().owed("shop/db").await.unwrap());
    vm.guest().run_state = "paused";
    vm.guest().mute_monitor = false;
    harness.settled().await;
    assert_eq!(vm.guest().log, ["thaw", "cont"]);
}

#[tokio::test]
async fn an_agent_that_answers_late_is_asked_until_it_does() {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    vm.guest().deaf_for = 2;
    owe(&harness, vm.record()).await;
    vm.thawed().await;
    harness.settled().await;
}

#[tokio::test]
async fn a_guest_that_stays_frozen_after_a_thaw_is_thawed_again() {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    vm.guest().idle_thaws = 2;
    owe(&harness, vm.record()).await;
    harness.settled().await;
    assert!(!vm.guest().frozen);
    assert_eq!(vm.guest().log, ["thaw", "thaw", "thaw"]);
}

#[tokio::test]
async fn errors_of_the_agent_do_not_end_the_obligation() {
    for errors in 1..5 {
        let (vm, harness) = (FakeVm::start("db"), Harness::start());
        vm.guest().errors = errors;
        owe(&harness, vm.record()).await;
        harness.settled().await;
        assert!(!vm.guest().frozen, "{errors} errors");
    }
}

#[tokio::test]
async fn a_freeze_that_comes_to_run_after_the_first_look_is_seen_by_the_second() {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    vm.guest().frozen = false;
    vm.guest().late_freeze = true;
    owe(&harness, vm.record()).await;
    harness.settled().await;
    assert!(!vm.guest().frozen);
    assert_eq!(vm.guest().log, ["thaw"]);
}

#[tokio::test]
async fn a_vm_that_nobody_listens_for_is_gone() {
    let (mut vm, harness) = (FakeVm::start("db"), Harness::start());
    let mut record = Record { may_resume: true, ..vm.record() };
    for endpoint in [&mut record.qmp, &mut record.agent] {
        endpoint.as_mut().unwrap().peer_started = Some(1);
    }
    vm.kill().await;
    owe(&harness, record).await;
    harness.settled().await;
}

#[tokio::test]
async fn a_vm_whose_sockets_are_gone_is_gone_unless_its_process_lives() {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    let mut record = vm.record();
    record.agent.as_mut().unwrap().peer_started = Some(1);
    std::fs::rename(vm.path("qga.sock"), vm.path("away")).unwrap();
    owe(&harness, record).await;
    harness.settled().await;

    std::fs::rename(vm.path("away"), vm.path("qga.sock")).unwrap();
    for nobody_listens in [false, true] {
        let record = Record { may_resume: true, ..vm.record() };
        (vm.guest().run_state, vm.guest().frozen) = ("paused", true);
        std::fs::rename(vm.path("qga.sock"), vm.path("away")).unwrap();
        if nobody_listens {
            // What a second QEMU leaves that was started by mistake.
            drop(std::os::unix::net::UnixListener::bind(vm.path("qga.sock")).unwrap());
        }
        owe(&harness, record).await;
        until("the monitor's part is settled", || vm.guest().run_state == "running").await;
        assert!(harness.guard().owed("shop/db").await.unwrap());
        std::fs::rename(vm.path("away"), vm.path("qga.sock")).unwrap();
        vm.thawed().await;
        harness.settled().await;
    }
}

#[tokio::test]
async fn a_vm_that_lives_is_owed_while_another_process_has_its_sockets_name() {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    // It waits for what it never gets.
    let mut alive = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
    let agent = endpoint_of(vm.root.path(), "qga.sock", alive.id());
    owe(&harness, Record { agent: Some(agent), ..vm.record() }).await;
    until("the guard comes again", || vm.guest().agent_clients > 1).await;
    alive.kill().unwrap();
    alive.wait().unwrap();
    harness.settled().await;
    assert!(vm.guest().frozen, "it isn't the VM of the record");
}

#[tokio::test]
async fn a_pid_of_another_namespace_does_not_make_a_vm_look_gone() {
    let (vm, harness) = (FakeVm::start("db"), Harness::start());
    let mut record = vm.record();
    let agent = record.agent.as_mut().unwrap();
    (agent.peer_pid, agent.pid_namespace) = (1, Some(1));
    owe(&harness, record).await;
    harness.settled().await;
    assert!(!vm.guest().frozen);
}

#[tokio::test]
async fn a_successor_at_the_same_place_is_left_alone() {
    let (mut vm, harness) = (FakeVm::start("db"), Harness::start());
    let mut unseen = vm.record();
    let mut other_process = vm.record();
    for (unseen, other) in [(&mut unseen.qmp, &mut other_process.qmp), (&mut unseen.agent, &mut other_process.agent)] {
        unseen.as_mut().unwrap().peer_pid = 0;
        other.as_mut().unwrap().peer_pid = 1;
    }
    let reused_pid = {
        let mut record = vm.record();
        record.agent.as_mut().unwrap().peer_started = Some(1);
        record.qmp.as_mut().unwrap().peer_started = Some(1);
        record
    };
    vm.replace();
    vm.guest().run_state = "paused";
    for record in [unseen, other_process, reused_pid] {
        owe(&harness, Record { may_resume: true, ..record }).await;
        harness.settled().await;
    }
    assert!(vm.guest().log.is_empty());
}
