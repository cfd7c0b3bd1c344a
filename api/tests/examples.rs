//! Every manifest of `examples/` against its type: nothing in it is unknown, nothing is missing.
#![allow(clippy::unwrap_used, reason = "a test's helpers may stop it")]

mod kinds;

use std::path::Path;

use k8s_openapi::api::admissionregistration::v1::{ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding};
use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use kinds::{round_trip, through};
use serde::Deserialize;
use serde_json::{Error, Value};

/// Each file's name, its text and its documents.
fn examples() -> Vec<(String, String, Vec<Value>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let paths = ["", "gitops"].map(|below| directory.join(below).read_dir().unwrap());
    let files = paths.into_iter().flatten().map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
    files
        .map(|path| {
            let text = std::fs::read_to_string(&path).unwrap();
            let documents = serde_yaml::Deserializer::from_str(&text);
            let documents = documents.map(|document| Value::deserialize(document).unwrap()).collect();
            (path.file_name().unwrap().to_string_lossy().into_owned(), text, documents)
        })
        .collect()
}

fn typed(object: &Value) -> Result<Value, Error> {
    match object["kind"].as_str() {
        // It is kubectl's, which reads it in `e2e/tests/gitops.rs`.
        Some("Kustomization") => Ok(object.clone()),
        Some("Namespace") => through::<Namespace>(object),
        Some("ServiceAccount") => through::<ServiceAccount>(object),
        Some("ClusterRole") => through::<ClusterRole>(object),
        Some("ClusterRoleBinding") => through::<ClusterRoleBinding>(object),
        Some("Role") => through::<Role>(object),
        Some("RoleBinding") => through::<RoleBinding>(object),
        Some("ValidatingAdmissionPolicy") => through::<ValidatingAdmissionPolicy>(object),
        Some("ValidatingAdmissionPolicyBinding") => through::<ValidatingAdmissionPolicyBinding>(object),
        _ => round_trip(object),
    }
}

/// The paths of `given` that are not in `read`: what the type doesn't know.
fn lost(given: &Value, read: &Value, path: &str) -> Vec<String> {
    match (given, read) {
        (Value::Object(fields), Value::Object(_)) => {
            fields.iter().flat_map(|(name, value)| lost(value, &read[name], &format!("{path}.{name}"))).collect()
        }
        (Value::Array(items), Value::Array(_)) => {
            items.iter().enumerate().flat_map(|(i, item)| lost(item, &read[i], &format!("{path}[{i}]"))).collect()
        }
        (_, Value::Null) => vec![path.to_owned()],
        _ => vec![],
    }
}

#[test]
fn every_example_is_read_whole_by_its_type() {
    let examples = examples();
    assert!(!examples.is_empty());
    for (file, _, documents) in examples {
        for object in documents {
            let read = typed(&object).unwrap_or_else(|error| panic!("{file}: {error}"));
            assert_eq!(lost(&object, &read, ""), [""; 0], "{file}: unknown to {}", object["kind"]);
        }
    }
}

#[test]
fn every_example_begins_with_what_it_is_for() {
    for (file, text, _) in examples() {
        assert!(text.starts_with("# "), "{file}");
    }
}
