//! The corpus of `tests/validation/` without a server: CEL rules, defaults, and what the types refuse.
//!
//! Patterns, lengths, required and unknown fields are left to the API server, against which `e2e/tests/api.rs` runs the
//! same corpus.
#![allow(clippy::unwrap_used, reason = "a test's helpers may stop it")]

#[path = "validation/corpus.rs"]
mod corpus;
mod kinds;

use std::collections::BTreeSet;

use corpus::{Case, cases};
use freezeframe_api::crds;
use kube::core::cel::{Validator, apply_defaults};
use serde_json::Value;

fn schema_of(object: &Value) -> Value {
    let crd = crds::all().into_iter().find(|crd| object["kind"] == crd.spec.names.kind.as_str()).unwrap();
    serde_json::to_value(&crd.spec.versions[0].schema).unwrap()["openAPIV3Schema"].take()
}

/// The messages of the rules that refuse it.
fn broken_rules(case: &Case) -> Vec<String> {
    let verdict = Validator::new().validate(&schema_of(&case.object), &case.object, case.before.as_ref());
    verdict.err().into_iter().flat_map(kube::core::cel::ValidationErrors::into_vec).map(|error| error.message).collect()
}

fn collect_messages(schema: &Value, messages: &mut BTreeSet<String>) {
    let rules = schema["x-kubernetes-validations"].as_array().into_iter().flatten();
    messages.extend(rules.map(|rule| rule["message"].as_str().unwrap().to_owned()));
    let children = schema["properties"].as_object().into_iter().flat_map(|properties| properties.values());
    children.chain(schema.get("items")).for_each(|child| collect_messages(child, messages));
}

fn rule_messages() -> BTreeSet<String> {
    let mut messages = BTreeSet::new();
    for crd in crds::all() {
        let schema = serde_json::to_value(&crd.spec.versions[0].schema).unwrap();
        collect_messages(&schema["openAPIV3Schema"], &mut messages);
    }
    messages
}

#[test]
fn what_is_accepted_breaks_no_rule_and_has_a_type() {
    for case in cases().iter().filter(|case| case.refusal.is_none()) {
        assert_eq!(broken_rules(case), [""; 0], "{}", case.name);
        kinds::round_trip(&case.object).unwrap_or_else(|error| panic!("{}: {error}", case.name));
    }
}

#[test]
fn what_a_rule_refuses_breaks_this_rule_alone() {
    let messages = rule_messages();
    for case in cases() {
        if let Some(refusal) = case.refusal.as_ref().filter(|refusal| messages.contains(*refusal)) {
            let broken: BTreeSet<String> = broken_rules(&case).into_iter().collect();
            assert_eq!(broken, [refusal.clone()].into(), "{}", case.name);
        }
    }
}

#[test]
fn every_rule_refuses_some_case() {
    let refusals: BTreeSet<String> = cases().into_iter().filter_map(|case| case.refusal).collect();
    let untested: Vec<String> = rule_messages().difference(&refusals).cloned().collect();
    assert_eq!(untested, [""; 0]);
}

#[test]
fn a_value_that_the_schema_does_not_list_has_no_type() {
    let is_unlisted = |case: &Case| case.refusal.as_ref().is_some_and(|refusal| refusal.contains("Unsupported value"));
    for case in cases().iter().filter(|case| is_unlisted(case)) {
        assert!(kinds::round_trip(&case.object).is_err(), "{}", case.name);
    }
}

#[test]
fn the_schema_and_the_types_give_the_same_defaults() {
    for case in cases().iter().filter(|case| case.refusal.is_none()) {
        let defaulted = apply_defaults(&schema_of(&case.object), &case.object);
        let of_types = kinds::round_trip(&case.object).unwrap();
        assert_eq!(of_types, kinds::round_trip(&defaulted).unwrap(), "{}", case.name);
        if let Some(stored) = &case.stored {
            assert_eq!(&defaulted["spec"], stored, "{}", case.name);
        }
    }
}
