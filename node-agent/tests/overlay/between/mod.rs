//! An agent that ends at a named point, and what comes before it goes on: a VM that is started, a file system that isn't
//! mounted yet, an owner who deletes the disk.

mod good_cuts;
mod merges;
mod records;

use std::panic::AssertUnwindSafe;
use std::path::Path;

use freezeframe_api::v1alpha1::VMSnapshotContentStatus;
use freezeframe_node_agent::crash::CUT_AT;
use freezeframe_node_agent::session::Turn;
use freezeframe_node_agent::session::order::Order;
use futures::FutureExt;

use crate::crashes::cut_off;
use crate::lab::{Lab, Wanted};
use crate::machine::{path, view};

/// Works until the agent ends at `point`.
async fn cut_at<T>(point: &'static str, work: impl Future<Output = T>) {
    let ended = AssertUnwindSafe(CUT_AT.scope(point, work)).catch_unwind().await;
    let Err(why) = ended else { panic!("it never came to {point}") };
    assert_eq!(why.downcast_ref::<String>().map(String::as_str), Some(point));
}

fn backing(image: &Path) -> String {
    let info = std::process::Command::new("qemu-img").args(["info", "-U", "--output=json", path(image)]).output();
    let info: serde_json::Value = serde_json::from_slice(&info.unwrap().stdout).unwrap();
    info["backing-filename"].as_str().unwrap().to_owned()
}

fn name(image: &Path) -> &str {
    image.file_name().unwrap().to_str().unwrap()
}

impl Lab {
    /// Every image reads as it must, without any deletion's being gone on with.
    fn check_views(&self) {
        for disk in &self.disks {
            assert_eq!(view(&disk.image), disk.now, "the VM's own image");
        }
        for (number, snapshot) in &self.snapshots {
            assert_eq!(view(&self.handles(*number)[0]), snapshot.views[0], "snapshot {number}");
        }
    }

    fn order_of(&self, number: u32) -> Order {
        self.snapshots[&number].order.clone()
    }

    /// One turn of the controller's.
    async fn turn(&self, order: &Order) -> VMSnapshotContentStatus {
        match self.sessions.advance(order, &Wanted).await.unwrap() {
            Turn::Report(status) | Turn::Over(status) => *status,
        }
    }
}

/// A merge that was begun, and cut off before anything came of it.
async fn begun(lab: &Lab, order: &Order) {
    for polls in 1.. {
        assert!(cut_off(Box::pin(lab.sessions.delete(order)), polls).await.is_none(), "it was done too soon");
        let record = lab.sessions.journal.load(&order.uid).unwrap().unwrap();
        if record.tasks[0].state["merging"].is_object() {
            return;
        }
    }
}
