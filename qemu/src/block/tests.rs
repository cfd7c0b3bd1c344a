use std::time::Duration;

use serde_json::{Value, json};

use super::{BlockGraph, Disk};
use crate::error::Error;
use crate::fake::{FakeDisk, FakeQemu, Reaction};
use crate::qmp::Qmp;

const SOON: Duration = Duration::from_secs(20);

#[test]
fn a_disk_is_called_what_its_user_calls_it() {
    for (qdev, device, root, name) in [
        ("/machine/peripheral/vd0/virtio-backend", "", "n", "vd0"),
        ("/machine/peripheral/vd0", "leg", "n", "vd0"),
        ("sd0", "leg", "n", "sd0"),
        ("/machine/peripheral-anon/device[0]/virtio-backend", "leg1", "#block1", "leg1"),
        ("/machine/peripheral-anon/device[0]/virtio-backend", "", "n", "device[0]"),
        ("/machine/unattached/device[23]", "ide1-cd0", "", "ide1-cd0"),
        ("", "pflash0", "n", "pflash0"),
        ("", "", "n", "n"),
        ("/", "", "n", "n"),
        ("/machine/peripheral/", "", "n", "peripheral"),
        ("", "", "", ""),
    ] {
        let disk = Disk {
            qdev: qdev.into(),
            device: device.into(),
            root: Some(root).filter(|root| !root.is_empty()).map(Into::into),
            ..Disk::default()
        };
        assert_eq!(disk.name(), name, "{qdev} {device}");
    }
}

async fn read(drives: Value, nodes: Value, stats: Value, graph: Reaction) -> Result<BlockGraph, Error> {
    let fake = FakeQemu::new();
    fake.react("query-block", Reaction::Return(drives));
    fake.react("query-named-block-nodes", Reaction::Return(nodes));
    fake.react("query-blockstats", Reaction::Return(stats));
    fake.react("x-debug-query-block-graph", graph);
    let qmp = Qmp::connect(fake.connect().unwrap(), SOON).await.unwrap();
    BlockGraph::read(&qmp, SOON).await
}

fn names(graph: &BlockGraph, node: &str) -> Vec<String> {
    graph.chain(node).iter().map(|node| node.name.clone()).collect()
}

#[tokio::test]
async fn children_told_with_the_nodes_are_believed_and_filters_skipped() {
    let drives = json!([{ "device": "", "qdev": "vd0", "inserted": { "node-name": "t", "ro": false } }]);
    let nodes = json!([
        { "node-name": "t", "drv": "throttle", "children": [{ "child": "file", "node-name": "top" }] },
        { "node-name": "top", "drv": "qcow2", "cache": { "writeback": true, "from-the-future": 1 },
          "children": [{ "child": "backing", "node-name": "ct" }, { "child": "file", "node-name": "f" }] },
        { "node-name": "ct", "drv": "commit_top", "children": [{ "child": "backing", "node-name": "#block1" }] },
        { "node-name": "#block1", "drv": "qcow2", "image": { "virtual-size": 9_000_000_000_u64 } },
        { "node-name": "f", "drv": "file", "file": "/x" },
        { "drv": "qcow2" },
    ]);
    let graph = read(drives, nodes, json!("unused"), Reaction::refuse("unused")).await.unwrap();
    assert_eq!(graph.disks()[0].top.as_deref(), Some("top"));
    assert_eq!(names(&graph, "t"), ["top", "#block1"]);
    let top = graph.node("top").unwrap();
    assert_eq!((top.file_child.as_deref(), top.backing.as_deref(), top.backing_depth), (Some("f"), Some("ct"), 1));
    let base = graph.node("#block1").unwrap();
    assert!(base.auto_named && base.virtual_size == 9_000_000_000);
}

#[tokio::test]
async fn a_graph_with_cycles_and_dangling_names_ends() {
    let drives = json!([
        { "device": "a", "inserted": { "node-name": "t1" } },
        { "device": "b", "inserted": { "node-name": "nowhere" } },
        { "device": "c", "inserted": {} },
        { "device": "d" },
        {},
    ]);
    let nodes = json!([
        { "node-name": "t1", "drv": "throttle", "children": [{ "child": "file", "node-name": "t2" }] },
        { "node-name": "t2", "drv": "throttle", "children": [{ "child": "file", "node-name": "t1" }] },
        { "node-name": "q1", "drv": "qcow2", "children": [{ "child": "backing", "node-name": "q1" }] },
    ]);
    let graph = read(drives, nodes, json!([]), Reaction::refuse("no")).await.unwrap();
    assert!(graph.disks().iter().all(|disk| disk.top.is_none()));
    assert_eq!(graph.chain("t1").len(), 0);
    assert_eq!(graph.chain("q1").len(), super::MAX_LAYERS);
    assert_eq!(graph.chain("nowhere").len(), 0);
}

#[tokio::test]
async fn a_graph_larger_than_any_honest_one_is_refused() {
    let nodes: Vec<Value> = (0..9000).map(|n| json!({ "node-name": format!("n{n}"), "drv": "qcow2" })).collect();
    let refused = read(json!([]), json!(nodes), json!([]), Reaction::refuse("no")).await;
    assert!(matches!(refused, Err(Error::Protocol { .. })));
}

#[tokio::test]
async fn a_chain_nested_deeper_than_we_read_comes_from_the_debugging_command() {
    let layers = 200;
    let nodes: Vec<Value> = (0..layers).map(|n| json!({ "node-name": format!("n{n}"), "drv": "qcow2" })).collect();
    let stats = (0..layers).rev().fold(json!({}), |below, n| json!({ "node-name": format!("n{n}"), "backing": below }));
    let named = (0..layers).map(|n| json!({ "id": n, "name": format!("n{n}"), "type": "block-driver" }));
    let edges = (1..layers).map(|n| json!({ "parent": n - 1, "child": n, "name": "backing", "perm": [] }));
    let graph = json!({ "nodes": named.collect::<Vec<_>>(), "edges": edges.collect::<Vec<_>>() });
    let graph = read(json!([]), json!(nodes), json!([stats]), Reaction::Return(graph)).await.unwrap();
    assert_eq!(graph.chain("n0").len(), layers);
    assert_eq!(graph.node("n0").unwrap().backing_depth, 199);
}

#[tokio::test]
async fn the_fakes_snapshot_changes_its_graph_as_qemus_does() {
    let disk = |n: u64| FakeDisk {
        device: format!("vd{n}"),
        node: format!("d{n}"),
        file: format!("/images/{n}.qcow2"),
        virtual_size: n << 20,
        read_only: false,
    };
    let fake = FakeQemu::new().with_disk(disk(1)).with_disk(disk(2));
    let qmp = Qmp::connect(fake.connect().unwrap(), SOON).await.unwrap();
    qmp.blockdev_add(&json!({ "driver": "file", "node-name": "of", "filename": "/dev/fdset/1" }), SOON).await.unwrap();
    let overlay = json!({ "driver": "qcow2", "node-name": "o", "file": "of", "backing": null });
    qmp.blockdev_add(&overlay, SOON).await.unwrap();
    let snapshot = json!({ "type": "blockdev-snapshot", "data": { "node": "d2", "overlay": "o" } });
    let missing = json!({ "type": "blockdev-snapshot", "data": { "node": "d1", "overlay": "missing" } });
    qmp.transaction(&[snapshot.clone(), missing], SOON).await.unwrap_err();
    assert_eq!(fake.inserted("vd2").as_deref(), Some("d2"));
    qmp.transaction(&[snapshot], SOON).await.unwrap();
    let graph = BlockGraph::read(&qmp, SOON).await.unwrap();
    assert_eq!(graph.disks()[1].top.as_deref(), Some("o"));
    assert_eq!(names(&graph, "o"), ["o", "d2"]);
    assert!(graph.node("d2").unwrap().read_only);
    assert_eq!(graph.node("o").unwrap().file, "/dev/fdset/1");
    qmp.blockdev_del("d2", SOON).await.unwrap_err();
}
