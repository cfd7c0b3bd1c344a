//! `crds/` against the types that it follows from.
#![allow(clippy::unwrap_used, reason = "a test's helpers may stop it")]

use std::collections::BTreeMap;
use std::path::Path;

use freezeframe_api::crds;
use serde_json::Value;

#[test]
fn crds_are_those_of_the_types() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crds");
    let committed: BTreeMap<String, Value> = directory
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read_to_string(entry.path()).unwrap()))
        .map(|(name, text)| (name, serde_yaml::from_str(&text).unwrap()))
        .collect();
    let of_types: BTreeMap<String, Value> = crds::all()
        .iter()
        .map(|crd| (format!("{}.yaml", crd.spec.names.plural), serde_json::to_value(crd).unwrap()))
        .collect();
    assert_eq!(committed.keys().collect::<Vec<_>>(), of_types.keys().collect::<Vec<_>>(), "run `cargo xtask codegen`");
    for (name, crd) in &of_types {
        assert_eq!(&committed[name], crd, "crds/{name} is stale: run `cargo xtask codegen`");
    }
}
