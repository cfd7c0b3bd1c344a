//! New VMs' images in the directory that a class names, on another file system than the snapshot's.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;

use freezeframe_api::conditions::reasons;
use freezeframe_api::v1alpha1::{RestoreContentPhase, RestoreMode, RestoreStep};
use freezeframe_node_agent::hypervisor::image::ImageRoots;
use freezeframe_node_agent::restore::order::RestoreOrder;
use freezeframe_node_agent::session::order::Order;

use crate::cases::{Case, for_every};
#[cfg(feature = "crash-points")]
use crate::crashes::killed_at;
use crate::lab::{CASES, Lab, why};

/// The class's directory, which the agent may use, and a snapshot.
async fn lab_of(case: Case) -> (Lab, PathBuf, Order, Vec<crate::content::Content>) {
    let mut lab = Lab::with_copies_in_reach(case).await;
    let directory = lab.world.copies.path().join("restored");
    std::fs::create_dir(&directory).unwrap();
    std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o751)).unwrap();
    lab.world.write().await;
    let (snapshot, taken) = lab.snapshot(case.driver, 1).await;
    lab.world.write().await;
    (lab, directory, snapshot, taken)
}

#[tokio::test(flavor = "multi_thread")]
async fn images_in_the_classes_directory_have_the_snapshots_data_and_depend_on_it_where_that_is_kept() {
    for_every(CASES.iter().copied(), |case| async move {
        let (mut lab, directory, snapshot, taken) = lab_of(case).await;
        for (name, mode) in [("full", RestoreMode::Full), ("linked", RestoreMode::Linked)] {
            let order = RestoreOrder { directory: Some(directory.clone()), ..lab.order_to_new(&snapshot, name, mode) };
            let planned = lab.advance(&RestoreOrder { step: RestoreStep::Plan, ..order.clone() }).await;
            assert_eq!(planned.phase, Some(RestoreContentPhase::Planned), "{:?}", planned.conditions);
            let status = lab.advance(&order).await;
            assert_eq!(status.phase, Some(RestoreContentPhase::Succeeded), "{:?}", status.conditions);
            for ((row, content), disk) in status.disks.iter().zip(&taken).zip(&lab.world.disks) {
                let image = directory.join("shop").join(format!("{name}-{}.{}", disk.name, row.format));
                assert_eq!(PathBuf::from(&row.path.0), image);
                content.check(&image, &row.format).unwrap();
                // A snapshot that is merged away looks for what needs it beside it only.
                let linked = mode == RestoreMode::Linked && case.driver != "overlay";
                assert_eq!(row.linked, linked, "{row:?}");
                assert_eq!(row.message.is_some(), mode == RestoreMode::Linked, "{row:?}");
            }
            let (made, like) = (directory.join("shop").metadata().unwrap(), directory.metadata().unwrap());
            assert_eq!((made.uid(), made.mode()), (like.uid(), like.mode()));
        }
        let kept = lab.delete(&snapshot).await;
        assert_eq!(kept.is_some(), case.driver != "overlay", "{kept:?}");
        for image in std::fs::read_dir(directory.join("shop")).unwrap() {
            std::fs::remove_file(image.unwrap().path()).unwrap();
        }
        assert_eq!(lab.delete(&snapshot).await, None);
        lab.world.check_guest().await;
    })
    .await;
}

/// What stays of a mount point is an empty directory.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_kept_while_the_file_system_isnt_mounted_that_has_images_on_top_of_it() {
    let case = *CASES.iter().find(|case| case.driver == "reflink").unwrap();
    let (mut lab, directory, snapshot, _) = lab_of(case).await;
    let order = lab.order_to_new(&snapshot, "new", RestoreMode::Linked);
    let status = lab.advance(&RestoreOrder { directory: Some(directory.clone()), ..order }).await;
    assert_eq!(status.phase, Some(RestoreContentPhase::Succeeded), "{:?}", status.conditions);
    let elsewhere = directory.with_file_name("not-mounted");
    std::fs::rename(&directory, &elsewhere).unwrap();
    std::fs::create_dir(&directory).unwrap();
    let why = lab.delete(&snapshot).await.expect("it can't be told whether an image needs it");
    assert!(why.contains("mounted"), "{why}");
    std::fs::remove_dir(&directory).unwrap();
    std::fs::rename(&elsewhere, &directory).unwrap();
    assert!(lab.delete(&snapshot).await.is_some());
    std::fs::remove_dir_all(directory.join("shop")).unwrap();
    // Something else is on it: the file system is there, and the images are not.
    std::fs::write(directory.join("other"), "").unwrap();
    assert_eq!(lab.delete(&snapshot).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_the_agent_may_not_use_or_that_is_not_there_is_refused() {
    let (mut lab, directory, snapshot, _) = lab_of(CASES[0]).await;
    let refused = async |lab: &mut Lab, at: PathBuf, words: &str| {
        let order = lab.order_to_new(&snapshot, "new", RestoreMode::Full);
        let said = lab.refused(&RestoreOrder { directory: Some(at), ..order }, reasons::INVALID_PARAMETER).await;
        assert!(said.contains("restoreDirectory") && said.contains(words), "{said}");
    };
    refused(&mut lab, directory.join("gone"), "No such file").await;
    let roots = ImageRoots::new(vec![lab.world.storage.root(), lab.world.sessions.vm_root.clone()]);
    lab.world.sessions.roots = roots;
    lab.restores = Lab::restores(&lab.world);
    refused(&mut lab, directory.clone(), "root").await;
    assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 0);
}

#[cfg(feature = "crash-points")]
#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_ends_before_its_directory_is_made_can_be_taken_back() {
    let (mut lab, _, snapshot, _) = lab_of(CASES[0]).await;
    let directory = lab.world.storage.root().join("restored");
    std::fs::create_dir(&directory).unwrap();
    let order = lab.order_to_new(&snapshot, "new", RestoreMode::Full);
    let order = RestoreOrder { directory: Some(directory.clone()), ..order };
    killed_at(&lab, &order, "restore-planned");
    let deletion = lab.restores.delete(&order, None).await.unwrap();
    assert!(deletion.over, "{:?}", deletion.status.conditions);
    assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 0);
}

/// The namespace's own directory is nobody's way out of the class's.
#[tokio::test(flavor = "multi_thread")]
async fn a_link_in_the_classes_directory_is_not_followed() {
    let (mut lab, directory, snapshot, _) = lab_of(CASES[0]).await;
    let out = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(out.path(), directory.join("shop")).unwrap();
    let order = lab.order_to_new(&snapshot, "new", RestoreMode::Full);
    let status = lab.advance(&RestoreOrder { directory: Some(directory), ..order }).await;
    assert_eq!(status.phase, Some(RestoreContentPhase::Failed), "{:?}", why(&status));
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0);
}
