//! A volume as the layer that a VM's owner follows to, and what becomes of it.

use std::path::Path;

use freezeframe_api::names::DriverName;
use freezeframe_api::v1alpha1::{ClassDriver, ContentPhase};
use freezeframe_node_agent::session::order::Order;

use crate::content::SIZE;
use crate::node::{GROUP, lvm, run, thick};
use crate::targets::{allow, path, refuses, volume};
use crate::world::World;

const LAYER: &str = "layer";

fn order(number: u32) -> Order {
    let parameters = [("follow", "true"), ("targetGroups", GROUP)];
    let parameters = parameters.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    let mut order = World::order(number);
    order.drivers = vec![ClassDriver { name: DriverName("overlay".into()), parameters }];
    order.targets = [("vd0".to_owned(), format!("{GROUP}/{LAYER}"))].into();
    order
}

fn format() {
    let arguments = ["create", "-q", "-f", "qcow2", &path(LAYER), &SIZE.to_string()];
    run("qemu-img", &arguments.map(str::to_owned));
}

fn tags() -> String {
    lvm(&format!("lvs --noheadings -o lv_tags {GROUP}/{LAYER}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_goes_on_in_a_layer_on_a_volume_and_is_there_alone_once_its_snapshot_is_deleted() {
    let mut world = World::new(&[thick("followed-a")]).await;
    world.write().await;
    volume("thin", SIZE, LAYER);
    refuses(&world, &order(1), "tag `freezeframe-target-shop`").await;
    allow(LAYER);
    refuses(&world, &order(2), "is thin").await;
    lvm(&format!("lvremove -qq -f {GROUP}/{LAYER}"));
    volume("thick", SIZE, LAYER);
    allow(LAYER);
    refuses(&world, &order(3), "not a qcow2 image").await;
    format();
    refuses(&world, &order(4), "are needed for a layer that is fully written").await;
    lvm(&format!("lvextend -qq -L +4m {GROUP}/{LAYER}"));
    let order = order(5);
    let status = world.advance(&order).await;
    assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
    assert_eq!(status.disks[0].start_with.as_ref().unwrap().path, path(LAYER));
    assert!(tags().contains(&format!("freezeframe-{}", order.id())), "{}", tags());
    let former = world.contents[0].clone();
    world.write().await;
    world.check_guest().await;
    former.check(Path::new(&path("followed-a")), "raw").unwrap();

    world.start_on(&[(path(LAYER), "qcow2")]).await;
    world.check_guest().await;
    world.write().await;
    let deletion = world.sessions.delete(&order).await.unwrap();
    assert!(deletion.over, "{:?}", deletion.status.conditions);
    world.check_guest().await;
    world.write().await;
    former.check(Path::new(&path("followed-a")), "raw").unwrap();
    assert!(!tags().contains(&order.id()), "{}", tags());
    let info = run("qemu-img", &["info", "-U", "-f", "qcow2", &path(LAYER)].map(str::to_owned));
    assert!(!info.contains("backing file"), "{info}");
    world.start_on(&[(path(LAYER), "qcow2")]).await;
    world.check_guest().await;
    world.contents[0].check(Path::new(&path(LAYER)), "qcow2").unwrap();
    world.quit();
    lvm(&format!("lvremove -qq -f {GROUP}/{LAYER}"));
}
