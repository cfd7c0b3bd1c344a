//! The agent is killed at every effect of a restore, in a process of its own; then it goes on, or takes back.

use std::os::unix::process::ExitStatusExt;

use freezeframe_api::conditions::reasons;
use freezeframe_api::v1alpha1::{RestoreContentPhase, RestoreMode};
use freezeframe_node_agent::restore::Turn;
use freezeframe_node_agent::restore::order::RestoreOrder;

use crate::cases::for_every;
use crate::content::Content;
use crate::lab::{CASES, Lab, Wish, why};
use crate::machine::Machine;
use crate::node;

const IN_PLACE: [&str; 7] = [
    "restore-planned",
    "restore-made",
    "restore-switching",
    "restore-away",
    "restore-switched-one",
    "restore-switched",
    "restore-done",
];
const TO_NEW: [&str; 7] = [
    "restore-planned",
    "restore-made",
    "restore-switching",
    "restore-switched-one",
    "restore-switched",
    "restore-published",
    "restore-done",
];

/// The process that is killed. Run as a test it has nothing to do.
#[tokio::test(flavor = "multi_thread")]
async fn the_agent_that_is_killed() {
    let Some((_, restores, order)) = node::asked() else { return };
    drop(restores.advance(&order, &Wish::default(), &tokio::sync::watch::Sender::new(None)).await.unwrap());
}

/// Works on an order in another process until it is killed at `point`.
pub fn killed_at(lab: &Lab, order: &RestoreOrder, point: &str) {
    let test = "crashes::the_agent_that_is_killed";
    let mut agent = node::agent(test, Lab::run(&lab.world), &lab.world.storage.root(), order);
    let ended = agent.env("FREEZEFRAME_CRASH_AT", point).output().unwrap();
    let said = String::from_utf8_lossy(&ended.stdout);
    assert_eq!(ended.status.signal(), Some(9), "not killed at {point}: {said}");
}

struct InPlace {
    lab: Lab,
    order: RestoreOrder,
    old: Vec<Content>,
    before: Vec<Content>,
}

impl InPlace {
    async fn new(driver: usize) -> Self {
        let case = CASES[driver];
        let mut lab = Lab::of(case).await;
        lab.world.write().await;
        let (snapshot, old) = lab.snapshot(case.driver, 1).await;
        lab.world.write().await;
        let (kept, before) = lab.stop_and_keep(case.driver, 2).await;
        let order = lab.order_in_place(&snapshot, &kept);
        Self { lab, order, old, before }
    }

    /// Which data the disks have; none if a disk isn't there, so that no VM could start.
    fn reads(&self) -> Option<Vec<Content>> {
        let disks = &self.lab.world.disks;
        if disks.iter().any(|disk| !disk.file.exists()) {
            return None;
        }
        let is = |data: &[Content]| disks.iter().zip(data).all(|(d, c)| c.check(&d.file, &d.format).is_ok());
        let found = [&self.old, &self.before].into_iter().find(|data| is(data));
        Some(found.expect("a mixed set, or other data").clone())
    }

    fn check_tidy(&self) {
        let names = self.lab.files();
        let left: Vec<_> = names.iter().filter(|f| f.contains("vmrestore-") || f.contains("vmreplaced-")).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

struct Subject(usize, &'static str, bool);

impl std::fmt::Display for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at {}{}", CASES[self.0], self.1, if self.2 { ", then deleted" } else { "" })
    }
}

fn subjects(drivers: &[usize], points: &[&'static str]) -> Vec<Subject> {
    let of = |driver: usize| points.iter().flat_map(move |point| [false, true].map(|end| Subject(driver, point, end)));
    drivers.iter().copied().flat_map(of).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_in_place_that_is_killed_anywhere_is_whole_or_not_there_at_every_moment() {
    for_every(subjects(&[0, 4], &IN_PLACE), |Subject(driver, point, deleted)| async move {
        let mut set = InPlace::new(driver).await;
        killed_at(&set.lab, &set.order, point);
        set.reads();
        if deleted {
            let begun = !matches!(point, "restore-planned" | "restore-made" | "restore-switching");
            let deletion = set.lab.restores.delete(&set.order, None).await.unwrap();
            assert!(deletion.over);
            assert_eq!(set.reads().as_ref(), Some(if begun { &set.old } else { &set.before }));
        } else {
            set.lab.restore(&set.order).await;
            assert_eq!(set.reads().as_ref(), Some(&set.old));
        }
        set.check_tidy();
        set.lab.world.contents = set.reads().unwrap();
        set.lab.world.start().await;
        set.lab.world.check_guest().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_vm_whose_making_is_killed_anywhere_is_there_or_not() {
    for_every(subjects(&[0, 4], &TO_NEW), |Subject(driver, point, deleted)| async move {
        let case = CASES[driver];
        let mut lab = Lab::of(case).await;
        lab.world.write().await;
        let (snapshot, taken) = lab.snapshot(case.driver, 1).await;
        let order = lab.order_to_new(&snapshot, "new", RestoreMode::Full);
        let before = lab.files();
        let directory = lab.world.sessions.vm_root.join("shop/new");
        killed_at(&lab, &order, point);
        let published = ["restore-published", "restore-done"].contains(&point);
        assert_eq!(directory.exists(), published);
        if published {
            // Its owner has it from then on.
            std::fs::write(directory.join("target.yaml"), "labels: {app: mine}").unwrap();
        }
        if deleted {
            assert!(lab.restores.delete(&order, None).await.unwrap().over);
            assert_eq!(lab.files() == before, !published, "{:?}", lab.files());
        } else {
            let images = lab.restore(&order).await;
            for (image, content) in images.iter().zip(&taken) {
                content.check(image, image.extension().unwrap().to_str().unwrap()).unwrap();
            }
            assert!(directory.join("target.yaml").exists());
        }
        lab.world.check_guest().await;
    })
    .await;
}

/// Nobody but the agent knows of the restore: the VM may be started at any time.
#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_was_started_after_a_crash_keeps_what_it_wrote() {
    for_every(
        subjects(&[0, 4], &["restore-made", "restore-switching"]),
        |Subject(driver, point, stopped)| async move {
            let mut set = InPlace::new(driver).await;
            killed_at(&set.lab, &set.order, point);
            set.lab.world.start().await;
            set.lab.world.write().await;
            let reason = if stopped { reasons::VM_CHANGED } else { reasons::VM_RUNNING };
            if stopped {
                set.lab.world.quit().await;
            }
            let status = set.lab.advance(&set.order).await;
            let (found, message) = why(&status);
            assert_eq!((status.phase, found.as_str()), (Some(RestoreContentPhase::Failed), reason), "{message}");
            set.check_tidy();
            if stopped {
                set.lab.world.check_images();
            } else {
                set.lab.world.check_guest().await;
            }
        },
    )
    .await;
}

/// The agent was down when the VM's turn came to a deletion: the name that was planned for has other data then.
#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_goes_on_does_not_take_another_snapshots_data_for_its_own() {
    for point in ["restore-planned", "restore-made"] {
        let mut lab = Lab::of(CASES[0]).await;
        let mut snapshots = vec![];
        for number in 1..=3 {
            lab.world.write().await;
            snapshots.push(lab.snapshot("overlay", number).await.0);
        }
        lab.world.quit().await;
        let order = RestoreOrder { mode: RestoreMode::Full, ..lab.order_in_place(&snapshots[0], &snapshots[2]) };
        killed_at(&lab, &order, point);
        assert_eq!(lab.delete(&snapshots[0]).await, None);
        let status = lab.advance(&order).await;
        let (found, message) = why(&status);
        assert_eq!(
            (status.phase, found.as_str()),
            (Some(RestoreContentPhase::Failed), reasons::SNAPSHOT_NOT_READY),
            "{message}"
        );
        let left: Vec<_> = lab.files().into_iter().filter(|file| file.contains("vmrestore-")).collect();
        assert!(left.is_empty(), "{left:?}");
        lab.world.check_images();
    }
}

/// Somebody replaces one disk's image after the crash, with the VM at rest: nothing of ours has begun.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_somebody_else_is_not_taken_for_a_name_that_changed_hands() {
    let set = InPlace::new(0).await;
    killed_at(&set.lab, &set.order, "restore-switching");
    let (mine, other) = (&set.lab.world.disks[0].file, &set.lab.world.disks[1].file);
    let copied = mine.with_extension("copied");
    std::fs::copy(mine, &copied).unwrap();
    std::fs::rename(&copied, mine).unwrap();
    let (own, other_before) = (std::fs::read(mine).unwrap(), std::fs::read(other).unwrap());
    let status = set.lab.advance(&set.order).await;
    let (found, message) = why(&status);
    assert_eq!((status.phase, found.as_str()), (Some(RestoreContentPhase::Failed), reasons::VM_CHANGED), "{message}");
    assert!(std::fs::read(mine).unwrap() == own && std::fs::read(other).unwrap() == other_before);
    set.check_tidy();
}

/// The names have changed hands, only the record doesn't say so yet: the VM is started and its disks are cut.
#[tokio::test(flavor = "multi_thread")]
async fn a_restore_whose_disks_were_cut_before_it_was_done_comes_to_its_end() {
    for deleted in [false, true] {
        let mut set = InPlace::new(0).await;
        killed_at(&set.lab, &set.order, "restore-switched");
        set.lab.world.contents.clone_from(&set.old);
        set.lab.world.start().await;
        set.lab.world.write().await;
        set.lab.snapshot("overlay", 3).await;
        set.lab.world.write().await;
        if deleted {
            assert!(set.lab.restores.delete(&set.order, None).await.unwrap().over);
        } else {
            set.lab.restore(&set.order).await;
        }
        set.check_tidy();
        set.lab.world.check_guest().await;
    }
}

/// With one disk gone from its name, a QEMU has the other: the restore waits for it to end.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_open_elsewhere_is_not_renamed_though_another_was() {
    let set = InPlace::new(0).await;
    killed_at(&set.lab, &set.order, "restore-away");
    let left = set.lab.world.disks.iter().find(|disk| disk.file.exists()).unwrap();
    let directory = set.lab.world.sessions.vm_root.join("shop/other");
    std::fs::create_dir_all(&directory).unwrap();
    let machine = Machine::start(&directory, std::slice::from_ref(left)).await;
    let (wish, told) = (Wish::default(), tokio::sync::watch::Sender::new(None));
    let turn = set.lab.restores.advance(&set.order, &wish, &told).await.unwrap();
    let Turn::Again(status) = turn else { panic!("it goes on") };
    assert!(why(&status).1.contains("open in another process"), "{:?}", why(&status));
    machine.quit().await;
    set.lab.restore(&set.order).await;
    assert_eq!(set.reads().as_ref(), Some(&set.old));
}

/// With one disk gone from its name, the VM's owner starts it with the other: what it writes there is kept nowhere.
#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_ran_without_its_missing_disk_keeps_what_it_wrote_and_gets_that_disk_back() {
    for killed_again in [false, true] {
        let mut set = InPlace::new(0).await;
        killed_at(&set.lab, &set.order, "restore-away");
        let at = set.lab.world.disks.iter().position(|disk| disk.file.exists()).unwrap();
        let left = set.lab.world.disks[at].clone();
        let machine = Machine::start(&set.lab.world.directory(), std::slice::from_ref(&left)).await;
        for command in set.before[at].write(99) {
            machine.io(&left.name, &command).await;
        }
        machine.quit().await;
        if killed_again {
            killed_at(&set.lab, &set.order, "restore-put-back");
        }
        let status = set.lab.advance(&set.order).await;
        let (found, message) = why(&status);
        assert_eq!(
            (status.phase, found.as_str()),
            (Some(RestoreContentPhase::Failed), reasons::VM_CHANGED),
            "{message}"
        );
        set.check_tidy();
        set.lab.check_disks(&set.before);
    }
}

/// The same, and that disk is cut too: its name has a layer, and what was checked lies below.
#[tokio::test(flavor = "multi_thread")]
async fn a_layer_under_the_name_of_a_disk_whose_turn_has_not_come_is_noticed() {
    let set = InPlace::new(0).await;
    killed_at(&set.lab, &set.order, "restore-away");
    let left = set.lab.world.disks.iter().find(|disk| disk.file.exists()).unwrap();
    let below = left.file.with_extension("below");
    std::fs::rename(&left.file, &below).unwrap();
    let name = below.file_name().unwrap().to_str().unwrap();
    crate::storage::run(&format!("qemu-img create -q -f qcow2 -F qcow2 -b {name}"), &[&left.file]);
    let status = set.lab.advance(&set.order).await;
    let (found, message) = why(&status);
    assert_eq!((status.phase, found.as_str()), (Some(RestoreContentPhase::Failed), reasons::VM_CHANGED), "{message}");
    set.check_tidy();
    set.lab.check_disks(&set.before);
}

/// Old images are away from their names, and somebody tidies up: what was replaced isn't let go of.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_image_is_kept_where_the_new_one_is_gone() {
    let set = InPlace::new(0).await;
    killed_at(&set.lab, &set.order, "restore-switched-one");
    let unfinished = set.lab.files().into_iter().find(|file| file.contains("vmrestore-")).unwrap();
    std::fs::remove_file(set.lab.world.storage.images().join(unfinished)).unwrap();
    let (wish, told) = (Wish::default(), tokio::sync::watch::Sender::new(None));
    let turn = set.lab.restores.advance(&set.order, &wish, &told).await.unwrap();
    assert!(matches!(turn, Turn::Again(_)));
    assert_eq!(set.lab.files().iter().filter(|file| file.contains("vmreplaced-")).count(), 2);
}
