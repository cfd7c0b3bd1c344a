//! Which node is below which, on QEMU versions that do not say it with the node (before 10.1).
//!
//! `query-blockstats` nests every device's nodes: `parent` is where data comes from, `backing` the backing image, or once
//! more the child of a filter. Nodes that no device uses are told by `query-nodes`, without their backing image; for that
//! only the debugging command is left, which is asked last and may be missing.

use std::collections::HashMap;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;

use super::Node;
use crate::error::{Error, Result};
use crate::qmp::Qmp;

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Stats {
    #[serde(default)]
    node_name: Option<String>,
    #[serde(default)]
    parent: Option<Box<Stats>>,
    #[serde(default)]
    backing: Option<Box<Stats>>,
}

#[derive(Deserialize)]
struct DebugGraph {
    nodes: Vec<DebugNode>,
    edges: Vec<DebugEdge>,
}

#[derive(Deserialize)]
struct DebugNode {
    id: u64,
    name: String,
}

#[derive(Deserialize)]
struct DebugEdge {
    parent: u64,
    child: u64,
    name: String,
}

/// Fills in `backing` and `file_child` where they are missing.
pub(super) async fn join(nodes: &mut HashMap<String, Node>, qmp: &Qmp, timeout: Duration) -> Result<()> {
    if nodes.values().any(|node| node.file_child.is_some()) {
        return Ok(());
    }
    let devices: Vec<Stats> = qmp.execute("query-blockstats", (), timeout).await?;
    join_nested(nodes, &devices);
    if nodes.values().all(|node| node.file_child.is_some() || !holds_layers(node)) {
        return Ok(());
    }
    let others: Vec<Stats> = qmp.execute("query-blockstats", json!({ "query-nodes": true }), timeout).await?;
    join_nested(nodes, &others);
    if nodes.values().all(|node| node.backing.is_some() || node.is_filter() || node.backing_depth == 0) {
        return Ok(());
    }
    match qmp.execute::<DebugGraph>("x-debug-query-block-graph", (), timeout).await {
        Ok(graph) => join_edges(nodes, &graph),
        Err(Error::Command { .. }) => tracing::debug!("QEMU does not tell the backing nodes of unused nodes"),
        Err(error) => return Err(error),
    }
    Ok(())
}

/// Whether it is no protocol node: those have nothing below them.
fn holds_layers(node: &Node) -> bool {
    node.is_filter()
        || node.backing_depth > 0
        || !matches!(node.driver.as_str(), "file" | "host_device" | "nbd" | "rbd")
}

fn join_nested(nodes: &mut HashMap<String, Node>, stats: &[Stats]) {
    let mut todo: Vec<&Stats> = stats.iter().collect();
    while let Some(stats) = todo.pop() {
        let below = [stats.parent.as_deref(), stats.backing.as_deref()];
        todo.extend(below.into_iter().flatten());
        let [data, backing] = below.map(|child| child.and_then(|child| child.node_name.clone()));
        let Some(node) = stats.node_name.as_ref().and_then(|name| nodes.get_mut(name)) else { continue };
        if node.is_filter() {
            node.file_child = node.file_child.take().or(data).or(backing);
        } else {
            node.file_child = node.file_child.take().or(data);
            node.backing = node.backing.take().or(backing);
        }
    }
}

fn join_edges(nodes: &mut HashMap<String, Node>, graph: &DebugGraph) {
    let names: HashMap<u64, &str> = graph.nodes.iter().map(|node| (node.id, node.name.as_str())).collect();
    for edge in graph.edges.iter().filter(|edge| edge.name == "backing") {
        let (Some(parent), Some(child)) = (names.get(&edge.parent), names.get(&edge.child)) else { continue };
        if let Some(node) = nodes.get_mut(*parent) {
            node.backing.get_or_insert_with(|| (*child).to_owned());
        }
    }
}
