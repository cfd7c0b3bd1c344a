//! A snapshot's disks as a new VM's, while the old one runs.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use freezeframe_api::v1alpha1::{BootResult, RestoreContentPhase, RestoreMode, RestoreStep, RestoreVerify};
use freezeframe_node_agent::boot::{Accelerator, Boots};
use freezeframe_node_agent::hypervisor::{VmKey, target_file};
use freezeframe_node_agent::restore::order::RestoreOrder;

use crate::cases::for_every;
use crate::lab::{CASES, Lab};
use crate::loader;
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
            let key = VmKey { namespace: "shop".into(), name: name.into() };
            let (file, _) = target_file::read(&lab.world.sessions.vm_root, &key).unwrap().unwrap();
            let listed: Vec<_> = file.disks.iter().map(|disk| (&disk.path, &disk.format)).collect();
            assert_eq!(listed, disks.iter().map(|disk| (&disk.file, &disk.format)).collect::<Vec<_>>());
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

/// The VMs' root didn't outlive the node, and no VM of the namespace was started since.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_vm_is_made_where_its_namespace_has_no_directory() {
    let case = CASES[4];
    let mut lab = Lab::of(case).await;
    lab.world.write().await;
    let (snapshot, _) = lab.snapshot(case.driver, 1).await;
    lab.world.quit().await;
    let root = lab.world.sessions.vm_root.clone();
    std::fs::remove_dir_all(root.join("shop")).unwrap();
    let order = lab.order_to_new(&snapshot, "new", RestoreMode::Full);
    lab.restore(&order).await;
    assert!(root.join("shop/new").join(target_file::FILE).exists());
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

/// Two disks with a pattern in their first sector: a BIOS looks, and finds nothing to start. A boot loader that loads
/// more is told from that.
#[tokio::test(flavor = "multi_thread")]
async fn whether_the_restored_disks_boot_is_told_and_changes_nothing() {
    let mut lab = Lab::of(CASES[4]).await;
    for (number, loader, result) in
        [(1, None, BootResult::NothingBooted), (2, Some(&loader::sector()), BootResult::ReachedBootLoader)]
    {
        lab.world.write().await;
        if let Some(loader) = loader {
            lab.world.quit().await;
            let mut disk = std::fs::File::options().write(true).open(&lab.world.disks[0].file).unwrap();
            disk.write_all(loader).unwrap();
            lab.world.start().await;
            // As long as the BIOS needs: the loader ends the trial.
            lab.restores.boots = std::sync::Arc::new(Boots::new(64, Duration::from_secs(120), 1, Accelerator::Tcg));
        }
        let (snapshot, _) = lab.snapshot("reflink", number).await;
        let name = format!("new-{number}");
        let order =
            RestoreOrder { verify: RestoreVerify::Boot, ..lab.order_to_new(&snapshot, &name, RestoreMode::Linked) };
        let status = lab.advance(&order).await;
        assert_eq!(status.phase, Some(RestoreContentPhase::Succeeded), "{:?}", status.conditions);
        let boot = status.boot.unwrap();
        assert_eq!(boot.result, result);
        assert!(boot.seconds > 0);
        for (row, artifact) in status.disks.iter().zip(lab.world.artifacts(&snapshot)) {
            assert!(std::fs::read(&row.path.0).unwrap() == std::fs::read(&artifact.handle).unwrap(), "{}", row.path);
        }
    }
}
