//! Which node is below which, on QEMU versions that do not say it with the node (before 10.1).
//!
//! `query-blockstats` nests every device's nodes: `parent` is where data comes from, `backing` the backing image, or once
//! more the child of a filter. Nodes that no device uses are not in it: for these there is the debugging command, and where
//! that is missing `query-nodes`, which knows no backing images.

use std::collections::{HashMap, HashSet};
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

impl Node {
    /// Records a child by the role that QEMU gives it, unless that place is taken.
    ///
    /// Some filters (`commit_top`, `mirror_top`) hang what they filter under `backing`: no image layer ends there.
    pub(super) fn link(&mut self, role: &str, child: String) {
        let place = match role {
            "backing" if !self.is_filter() => &mut self.backing,
            "file" | "backing" => &mut self.file_child,
            _ => return,
        };
        place.get_or_insert(child);
    }
}

/// Fills in `backing` and `file_child` where they are missing.
pub(super) async fn join(nodes: &mut HashMap<String, Node>, qmp: &Qmp, timeout: Duration) -> Result<()> {
    if nodes.values().any(|node| node.file_child.is_some()) {
        return Ok(());
    }
    let reached = match qmp.execute::<Vec<Stats>>("query-blockstats", (), timeout).await {
        Ok(devices) => join_nested(nodes, &devices),
        // A chain of more than a hundred layers is nested deeper than we read.
        Err(Error::Decode { .. }) => HashSet::new(),
        Err(error) => return Err(error),
    };
    if nodes.keys().all(|name| reached.contains(name)) {
        return Ok(());
    }
    match qmp.execute::<DebugGraph>("x-debug-query-block-graph", (), timeout).await {
        Ok(graph) => join_edges(nodes, &graph),
        Err(Error::Command { .. }) => {
            let others: Vec<Stats> = qmp.execute("query-blockstats", json!({ "query-nodes": true }), timeout).await?;
            join_nested(nodes, &others);
        }
        Err(error) => return Err(error),
    }
    Ok(())
}

/// Returns the names of the nodes that are told of.
fn join_nested(nodes: &mut HashMap<String, Node>, stats: &[Stats]) -> HashSet<String> {
    let mut reached = HashSet::new();
    let mut todo: Vec<&Stats> = stats.iter().collect();
    while let Some(stats) = todo.pop() {
        let below = [("file", stats.parent.as_deref()), ("backing", stats.backing.as_deref())];
        todo.extend(below.iter().filter_map(|(_, child)| *child));
        let Some(node) = stats.node_name.as_ref().and_then(|name| nodes.get_mut(name)) else { continue };
        reached.insert(node.name.clone());
        for (role, child) in below {
            if let Some(child) = child.and_then(|child| child.node_name.clone()) {
                node.link(role, child);
            }
        }
    }
    reached
}

fn join_edges(nodes: &mut HashMap<String, Node>, graph: &DebugGraph) {
    let names: HashMap<u64, &str> = graph.nodes.iter().map(|node| (node.id, node.name.as_str())).collect();
    for edge in &graph.edges {
        let (Some(parent), Some(child)) = (names.get(&edge.parent), names.get(&edge.child)) else { continue };
        if let Some(node) = nodes.get_mut(*parent) {
            node.link(&edge.name, (*child).to_owned());
        }
    }
}
