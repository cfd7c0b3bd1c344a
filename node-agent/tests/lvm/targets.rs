//! Volumes that their user made for copies: what may be one, and that it holds the copy and stays its user's.

use std::path::Path;

use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::names::DriverName;
use freezeframe_api::v1alpha1::{ClassDriver, ContentPhase};
use freezeframe_node_agent::session::order::Order;

use crate::content::SIZE;
use crate::node::{GROUP, lvm, names, run, thick, thin};
use crate::world::World;

/// An order of copies to volumes, named in the disks' order.
fn order(world: &World, number: u32, volumes: &[&str]) -> Order {
    let directory = world.directory().join("copies");
    std::fs::create_dir_all(&directory).unwrap();
    let parameters = [
        ("directory".to_owned(), directory.to_str().unwrap().to_owned()),
        ("targetGroups".to_owned(), format!("other,{GROUP}")),
    ];
    let mut order = World::order(number);
    order.drivers = vec![ClassDriver { name: DriverName("copy".into()), parameters: parameters.into() }];
    order.targets = (0..).zip(volumes).map(|(at, volume)| (format!("vd{at}"), (*volume).to_owned())).collect();
    order
}

pub fn path(name: &str) -> String {
    format!("/dev/{GROUP}/{name}")
}

fn dd(from: &str, volume: &str, mib: u32, at: u32) {
    let numbers = [format!("count={mib}"), format!("seek={at}")];
    let fixed = [format!("if={from}"), format!("of={}", path(volume)), "bs=1M".into(), "oflag=direct".into()];
    run("dd", &[fixed.as_slice(), &numbers].concat());
}

/// A volume of a size in bytes that reads as zeros where that is looked at, and not elsewhere.
pub fn volume(kind: &str, size: u64, name: &str) {
    let place =
        if kind == "thin" { format!("-V {size}b --thinpool {GROUP}/pool") } else { format!("-L {size}b {GROUP}") };
    lvm(&format!("lvcreate -qq -y -Wy {place} -n {name}"));
    dd("/dev/urandom", name, u32::try_from(size >> 20).unwrap() - 1, 1);
    dd("/dev/zero", name, 1, 0);
}

pub fn allow(name: &str) {
    lvm(&format!("lvchange -qq --addtag freezeframe-target-shop {GROUP}/{name}"));
}

pub async fn refuses(world: &World, order: &Order, words: &str) {
    let status = world.advance(order).await;
    let ready = find(&status.conditions, types::READY).unwrap();
    assert_eq!(
        (status.phase, ready.reason.as_str()),
        (Some(ContentPhase::Failed), reasons::INVALID_TARGET),
        "{}",
        ready.message
    );
    println!("refused: {}", ready.message);
    assert!(ready.message.contains(words), "{}", ready.message);
    assert!(world.sessions.delete(order).await.unwrap().over);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_goes_to_a_volume_that_its_user_made_for_it_and_leaves_it_there() {
    let mut world = World::new(&[thin("copied-a"), thick("copied-b")]).await;
    world.write().await;
    for (kind, name) in [("thin", "to-a"), ("thick", "to-b")] {
        volume(kind, SIZE, name);
        allow(name);
    }
    let before = names();
    let targets = [format!("{GROUP}/to-a"), format!("{GROUP}/to-b")];
    let targets = targets.each_ref().map(String::as_str);
    let first = order(&world, 1, &targets);
    let status = world.advance(&first).await;
    assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
    let contents = world.contents.clone();
    world.write().await;
    world.check_guest().await;
    for ((disk, content), name) in status.disks.iter().zip(&contents).zip(["to-a", "to-b"]) {
        assert_eq!((&disk.handle.as_ref().unwrap().0, disk.format.as_deref()), (&path(name), Some("raw")));
        content.check(Path::new(&path(name)), "raw").unwrap();
    }
    refuses(&world, &order(&world, 2, &targets), "another snapshot").await;
    let deletion = world.sessions.delete(&first).await.unwrap();
    assert!(deletion.over, "{:?}", deletion.status.conditions);
    assert_eq!(names(), before, "they are their user's");
    contents[1].check(Path::new(&path("to-b")), "raw").unwrap();
    refuses(&world, &order(&world, 3, &targets), "not empty").await;
    for name in ["to-a", "to-b"] {
        dd("/dev/zero", name, 1, 0);
    }
    assert_eq!(world.advance(&order(&world, 4, &targets)).await.phase, Some(ContentPhase::Ready));
    assert!(world.sessions.delete(&order(&world, 4, &targets)).await.unwrap().over);
    for target in targets {
        lvm(&format!("lvremove -qq -f {target}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_may_be_something_else_is_no_target() {
    let world = World::new(&[thin("kept-a")]).await;
    let target = |name: &str| format!("{GROUP}/{name}");
    let refuse = async |number, name: &str, words| refuses(&world, &order(&world, number, &[name]), words).await;
    refuse(1, "secret/to-a", "targetGroups").await;
    refuse(2, &target("missing"), "isn't there").await;
    refuse(3, &target("pool"), "a pool").await;
    refuse(4, &target("kept-a"), "tag `freezeframe-target-shop`").await;
    allow("kept-a");
    // The VM's own disk: QEMU has it open.
    refuse(5, &target("kept-a"), "is in use").await;
    volume("thick", SIZE + (4 << 20), "large");
    allow("large");
    refuse(6, &target("large"), "bytes, and disk vd0").await;
    lvm(&format!("lvcreate -qq -y -s -L 4m -n large-old {GROUP}/large"));
    refuse(7, &target("large"), "origin").await;
    refuse(8, &target("large-old"), "snapshot").await;
    lvm(&format!("lvremove -qq -f {GROUP}/large"));
}
