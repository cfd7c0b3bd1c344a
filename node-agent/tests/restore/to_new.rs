//! A snapshot's disks as a new VM's, while the old one runs.

use std::os::unix::fs::MetadataExt;

use freezeframe_api::v1alpha1::{RestoreContentPhase, RestoreMode, RestoreStep};
use freezeframe_node_agent::restore::order::RestoreOrder;

use crate::cases::for_every;
use crate::lab::{CASES, Lab};
use crate::machine::{Disk, Machine};

#[tokio::test(flavor = "multi_thread")]
async fn a_new_vm_has_the_snapshots_data_and_the_old_one_goes_on() {
    for_every(CASES.iter().copied(), |case| async move {
        let mut lab = Lab::of(case).await;
        lab.world.write().await;
        let (snapshot, taken) = lab.snapshot(case.driver, 1).await;
        lab.world.write().await;
        for (name, mode) in [("linked", RestoreMode::Linked), ("full", RestoreMode::Full)] {
            let order = lab.order_to_new(&snapshot, name, mode);
            let status = lab.advance(&order).await;
            assert_eq!(status.phase, Some(RestoreContentPhase::Succeeded), "{:?}", status.conditions);
            let mut disks = vec![];
            for ((row, disk), content) in status.disks.iter().zip(&lab.world.disks).zip(&taken) {
                content.check(row.path.0.as_ref(), &row.format).unwrap();
                let (made, like) = (std::fs::metadata(&row.path.0).unwrap(), std::fs::metadata(&disk.file).unwrap());
                assert_eq!((made.uid(), made.mode()), (like.uid(), like.mode()));
                disks.push(Disk {
                    name: disk.name.clone(),
                    file: row.path.0.clone().into(),
                    format: row.format.clone(),
                    options: String::new(),
                });
                assert!(mode == RestoreMode::Linked || !row.linked);
            }
            let directory = lab.world.sessions.vm_root.join("shop").join(name);
            let text = std::fs::read_to_string(directory.join("target.yaml")).unwrap();
            let json: serde_json::Value = serde_json::from_str(text.split_once('\n').unwrap().1).unwrap();
            assert_eq!(json["disks"][1]["path"], status.disks[1].path.0);
            assert_eq!(json["disks"][1]["format"], status.disks[1].format);
            // It starts, beside the old VM.
            let mut contents = taken.clone();
            let machine = Machine::start(&directory, &disks).await;
            for (disk, content) in disks.iter().zip(&mut contents) {
                for command in content.write(200).into_iter().chain(content.reads()) {
                    machine.io(&disk.name, &command).await;
                }
            }
            machine.quit().await;
            lab.world.check_guest().await;
            lab.world.check_artifacts(&snapshot, &taken);
        }
        // A full one doesn't mind what becomes of the snapshot.
        assert_eq!(lab.world.files().iter().filter(|file| file.contains("vmrestore-")).count(), 0);
        lab.world.quit().await;
        lab.world.check_images();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_says_what_would_be_done_and_does_nothing() {
    for_every(CASES.iter().copied(), |case| async move {
        let mut lab = Lab::of(case).await;
        lab.world.write().await;
        let (snapshot, _) = lab.snapshot(case.driver, 1).await;
        let before = lab.files();
        let new = lab.order_to_new(&snapshot, "copy", RestoreMode::Full);
        for order in [lab.order(&snapshot), new] {
            let order = RestoreOrder { step: RestoreStep::Plan, ..order };
            let status = lab.advance(&order).await;
            assert_eq!(status.phase, Some(RestoreContentPhase::Planned), "{:?}", status.conditions);
            assert!(status.disks.iter().all(|disk| disk.needed_bytes > 0 && disk.size_bytes == 8 << 20));
            assert!(lab.restores.journal.all().unwrap().is_empty());
        }
        assert_eq!(lab.files(), before);
    })
    .await;
}
