//! A real guest whose disks are a thin and a thick volume: what it had written by a snapshot comes back, in place and as
//! new volumes, and guests start from it.

use std::path::PathBuf;
use std::time::Instant;

use freezeframe_api::v1alpha1::RestoreMode;
use freezeframe_e2e::{Agent, Disk, Format, Guest, GuestConfig, Stopped, witness};

use crate::nested::{RECORDS, config, formatted, remove_volumes};
use crate::node::{GROUP, names, thick, thin};
use crate::restores::{delete, order, restore, restores, take, to_new};
use crate::world::World;

const SOME: u64 = 3;
const DISKS: [&str; 2] = ["vda", "vdb"];

/// How many records are on each of a guest's disks, which are of one instant.
fn counts(disks: &[Disk]) -> Vec<u64> {
    let report = witness::check(disks).unwrap();
    report.ensure_row_of_one_instant().unwrap();
    report.disks.iter().map(|disk| disk.records.whole).collect()
}

fn raw(paths: &[PathBuf]) -> Vec<Disk> {
    paths.iter().map(|path| Disk::existing(path, Format::Raw)).collect()
}

/// The guest writes on from what is on its disks, which has `found` records each; then its QEMU is killed.
async fn writes_on(guest: Guest, disks: &[Disk], found: &[u64]) -> Stopped {
    let written = guest.await_records(SOME, RECORDS).await.unwrap();
    assert!(written > found[0], "record {written} after {found:?}");
    let stopped = guest.kill().unwrap();
    let now = counts(disks);
    assert!(now[1] >= stopped.records_written(), "{now:?} of {}", stopped.records_written());
    stopped
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_on_volumes_goes_back_to_an_instant_and_forth_and_others_start_from_it() {
    let started = Instant::now();
    let measured = |what: &str| println!("measured: {what} after {:?}", started.elapsed());
    let world = World::without_vm();
    let volumes = [thin("guest-a"), thick("guest-b")];
    let before = names();
    let disks: Vec<_> = volumes.iter().map(formatted).collect();
    let config = GuestConfig { agent: Agent::Off, ..config(&world, disks.clone()) };
    let guest = Guest::boot(config).await.unwrap();
    guest.await_records(SOME, RECORDS).await.unwrap();
    measured("guest up");

    let old = take(&world, 1).await;
    let then = counts(&raw(&old.handles));
    let durable = guest.await_records(SOME, RECORDS).await.unwrap();
    assert!(durable > then[0]);
    let restores = restores(world.directory());
    let mut clones = vec![];
    for (number, name, mode) in [(1, "linked", RestoreMode::Linked), (2, "full", RestoreMode::Full)] {
        let paths = restore(&restores, &to_new(number, &old, name, mode)).await;
        assert_eq!(paths, DISKS.map(|disk| PathBuf::from(format!("/dev/{GROUP}/{name}-{disk}"))));
        assert_eq!(counts(&raw(&paths)), then, "{name}");
        clones.push(paths);
    }
    guest.await_records(1, RECORDS).await.unwrap();
    let stopped = guest.kill().unwrap();
    measured("new volumes made, guest stopped");

    world.say_disks(&DISKS, &volumes);
    let kept = take(&world, 2).await;
    let last = counts(&disks);
    assert!(last[1] >= stopped.records_written());
    assert_eq!(counts(&raw(&kept.handles)), last);
    restore(&restores, &order(3, &old, Some(&kept))).await;
    assert_eq!(counts(&disks), then);
    measured("put back");
    let guest = stopped.restart_same_command_line().await.unwrap();
    let stopped = writes_on(guest, &disks, &then).await;
    measured("guest up as it was, stopped");

    let undone = take(&world, 3).await;
    restore(&restores, &order(4, &kept, Some(&undone))).await;
    assert_eq!(counts(&disks), last);
    let guest = stopped.restart_same_command_line().await.unwrap();
    let stopped = writes_on(guest, &disks, &last).await;
    measured("undone, guest up, stopped");

    // One disk of either kind, of the same instant.
    let mixed = raw(&[clones[0][0].clone(), clones[1][1].clone()]);
    for taken in [&undone, &old, &kept] {
        delete(&world, taken).await;
    }
    let guest = stopped.restart_with(mixed.clone()).await.unwrap();
    writes_on(guest, &mixed, &then).await;
    measured("guest up on new volumes");

    let made = clones.iter().flatten().map(|path| path.file_name().unwrap().to_str().unwrap());
    remove_volumes(&made.chain(["guest-a", "guest-b"]).collect::<Vec<_>>());
    assert_eq!(names(), before);
}
