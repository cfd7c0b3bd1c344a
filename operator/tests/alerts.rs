//! `docs/alerts.yaml` against the metrics that there are: a rule on one that isn't would never fire.
#![allow(clippy::unwrap_used, reason = "a test's helpers may stop it")]

use std::collections::BTreeSet;

use freezeframe_operator::caches::Caches;
use freezeframe_operator::clock::Clock;
use freezeframe_operator::error::ErrorKind;
use freezeframe_operator::metrics::{Metrics, PhaseGauge};
use freezeframe_operator::schedule::gauges::ScheduleGauges;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use serde_json::json;

const RULES: &str = include_str!("../../docs/alerts.yaml");
const OPERATIONS: &str = include_str!("../../docs/operations.md");

/// The metrics of an operator that has one schedule, at 11:30: the last good snapshot of `a` is of 10:00, `b` has none.
fn scraped() -> String {
    let (caches, mut sources) = Caches::new();
    let condition = json!({"type": "Ready", "status": "True", "reason": "Scheduled", "message": "",
        "lastTransitionTime": "2026-01-01T09:00:00Z"});
    let vms = json!([{"name": "a", "lastSuccessfulTime": "2026-01-01T10:00:00.000000Z"}, {"name": "b"},
        {"name": "gone", "deselected": true}]);
    let schedule = json!({
        "metadata": {"name": "s", "namespace": "shop", "creationTimestamp": "2026-01-01T09:00:00Z"},
        "spec": {"schedule": "0 */2 * * *", "jitter": "10m"}, "status": {"vms": vms, "conditions": [condition]},
    });
    sources.schedules.fill([serde_json::from_value(schedule).unwrap()]);
    let clock = Clock::new(|| "2026-01-01T11:30:00Z".parse().unwrap());
    let metrics = Metrics::default();
    metrics.count_error("schedule", ErrorKind::Refused);
    let snapshot = serde_json::from_value(json!({"metadata": {}, "spec": {"vmName": "a"}})).unwrap();
    let failed = serde_json::from_value(json!({"phase": "Failed"})).unwrap();
    metrics.count_outcome(&snapshot, &failed, clock.now());
    let mut registry = Registry::default();
    metrics.register(&mut registry);
    registry.register_collector(Box::new(PhaseGauge(caches.snapshots.clone())));
    registry.register_collector(Box::new(ScheduleGauges(caches.schedules.clone(), clock)));
    let mut text = String::new();
    encode(&mut text, &registry).unwrap();
    text
}

fn names(text: &str) -> BTreeSet<&str> {
    let words = text.split(|char: char| !(char.is_ascii_alphanumeric() || char == '_'));
    words.filter(|word| word.starts_with("freezeframe_")).collect()
}

#[test]
fn every_metric_in_a_rule_is_one_that_is_scraped_or_an_agents() {
    let scraped = scraped();
    let known = |name: &&str| {
        scraped.contains(&format!("# TYPE {} ", name.trim_end_matches("_total")))
            || name.starts_with("freezeframe_agent_")
    };
    let unknown: Vec<&str> = names(RULES).into_iter().filter(|name| !known(name)).collect();
    assert_eq!(unknown, [""; 0], "{scraped}");
    let undocumented: Vec<&str> = names(RULES).into_iter().filter(|name| !OPERATIONS.contains(name)).collect();
    assert_eq!(undocumented, [""; 0]);
}

#[test]
fn the_age_of_the_last_good_snapshot_is_told_of_each_vm_that_is_selected() {
    let scraped = scraped();
    let age =
        |vm| format!(r#"freezeframe_schedule_recovery_point_age_seconds{{namespace="shop",schedule="s",vm="{vm}"}}"#);
    assert!(scraped.contains(&format!("{} 5400\n", age("a"))), "{scraped}");
    assert!(scraped.contains(&format!("{} 9000\n", age("b"))), "since the schedule is there: {scraped}");
    assert!(!scraped.contains("gone"), "{scraped}");
    let interval = r#"freezeframe_schedule_interval_seconds{namespace="shop",schedule="s",stopped="false"} 7800"#;
    assert!(scraped.contains(interval), "{scraped}");
}
