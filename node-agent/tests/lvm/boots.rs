//! Whether a snapshot's volumes, and those that are made of them, start a machine; and that the trial changes nothing.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use freezeframe_api::v1alpha1::{BootCheck, BootResult, RestoreContentPhase, RestoreMode, RestoreVerify, Verify};
use freezeframe_node_agent::boot::{Accelerator, Boots};
use freezeframe_node_agent::restore::order::RestoreOrder;

use crate::loader;
use crate::nested::remove_volumes;
use crate::node::{names, run, thick, thin};
use crate::restores::{Taken, advance, delete, restores, to_new};
use crate::world::World;

/// As long as the BIOS needs: the loader ends the trial.
const TRIAL: Duration = Duration::from_secs(120);

fn reached_the_loader(boot: Option<&BootCheck>) {
    let boot = boot.expect("no trial is told");
    assert_eq!((boot.result, boot.message.as_deref()), (BootResult::ReachedBootLoader, None));
    println!("measured: a boot loader on volumes after {} s", boot.seconds);
}

fn sum(path: &Path) -> String {
    let said = run("sha256sum", &[path.to_str().unwrap().to_owned()]);
    said.split(' ').next().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshots_volumes_and_new_ones_of_it_are_tried_and_stay_as_they_were() {
    let mut world = World::new(&[thin("boot-a"), thick("boot-b")]).await;
    let before = names();
    world.quit();
    std::fs::write(world.directory().join("sector"), loader::sector()).unwrap();
    let from = format!("if={}", world.directory().join("sector").display());
    run("dd", &[from, "of=/dev/ff-vg/boot-a".into(), "conv=notrunc,fsync".into()]);
    let boots = Arc::new(Boots::new(64, TRIAL, 1, Accelerator::Tcg));
    world.sessions.boots = boots.clone();
    let mut order = World::order(1);
    order.verify = Verify::Boot;
    let status = world.advance(&order).await;
    let taken = Taken::new(&world, order, &status);
    reached_the_loader(status.boot.as_ref());
    let origins = ["boot-a", "boot-b"].map(|name| sum(Path::new(&format!("/dev/ff-vg/{name}"))));
    let sums = |paths: &[PathBuf]| paths.iter().map(|path| sum(path)).collect::<Vec<_>>();
    assert_eq!(sums(&taken.handles), origins);

    let mut restores = restores(world.directory());
    restores.boots = boots;
    let order = RestoreOrder { verify: RestoreVerify::Boot, ..to_new(1, &taken, "tried", RestoreMode::Linked) };
    let status = advance(&restores, &order).await;
    assert_eq!(status.phase, Some(RestoreContentPhase::Succeeded), "{:?}", status.conditions);
    reached_the_loader(status.boot.as_ref());
    let made: Vec<_> = status.disks.iter().map(|disk| PathBuf::from(&disk.path.0)).collect();
    assert_eq!((sums(&made), sums(&taken.handles)), (origins.to_vec(), origins.to_vec()));
    delete(&world, &taken).await;
    remove_volumes(&["tried-vd0", "tried-vd1"]);
    assert_eq!(names(), before);
}
