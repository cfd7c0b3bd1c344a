//! A full copy that the disk is too small for in the end, that is cancelled, or whose agent dies: the agent works in a
//! process of its own, whose `qemu-img` is the real one behind a script that lets something happen first.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use freezeframe_api::conditions::reasons;
use freezeframe_api::v1alpha1::{RestoreContentPhase, RestoreMode, VMRestoreContentStatus};
use freezeframe_node_agent::restore::order::RestoreOrder;
use freezeframe_node_agent::session::Progress;

use crate::cases::Case;
use crate::content::Content;
use crate::lab::{Lab, Wish, why};
use crate::node;
use crate::storage::Kind;

/// Its images back onto others, so that a full restore has to copy, and its file system is small.
const CASE: Case = Case { driver: "overlay", storage: Kind::Xfs, format: "qcow2" };
const SOON: Duration = Duration::from_secs(60);

/// The process that copies. Run as a test it has nothing to do.
#[tokio::test(flavor = "multi_thread")]
async fn the_agent_that_copies() {
    let Some((run, restores, order)) = node::asked() else { return };
    let wish = Asked { wish: Wish::default(), run: run.clone() };
    let told = tokio::sync::watch::Sender::new(None);
    let cancelled = async {
        await_file(&run.join("cancel")).await;
        wish.wish.cancel();
        std::future::pending::<()>().await;
    };
    let turn = tokio::select! {
        turn = restores.advance(&order, &wish, &told) => turn.unwrap(),
        () = cancelled => unreachable!(),
    };
    let freezeframe_node_agent::restore::Turn::Over(status) = turn else { panic!("not over") };
    std::fs::write(run.join("status.new"), serde_json::to_vec(&status).unwrap()).unwrap();
    std::fs::rename(run.join("status.new"), run.join("status")).unwrap();
}

/// Wanted until it is said not to be; says when the turn of the snapshot's VM was given up.
struct Asked {
    wish: Wish,
    run: PathBuf,
}

impl Progress for Asked {
    fn cancelled(&self) -> bool {
        self.wish.cancelled()
    }

    fn only_reads(&self) {
        std::fs::write(self.run.join("only-reads"), "").unwrap();
    }
}

async fn await_file(path: &Path) {
    while !path.exists() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub async fn until_gone(path: &Path) {
    while path.exists() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The agent's process; it is ended when this is dropped.
pub struct Agent {
    process: Child,
    run: PathBuf,
    _tools: tempfile::TempDir,
}

impl Agent {
    /// Starts it on an order; `first` is done before `qemu-img` copies, whose arguments begin with `slowly`.
    pub fn start(lab: &Lab, order: &RestoreOrder, first: &str, slowly: &str) -> Self {
        let (run, tools) = (Lab::run(&lab.world).to_owned(), tempfile::tempdir().unwrap());
        let real = crate::storage::run("which qemu-img", &[]);
        let (real, pid) = (real.trim(), run.join("copying"));
        let script = format!(
            "#!/bin/sh\nif [ \"$1\" = convert ]; then shift; {first}; echo $$ > {pid}.new; mv {pid}.new {pid}; \
             exec {real} convert {slowly} \"$@\"; fi\nexec {real} \"$@\"\n",
            pid = pid.display(),
        );
        let tool = tools.path().join("qemu-img");
        std::fs::write(&tool, script).unwrap();
        std::fs::set_permissions(&tool, std::fs::Permissions::from_mode(0o755)).unwrap();
        let path = format!("{}:{}", tools.path().display(), std::env::var("PATH").unwrap());
        let mut agent = node::agent("copying::the_agent_that_copies", &run, &lab.world.storage.root(), order);
        let process = agent.env("PATH", path).stdout(Stdio::null()).spawn().unwrap();
        Self { process, run, _tools: tools }
    }

    /// The process of `qemu-img`, once it copies.
    pub async fn copying(&self) -> PathBuf {
        let pid = self.run.join("copying");
        tokio::time::timeout(SOON, await_file(&pid)).await.expect("nothing is copied");
        Path::new("/proc").join(std::fs::read_to_string(pid).unwrap().trim())
    }

    /// Ends it as a crash does.
    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    pub fn cancel(&self) {
        std::fs::write(self.run.join("cancel"), "").unwrap();
    }

    /// What came of it.
    pub async fn ended(mut self) -> VMRestoreContentStatus {
        let end = Instant::now() + SOON;
        while self.process.try_wait().unwrap().is_none() {
            assert!(Instant::now() < end, "the agent doesn't come to an end");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let status = std::fs::read(self.run.join("status")).expect("the agent failed");
        for left in ["status", "copying", "cancel", "only-reads"] {
            // Not each restore has all.
            drop(std::fs::remove_file(self.run.join(left)));
        }
        serde_json::from_slice(&status).unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // One that has ended has nothing to kill.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

/// A stopped VM, and a full restore in place and to a new VM of what it had; both must copy.
async fn orders() -> (Lab, Vec<Content>, [RestoreOrder; 2]) {
    let mut lab = Lab::of(CASE).await;
    lab.world.write().await;
    lab.snapshot(CASE.driver, 1).await;
    lab.world.write().await;
    let (source, taken) = lab.snapshot(CASE.driver, 2).await;
    lab.world.write().await;
    let (before, _) = lab.stop_and_keep(CASE.driver, 3).await;
    let in_place = RestoreOrder { mode: RestoreMode::Full, ..lab.order_in_place(&source, &before) };
    let new = lab.order_to_new(&source, "new", RestoreMode::Full);
    (lab, taken, [in_place, new])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fills_up_while_a_restore_copies_fails_it_with_numbers_and_nothing_is_left() {
    let (mut lab, _, orders) = orders().await;
    let files = lab.files();
    for order in orders {
        let filler = lab.world.storage.root().join("filler");
        // It ends when nothing is free.
        let fill = format!("dd if=/dev/zero of={} bs=64k 2>/dev/null; sync", filler.display());
        let status = Agent::start(&lab, &order, &fill, "").ended().await;
        let (reason, said) = why(&status);
        assert_eq!((status.phase, reason.as_str()), (Some(RestoreContentPhase::Failed), reasons::NO_SPACE), "{said}");
        assert!(said.contains("bytes are needed in") && said.contains("are free"), "{said}");
        std::fs::remove_file(filler).unwrap();
        assert_eq!(lab.files(), files, "{said}");
        lab.world.check_images();
    }
    lab.world.start().await;
    lab.world.check_guest().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_is_cancelled_while_it_copies_ends_the_copy_and_leaves_nothing() {
    let (mut lab, _, orders) = orders().await;
    let files = lab.files();
    for order in orders {
        let agent = Agent::start(&lab, &order, "true", "-r 1K");
        let copying = agent.copying().await;
        agent.cancel();
        let status = agent.ended().await;
        assert_eq!((status.phase, why(&status).0.as_str()), (Some(RestoreContentPhase::Failed), reasons::CANCELLED));
        // It was killed; the last of it may take a moment longer than its agent.
        tokio::time::timeout(SOON, until_gone(&copying)).await.expect("qemu-img goes on");
        assert_eq!(lab.files(), files);
        lab.world.check_images();
    }
    lab.world.start().await;
    lab.world.check_guest().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_ends_with_its_agent_and_is_begun_anew_by_the_next() {
    let (lab, taken, orders) = orders().await;
    for order in orders {
        let agent = Agent::start(&lab, &order, "true", "-r 1K");
        let copying = agent.copying().await;
        // Its agent is killed, and can end nothing.
        drop(agent);
        tokio::time::timeout(SOON, until_gone(&copying)).await.expect("qemu-img goes on");
        std::fs::remove_file(Lab::run(&lab.world).join("copying")).unwrap();
        for (image, content) in lab.restore(&order).await.iter().zip(&taken) {
            content.check(image, CASE.format).unwrap();
        }
        assert!(!lab.files().iter().any(|file| file.contains("vmrestore-")), "{:?}", lab.files());
    }
}
