//! The fake monitor's block graph: disks with a chain of layers each, enough for a snapshot and its cleaning up.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::refusal;

/// A disk of a [`super::FakeQemu`]: a device with one qcow2 node over one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FakeDisk {
    /// The `-device` id.
    pub device: String,
    /// The node that is inserted.
    pub node: String,
    /// The image's path.
    pub file: String,
    /// What the guest sees, in bytes.
    pub virtual_size: u64,
    /// Whether QEMU has it open read-only.
    pub read_only: bool,
}

#[derive(Debug, Clone, Default)]
struct Layer {
    driver: String,
    file: String,
    file_child: Option<String>,
    backing: Option<String>,
    virtual_size: u64,
    read_only: bool,
}

#[derive(Debug, Default)]
pub(super) struct Blocks {
    /// Device id and inserted node, in order.
    devices: Vec<(String, String)>,
    layers: HashMap<String, Layer>,
}

impl Blocks {
    pub(super) fn add_disk(&mut self, disk: FakeDisk) {
        let FakeDisk { device, node, file, virtual_size, read_only } = disk;
        let protocol = format!("{node}-file");
        let below = Layer { driver: "file".into(), file: file.clone(), virtual_size, read_only, ..Layer::default() };
        let file_child = Some(protocol.clone());
        let layer = Layer { driver: "qcow2".into(), file, file_child, virtual_size, read_only, ..Layer::default() };
        self.layers.insert(protocol, below);
        self.layers.insert(node.clone(), layer);
        self.devices.push((device, node));
    }

    pub(super) fn inserted(&self, device: &str) -> Option<String> {
        self.devices.iter().find(|(name, _)| name == device).map(|(_, node)| node.clone())
    }

    /// The answer to a command of the block layer; none if it is another's.
    pub(super) fn run(&mut self, command: &str, arguments: &Value) -> Option<Value> {
        Some(match command {
            "query-block" => json!({ "return": self.devices.iter().map(|d| self.drive(d)).collect::<Vec<_>>() }),
            "query-named-block-nodes" => json!({ "return": self.layers.iter().map(described).collect::<Vec<_>>() }),
            "query-blockstats" => json!({ "return": self.stats(arguments["query-nodes"] == json!(true)) }),
            "blockdev-add" => self.open(arguments),
            "blockdev-del" => self.close(arguments["node-name"].as_str().unwrap_or_default()),
            "blockdev-reopen" => self.reopen(arguments["options"].as_array().map_or(&[], Vec::as_slice)),
            "transaction" => self.transaction(arguments["actions"].as_array().map_or(&[], Vec::as_slice)),
            _ => return None,
        })
    }

    fn drive(&self, (device, node): &(String, String)) -> Value {
        let layer = self.layers.get(node).cloned().unwrap_or_default();
        let inserted = json!({ "node-name": node, "ro": layer.read_only, "encrypted": false, "drv": layer.driver });
        let qdev = format!("/machine/peripheral/{device}/virtio-backend");
        json!({ "device": "", "qdev": qdev, "removable": false, "io-status": "ok", "inserted": inserted })
    }

    fn stats(&self, query_nodes: bool) -> Vec<Value> {
        let of = |name: &String| self.nested(name, self.layers.len());
        if query_nodes {
            self.layers.keys().map(of).collect()
        } else {
            self.devices.iter().map(|(_, node)| of(node)).collect()
        }
    }

    fn nested(&self, name: &str, depth: usize) -> Value {
        let mut stats = json!({ "node-name": name, "stats": {} });
        if let Some(layer) = self.layers.get(name).filter(|_| depth > 0) {
            for (key, child) in [("parent", &layer.file_child), ("backing", &layer.backing)] {
                if let Some(child) = child {
                    stats[key] = self.nested(child, depth - 1);
                }
            }
        }
        stats
    }

    fn open(&mut self, options: &Value) -> Value {
        let name = options["node-name"].as_str().unwrap_or_default().to_owned();
        if name.is_empty() || self.layers.contains_key(&name) {
            return refusal("GenericError", "Duplicate or missing node name");
        }
        let file_child = options["file"].as_str().map(str::to_owned);
        let below = file_child.as_ref().and_then(|child| self.layers.get(child)).cloned().unwrap_or_default();
        let layer = Layer {
            driver: options["driver"].as_str().unwrap_or_default().to_owned(),
            file: options["filename"].as_str().map_or(below.file, str::to_owned),
            file_child,
            backing: options["backing"].as_str().map(str::to_owned),
            virtual_size: self
                .devices
                .first()
                .and_then(|(_, node)| self.layers.get(node))
                .map_or(0, |l| l.virtual_size),
            read_only: options["read-only"] == json!(true),
        };
        self.layers.insert(name, layer);
        json!({ "return": {} })
    }

    fn close(&mut self, name: &str) -> Value {
        let used = self.layers.values().any(|l| [&l.file_child, &l.backing].into_iter().flatten().any(|c| c == name));
        if used || self.devices.iter().any(|(_, node)| node == name) {
            return refusal("GenericError", "Node is in use");
        }
        match self.layers.remove(name) {
            Some(_) => json!({ "return": {} }),
            None => refusal("GenericError", "Failed to find node"),
        }
    }

    fn reopen(&mut self, options: &[Value]) -> Value {
        for options in options {
            let Some(layer) = options["node-name"].as_str().and_then(|name| self.layers.get_mut(name)) else {
                return refusal("GenericError", "Failed to find node");
            };
            layer.file_child = options["file"].as_str().map(str::to_owned).or(layer.file_child.take());
            layer.read_only = options["read-only"] == json!(true);
        }
        json!({ "return": {} })
    }

    /// All actions or none, like QEMU's; it knows snapshots onto an open overlay.
    fn transaction(&mut self, actions: &[Value]) -> Value {
        let pair = |action: &Value| {
            let data = &action["data"];
            (action["type"] == "blockdev-snapshot").then_some(())?;
            let (node, overlay) = (data["node"].as_str()?, data["overlay"].as_str()?);
            let known = self.layers.contains_key(node) && self.layers.contains_key(overlay);
            known.then(|| (node.to_owned(), overlay.to_owned()))
        };
        let Some(pairs) = actions.iter().map(pair).collect::<Option<Vec<_>>>() else {
            return refusal("GenericError", "Cannot find a node or do an action");
        };
        for (node, overlay) in pairs {
            self.devices.iter_mut().filter(|(_, root)| *root == node).for_each(|(_, root)| root.clone_from(&overlay));
            if let Some(old) = self.layers.get_mut(&node) {
                old.read_only = true;
            }
            if let Some(new) = self.layers.get_mut(&overlay) {
                new.backing = Some(node);
            }
        }
        json!({ "return": {} })
    }
}

fn described((name, layer): (&String, &Layer)) -> Value {
    json!({
        "node-name": name, "drv": layer.driver, "file": layer.file, "ro": layer.read_only, "encrypted": false,
        "cache": { "writeback": true, "direct": false, "no-flush": false }, "detect_zeroes": "off",
        "backing_file_depth": u64::from(layer.backing.is_some()), "image": { "virtual-size": layer.virtual_size },
    })
}
