//! What becomes of a running VM while new images are copied from its snapshots: the copy is stopped in the middle, with
//! the images open.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use freezeframe_api::conditions::reasons;
use freezeframe_api::v1alpha1::{Limits, RestoreContentPhase, RestoreMode};
use freezeframe_node_agent::locks::Waiting;
use freezeframe_node_agent::restore::order::RestoreOrder;
use freezeframe_node_agent::session::order::Order;
use freezeframe_node_agent::session::shortening::Depth;

use crate::cases::{Case, for_every};
use crate::content::Content;
use crate::copying::{Agent, until_gone};
use crate::lab::{Lab, why};
use crate::storage::Kind;

/// Whose images can't be shared with a file beside the disk.
const CASES: [Case; 3] = [
    Case { driver: "overlay", storage: Kind::Plain, format: "qcow2" },
    Case { driver: "overlay", storage: Kind::Xfs, format: "qcow2" },
    Case { driver: "copy", storage: Kind::Plain, format: "raw" },
];
const SOON: Duration = Duration::from_secs(60);

/// A VM with two snapshots, and a new one being made of the second.
struct Meanwhile {
    lab: Lab,
    case: Case,
    snapshots: [Order; 2],
    taken: Vec<Content>,
    order: RestoreOrder,
    agent: Agent,
    /// The process that copies.
    copying: PathBuf,
}

impl Meanwhile {
    async fn of(case: Case) -> Self {
        let mut lab = Lab::of(case).await;
        lab.world.write().await;
        let (first, _) = lab.snapshot(case.driver, 1).await;
        lab.world.write().await;
        let (second, taken) = lab.snapshot(case.driver, 2).await;
        lab.world.write().await;
        let order = lab.order_to_new(&second, "new", RestoreMode::Full);
        // A cluster takes half a second, which is time enough to stop it.
        let agent = Agent::start(&lab, &order, "true", "-r 128K");
        let copying = agent.copying().await;
        until_open(&copying, &lab.world.artifacts(&second)[0].handle).await;
        signal(&copying, "STOP");
        assert!(Lab::run(&lab.world).join("only-reads").exists(), "the VM's turn isn't given up");
        Self { lab, case, snapshots: [first, second], taken, order, agent, copying }
    }

    /// What is copied, and what that is read through, waits to be deleted, and says for what.
    async fn check_mark(&self) {
        let merges = self.case.driver == "overlay";
        for snapshot in self.snapshots.iter().rev().take(if merges { 2 } else { 1 }) {
            let refused = self.lab.delete(snapshot).await.expect("it was deleted");
            assert!(refused.contains("restore shop/restore-1 copies"), "{refused}");
        }
    }

    /// A snapshot is taken and deleted, another is taken and kept.
    async fn snapshot(&mut self) {
        let lab = &mut self.lab;
        let (third, _) = lab.snapshot(self.case.driver, 3).await;
        lab.world.write().await;
        assert_eq!(lab.delete(&third).await, None);
        lab.snapshot(self.case.driver, 4).await;
        lab.world.write().await;
        lab.world.check_guest().await;
    }

    /// Once nothing is copied, nothing is waited for.
    async fn check_end(lab: &Lab, snapshots: &[Order]) {
        for snapshot in snapshots.iter().rev() {
            assert_eq!(lab.delete(snapshot).await, None);
        }
        lab.world.check_guest().await;
        assert!(!lab.files().iter().any(|file| file.contains("vmrestore-")), "{:?}", lab.files());
    }
}

/// Until the process has an image open.
async fn until_open(process: &Path, image: &Path) {
    let is_open = || {
        let files = std::fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        files.filter_map(|file| std::fs::read_link(file.path()).ok()).any(|file| file == image)
    };
    let opened = async {
        while !is_open() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(SOON, opened).await.expect("nothing is read");
}

fn signal(process: &Path, signal: &str) {
    let pid = process.file_name().unwrap();
    assert!(Command::new("kill").arg(format!("-{signal}")).arg(pid).status().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_is_snapshotted_while_a_new_one_is_copied_from_its_past_and_what_is_copied_stays() {
    for_every(CASES.iter().copied(), |case| async move {
        let mut meanwhile = Meanwhile::of(case).await;
        meanwhile.check_mark().await;
        meanwhile.snapshot().await;
        meanwhile.check_mark().await;
        let Meanwhile { lab, snapshots, taken, agent, copying, .. } = meanwhile;
        signal(&copying, "CONT");
        let status = agent.ended().await;
        assert_eq!(status.phase, Some(RestoreContentPhase::Succeeded), "{}", why(&status).1);
        Meanwhile::check_end(&lab, &snapshots).await;
        for (disk, content) in status.disks.iter().zip(&taken) {
            content.check(Path::new(&disk.path.0), &disk.format).unwrap();
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_agent_that_died_was_copying_stays_until_the_next_one_has_copied_it() {
    for_every(CASES.iter().copied(), |case| async move {
        let mut meanwhile = Meanwhile::of(case).await;
        let copying = meanwhile.copying.clone();
        meanwhile.agent.kill();
        tokio::time::timeout(SOON, until_gone(&copying)).await.expect("qemu-img goes on");
        meanwhile.check_mark().await;
        meanwhile.snapshot().await;
        meanwhile.check_mark().await;
        let Meanwhile { lab, snapshots, taken, order, .. } = meanwhile;
        for (image, content) in lab.restore(&order).await.iter().zip(&taken) {
            content.check(image, image.extension().and_then(|format| format.to_str()).unwrap()).unwrap();
        }
        Meanwhile::check_end(&lab, &snapshots).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_restore_copied_that_was_cancelled_is_deleted_after_it() {
    let Meanwhile { lab, snapshots, agent, .. } = Meanwhile::of(CASES[0]).await;
    agent.cancel();
    let status = agent.ended().await;
    assert_eq!((status.phase, why(&status).0.as_str()), (Some(RestoreContentPhase::Failed), reasons::CANCELLED));
    Meanwhile::check_end(&lab, &snapshots).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chains_are_not_shortened_while_one_is_copied() {
    let Meanwhile { mut lab, agent, .. } = Meanwhile::of(CASES[0]).await;
    let limits = Limits { max_chain_depth: Some(1), ..Limits::default() };
    let order = Order { limits, ..lab.world.order("overlay", 3) };
    Box::pin(lab.world.snapshot(&order)).await;
    lab.world.write().await;
    let waiting = Waiting::default();
    let depth = || lab.world.sessions.shorten(&order.vm, &waiting);
    assert_eq!(depth().await.unwrap(), Depth::Unseen);
    agent.cancel();
    agent.ended().await;
    assert!(matches!(depth().await.unwrap(), Depth::Needed(_)));
}
