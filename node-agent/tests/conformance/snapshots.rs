//! Whole snapshots, through the sessions: what a user sees.

use freezeframe_api::conditions::{find, types};
use freezeframe_api::v1alpha1::ContentPhase;
use freezeframe_node_agent::drivers::Verdict;
use freezeframe_node_agent::hypervisor::disks::disks;
use freezeframe_node_agent::session::order::Order;

use crate::cases::{Case, drivers, for_every_case, for_every_case_of, parameters};
use crate::content::Content;
use crate::storage::{Kind, run};
use crate::world::World;

const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

#[tokio::test(flavor = "multi_thread")]
async fn the_artifacts_keep_what_was_before_the_cut_and_the_vm_goes_on() {
    for_every_case(|case| async move {
        let mut world = World::of(case).await;
        let before = world.footprint().await;
        world.write().await;
        let order = world.order(case.driver, 1);
        let taken = world.snapshot(&order).await;
        world.write().await;
        world.check_artifacts(&order, &taken);
        world.check_guest().await;
        world.restart().await;
        world.check_artifacts(&order, &taken);
        world.check_guest().await;
        world.delete(&order).await;
        world.check_tidy(&before).await;
        world.check_guest().await;
        world.quit().await;
        world.check_images();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_driver_takes_what_it_says_it_can_and_refuses_the_rest_in_words() {
    for kind in [Kind::Plain, Kind::Xfs, Kind::Btrfs] {
        for format in ["raw", "qcow2", "qed", "vdi", "vmdk"] {
            let mut world = World::on(kind, format).await;
            for (number, driver) in (1..).zip(drivers().iter()) {
                world.write().await;
                let before = world.files();
                let found = disks(&world.vm().await, &world.sessions.roots).await.unwrap().found;
                let order = world.order(driver.name(), number);
                let verdict = driver.can_take(&found[0].facts, &parameters(driver.name(), world.copies.path()));
                let what = format!("{} of {format} on {kind:?}: {verdict:?}", driver.name());
                match verdict {
                    Verdict::Usable(why) => {
                        assert!(!why.is_empty(), "{what}");
                        let status = world.advance(&order).await;
                        assert_eq!(status.phase, Some(ContentPhase::Ready), "{what}: {:?}", status.conditions);
                        assert_eq!(status.disks[0].driver_reason.as_deref(), Some(why.as_str()));
                        world.check_artifacts(&order, &world.contents);
                        world.delete(&order).await;
                    }
                    Verdict::Unusable(why) => {
                        let status = world.advance(&order).await;
                        assert_eq!(status.phase, Some(ContentPhase::Failed), "{what}");
                        let accepted = find(&status.conditions, types::ACCEPTED).unwrap();
                        assert_eq!(accepted.status, "False", "{what}");
                        assert!(!why.is_empty() && accepted.message.contains(&why), "{what}: {}", accepted.message);
                    }
                }
                assert_eq!(world.files(), before, "{what}");
                world.check_guest().await;
            }
        }
    }
}

struct Three {
    world: World,
    orders: Vec<Order>,
    taken: Vec<Vec<Content>>,
}

impl Three {
    async fn of(case: Case) -> Self {
        let mut world = World::of(case).await;
        let (mut orders, mut taken) = (vec![], vec![]);
        for number in 1..=3 {
            world.write().await;
            let order = world.order(case.driver, number);
            taken.push(world.snapshot(&order).await);
            orders.push(order);
        }
        world.write().await;
        Self { world, orders, taken }
    }

    fn check(&self, left: &[usize]) {
        for &at in left {
            self.world.check_artifacts(&self.orders[at], &self.taken[at]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn three_snapshots_go_in_any_order_while_the_vm_runs() {
    for_every_case(|case| async move {
        for sequence in ORDERS {
            let mut three = Three::of(case).await;
            let first: Vec<String> = three.world.disks.iter().map(|disk| disk.file.display().to_string()).collect();
            for (gone, at) in sequence.into_iter().enumerate() {
                three.world.delete(&three.orders[at]).await;
                three.check(&sequence[gone + 1..]);
                three.world.write().await;
                three.world.check_guest().await;
            }
            let files = three.world.files();
            let left: Vec<_> = files.iter().filter(|file| !file.starts_with("subvolume")).cloned().collect();
            assert_eq!(left, first, "{sequence:?}");
            three.world.quit().await;
            three.world.check_images();
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_snapshots_go_while_the_vm_is_restarted_between() {
    for_every_case(|case| async move {
        for sequence in [[0, 1, 2], [1, 2, 0], [2, 0, 1]] {
            let mut three = Three::of(case).await;
            for (gone, at) in sequence.into_iter().enumerate() {
                three.world.restart().await;
                three.world.check_guest().await;
                three.world.delete(&three.orders[at]).await;
                three.check(&sequence[gone + 1..]);
                three.world.write().await;
            }
            three.world.check_guest().await;
            three.world.quit().await;
            three.world.check_images();
            let images: Vec<_> = three.world.disks.iter().map(|disk| disk.file.display().to_string()).collect();
            let files = three.world.files();
            assert!(files.iter().all(|file| file.starts_with("subvolume") || images.contains(file)), "{files:?}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_snapshots_go_while_the_vm_is_stopped() {
    for_every_case(|case| async move {
        for sequence in [[0, 1, 2], [1, 0, 2], [2, 1, 0]] {
            let mut three = Three::of(case).await;
            three.world.quit().await;
            for (gone, at) in sequence.into_iter().enumerate() {
                three.world.delete(&three.orders[at]).await;
                three.check(&sequence[gone + 1..]);
                three.world.check_images();
            }
            three.world.start().await;
            three.world.check_guest().await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_deleted_though_its_vms_directory_is_gone() {
    for_every_case_of("qcow2", |case| async move {
        let mut world = World::of(case).await;
        world.write().await;
        let order = world.order(case.driver, 1);
        world.snapshot(&order).await;
        world.quit().await;
        let images = world.storage.images();
        if case.driver == "btrfs" {
            run("btrfs subvolume delete", &[world.artifacts(&order)[0].handle.parent().unwrap()]);
        }
        std::fs::remove_dir_all(&images).unwrap();
        let (copies, root) = (case.driver == "copy", world.storage.root());
        for left in std::fs::read_dir(&root).unwrap() {
            std::fs::remove_dir_all(left.unwrap().path()).unwrap();
        }
        // So does a file system look that isn't mounted.
        let deletion = world.sessions.delete(&order).await.unwrap();
        let removed = find(&deletion.status.conditions, types::REMOVED).unwrap();
        assert!(deletion.over == copies && (copies || removed.message.contains("mount")), "{}", removed.message);
        std::fs::create_dir(root.join("another-vm")).unwrap();
        world.delete(&order).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_has_the_artifacts_name_is_neither_taken_for_it_nor_touched() {
    for_every_case(|case| async move {
        let mut world = World::of(case).await;
        world.write().await;
        let order = world.order(case.driver, 1);
        world.snapshot(&order).await;
        let names: Vec<_> = world.artifacts(&order).into_iter().map(|artifact| artifact.handle).collect();
        world.delete(&order).await;
        world.sessions.journal.forget(&order.uid).unwrap();
        for name in &names {
            std::fs::create_dir_all(name.parent().unwrap()).unwrap();
            std::fs::write(name, "somebody else's").unwrap();
        }
        let before = world.footprint().await;
        let status = world.advance(&order).await;
        assert_eq!(status.phase, Some(ContentPhase::Failed));
        let said = &find(&status.conditions, types::READY).unwrap().message;
        assert!(said.contains("already") || said.contains("exists"), "{said}");
        world.delete(&order).await;
        for name in &names {
            assert_eq!(std::fs::read_to_string(name).unwrap(), "somebody else's", "{}", name.display());
        }
        world.check_tidy(&before).await;
        world.check_guest().await;
    })
    .await;
}
