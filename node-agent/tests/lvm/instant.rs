//! One instant for volumes of a guest that writes all the while.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use freezeframe_api::v1alpha1::{ContentPhase, VMSnapshotContentStatus};

use crate::counting::COUNTER;
use crate::node::{thick, thin};
use crate::world::World;

const SOON: Duration = Duration::from_secs(240);
/// Snapshots that have to be good, with something written between them.
const ENOUGH: u32 = 3;

fn counters(status: &VMSnapshotContentStatus) -> Vec<u32> {
    let counter = |handle: &str| {
        let mut bytes = [0; 4];
        File::open(handle).unwrap().read_exact_at(&mut bytes, COUNTER as u64).unwrap();
        u32::from_le_bytes(bytes)
    };
    status.disks.iter().map(|disk| counter(&disk.handle.as_ref().unwrap().0)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_volumes_of_a_writing_guest_are_cut_at_one_instant() {
    let world = World::counting(&[thin("count-a"), thick("count-b")]).await;
    let (end, mut last, mut taken) = (Instant::now() + SOON, 0, 0);
    for number in 1.. {
        let order = World::order(number);
        let status = world.advance(&order).await;
        assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
        let counters = counters(&status);
        println!("counted: {counters:?}");
        assert!(counters[0].wrapping_sub(counters[1]) <= 1, "snapshot {number}: {counters:?}");
        assert!(world.sessions.delete(&order).await.unwrap().over);
        taken += u32::from(counters[1] > last);
        last = counters[1];
        if taken >= ENOUGH {
            return;
        }
        assert!(Instant::now() < end, "the guest doesn't write: {counters:?}");
    }
}
