//! What a snapshot costs the cluster and the node.

use anyhow::{Context, Result};
use freezeframe_api::v1alpha1::VMSnapshotContent;
use freezeframe_e2e::{ControlPlane, Programs};
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use serde_json::Value;

const WRITES: [&str; 4] = ["create", "update", "patch", "delete"];

/// Writes to a snapshot and its content so far, by the API server's audit log, without the user's.
pub async fn writes(plane: &ControlPlane, snapshot: &str, contents: &Api<VMSnapshotContent>) -> Result<usize> {
    let all = contents.list(&ListParams::default()).await?;
    let of_it = |content: &&VMSnapshotContent| content.spec.vm_snapshot_ref.name == snapshot;
    let content = all.items.iter().find(of_it).map(ResourceExt::name_any).context("the snapshot has no content")?;
    let log = std::fs::read_to_string(plane.directory().join("audit.log")).context("reading the audit log")?;
    let entries = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(entries.filter(|entry| is_write_to(entry, [snapshot, &content])).count())
}

fn is_write_to(entry: &Value, names: [&str; 2]) -> bool {
    let text = |pointer: &str| entry.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    text("/stage") == "ResponseComplete"
        && WRITES.contains(&text("/verb"))
        && names.contains(&text("/objectRef/name"))
        && text("/objectRef/apiGroup") == freezeframe_api::GROUP
        // The user's own.
        && (text("/verb"), text("/objectRef/resource")) != ("create", "vmsnapshots")
}

/// Resident memory of each program, in MiB.
pub fn resident(programs: &Programs) -> Result<Vec<(&'static str, f64)>> {
    let programs = [("operator", &programs.operator), ("agent", &programs.agent), ("guard", &programs.guard)];
    programs.into_iter().map(|(name, program)| Ok((name, resident_mib(program.pid())?))).collect()
}

fn resident_mib(pid: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib / 1024.0)
}
