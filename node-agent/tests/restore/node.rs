//! The restores of a node whose files are all in one directory, as its agent has them; in this process, or in one of its
//! own that can be killed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use freezeframe_guard::client::Guard;
use freezeframe_node_agent::boot::{Accelerator, Boots};
use freezeframe_node_agent::drivers::Drivers;
use freezeframe_node_agent::hypervisor::image::ImageRoots;
use freezeframe_node_agent::restore::Restores;
use freezeframe_node_agent::restore::order::RestoreOrder;
use freezeframe_node_agent::session::Sessions;
use freezeframe_node_agent::session::journal::Journal;
use freezeframe_node_agent::session::machine::StoppedVms;
use freezeframe_node_agent::session::space_watch::SpaceWatch;

/// Where nothing boots, all of it is waited.
const BOOT: Duration = Duration::from_secs(10);

const ORDER: &str = "FREEZEFRAME_TEST_ORDER";
const RUN: &str = "FREEZEFRAME_TEST_RUN";
const ROOT: &str = "FREEZEFRAME_TEST_ROOT";

/// The restores of the node whose files are in `run`.
pub fn restores(run: &Path, roots: ImageRoots, drivers: Drivers) -> Restores {
    let boots = Arc::new(Boots::new(64, BOOT, 1, Accelerator::Tcg));
    let sessions = Sessions {
        vm_root: run.join("vms"),
        roots,
        guard: Guard::new(run.join("guard.sock")),
        journal: Journal::open(run.join("contents")).unwrap(),
        restores: Journal::open(run.join("restores")).unwrap(),
        drivers,
        stopped: StoppedVms::with_files_only(),
        space: SpaceWatch::default(),
        boots: boots.clone(),
    };
    let journal = sessions.restores.clone();
    Restores { sessions: Arc::new(sessions), journal, boots }
}

/// This test program once more, to be an agent that works on an order: `test` is the test that does, with [`asked`].
pub fn agent(test: &str, run: &Path, root: &Path, order: &RestoreOrder) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test]).env(ORDER, serde_json::to_string(order).unwrap());
    command.env(RUN, run).env(ROOT, root);
    command
}

/// What this process is an agent for: the node's directory, its restores, and the order; none for a test like any other.
pub fn asked() -> Option<(PathBuf, Restores, RestoreOrder)> {
    let order = serde_json::from_str(&std::env::var(ORDER).ok()?).unwrap();
    let (run, root) = (PathBuf::from(std::env::var(RUN).unwrap()), PathBuf::from(std::env::var(ROOT).unwrap()));
    let roots = ImageRoots::new(vec![root, run.join("vms")]);
    Some((run.clone(), restores(&run, roots, Drivers::default()), order))
}
