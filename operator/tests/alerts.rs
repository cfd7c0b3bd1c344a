//! `docs/alerts.yaml` against the metrics that there are: a rule on one that isn't would never fire.
#![allow(clippy::unwrap_used, reason = "a test's helpers may stop it")]

use std::collections::{BTreeMap, BTreeSet};

use freezeframe_operator::caches::Caches;
use freezeframe_operator::clock::Clock;
use freezeframe_operator::error::ErrorKind;
use freezeframe_operator::metrics::{Metrics, PhaseGauge};
use freezeframe_operator::schedule::gauges::ScheduleGauges;
use k8s_openapi::jiff::Timestamp;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use promql_parser::parser::Expr;
use promql_parser::util::{ExprVisitor, walk_expr};
use serde::Deserialize;
use serde_json::{Value, json};

const RULES: &str = include_str!("../../docs/alerts.yaml");
const AGENT: &str = include_str!("../../node-agent/src/metrics.rs");
const OPERATIONS: &str = include_str!("../../docs/operations.md");

/// The metrics of an operator that has one schedule, at 11:30: the last good snapshot of `a` is of 10:00, `b` has none, and
/// `c` has none and is of 11:00.
fn scraped() -> String {
    scraped_at("2026-01-01T11:30:00Z", &json!({"schedule": "0 */2 * * *", "jitter": "10m"}))
}

fn scraped_at(now: &str, spec: &Value) -> String {
    let (caches, mut sources) = Caches::new();
    let condition = json!({"type": "Ready", "status": "True", "reason": "Scheduled", "message": "",
        "lastTransitionTime": "2026-01-01T09:00:00Z"});
    let vms = json!([{"name": "a", "lastSuccessfulTime": "2026-01-01T10:00:00.000000Z"}, {"name": "b"}, {"name": "c"},
        {"name": "gone", "deselected": true}]);
    let schedule = json!({
        "metadata": {"name": "s", "namespace": "shop", "creationTimestamp": "2026-01-01T09:00:00Z"},
        "spec": spec, "status": {"vms": vms, "conditions": [condition]},
    });
    sources.schedules.fill([serde_json::from_value(schedule).unwrap()]);
    let new = json!({"metadata": {"name": "c", "namespace": "shop", "creationTimestamp": "2026-01-01T11:00:00Z"}, "spec": {}});
    sources.targets.fill([serde_json::from_value(new).unwrap()]);
    let now = now.parse().unwrap();
    let clock = Clock::new(move || now);
    let metrics = Metrics::default();
    metrics.count_error("schedule", ErrorKind::Refused);
    let snapshot = serde_json::from_value(json!({"metadata": {}, "spec": {"vmName": "a"}})).unwrap();
    let failed = serde_json::from_value(json!({"phase": "Failed"})).unwrap();
    metrics.count_outcome(&snapshot, &failed, clock.now());
    let mut registry = Registry::default();
    metrics.register(&mut registry);
    registry.register_collector(Box::new(PhaseGauge(caches.snapshots.clone())));
    registry.register_collector(Box::new(ScheduleGauges {
        schedules: caches.schedules.clone(),
        targets: caches.targets.clone(),
        clock,
    }));
    let mut text = String::new();
    encode(&mut text, &registry).unwrap();
    text
}

#[derive(Deserialize)]
struct Rules {
    groups: Vec<Group>,
}

#[derive(Deserialize)]
struct Group {
    rules: Vec<Rule>,
}

#[derive(Deserialize)]
struct Rule {
    alert: String,
    expr: String,
}

/// The metrics that an expression selects.
struct Selected(BTreeSet<String>);

impl ExprVisitor for Selected {
    type Error = std::convert::Infallible;

    fn pre_visit(&mut self, expr: &Expr) -> Result<bool, Self::Error> {
        match expr {
            Expr::VectorSelector(selector) => self.0.extend(selector.name.clone()),
            Expr::MatrixSelector(selector) => self.0.extend(selector.vs.name.clone()),
            _ => {}
        }
        Ok(true)
    }
}

/// The metrics of each rule, whose expression a parser of Prometheus' language has understood.
fn selected() -> BTreeMap<String, BTreeSet<String>> {
    let rules: Rules = serde_yaml::from_str(RULES).unwrap();
    let of_rule = |rule: Rule| {
        let expr = promql_parser::parser::parse(&rule.expr).unwrap_or_else(|why| panic!("{}: {why}", rule.alert));
        let mut selected = Selected(BTreeSet::new());
        walk_expr(&mut selected, &expr).unwrap();
        (rule.alert, selected.0)
    };
    rules.groups.into_iter().flat_map(|group| group.rules).map(of_rule).collect()
}

/// Whether the agent registers a metric of this name: it is another program, so its source has to do.
fn is_agents(name: &str) -> bool {
    let name = name.strip_prefix("freezeframe_agent_").map(|name| name.trim_end_matches("_total"));
    name.is_some_and(|name| AGENT.contains(&format!("\"{name}\"")))
}

#[test]
fn every_rule_can_be_read_and_is_on_metrics_that_there_are_and_that_are_documented() {
    let scraped = scraped();
    let selected = selected();
    assert!(selected.len() > 5 && selected.values().all(|metrics| !metrics.is_empty()), "{selected:?}");
    for name in selected.values().flatten() {
        let is_operators = scraped.contains(&format!("# TYPE {} ", name.trim_end_matches("_total")));
        assert!(is_operators || is_agents(name), "no program has {name}: {scraped}");
        assert!(OPERATIONS.contains(name.as_str()), "{name} is not in operations.md");
    }
}

#[test]
fn the_age_of_the_last_good_snapshot_is_told_of_each_vm_that_is_selected() {
    let scraped = scraped();
    let age =
        |vm| format!(r#"freezeframe_schedule_recovery_point_age_seconds{{namespace="shop",schedule="s",vm="{vm}"}}"#);
    assert!(scraped.contains(&format!("{} 5400\n", age("a"))), "{scraped}");
    assert!(scraped.contains(&format!("{} 9000\n", age("b"))), "since the schedule is there: {scraped}");
    assert!(!scraped.contains("gone"), "{scraped}");
    assert!(scraped.contains(&format!("{} 1800\n", age("c"))), "since the VM is there: {scraped}");
}

#[test]
fn a_snapshot_is_too_old_once_two_in_a_row_have_had_their_time_however_far_they_are_apart() {
    let working_hours = json!({"schedule": "0 9-17 * * 1-5"});
    let often = json!({"schedule": "0 */2 * * *", "jitter": "10m"});
    let rows = [
        (&often, "2026-01-01T11:30:00Z", "2026-01-01T08:00:00Z"),
        (&often, "2026-01-01T10:24:59Z", "2026-01-01T06:00:00Z"),
        // A Monday: the last one but one is Friday's.
        (&working_hours, "2026-01-05T09:05:00Z", "2026-01-02T16:00:00Z"),
        (&working_hours, "2026-01-05T09:20:00Z", "2026-01-02T17:00:00Z"),
        (&working_hours, "2026-01-05T10:14:00Z", "2026-01-02T17:00:00Z"),
        (&working_hours, "2026-01-05T10:15:00Z", "2026-01-05T09:00:00Z"),
    ];
    for (spec, now, oldest) in rows {
        let [start, end] = [oldest, now].map(|time| time.parse::<Timestamp>().unwrap());
        let labels = r#"{namespace="shop",schedule="s",stopped="false"}"#;
        let seconds = end.duration_since(start).as_secs();
        let expected = format!("freezeframe_schedule_recovery_point_limit_seconds{labels} {seconds}\n");
        let scraped = scraped_at(now, spec);
        assert!(scraped.contains(&expected), "{now}: {expected}{scraped}");
    }
}

/// A counter's series begins with its first event: it has grown by nothing then.
#[test]
fn a_rule_on_what_grows_sees_the_first_event_too() {
    let rules: Rules = serde_yaml::from_str(RULES).unwrap();
    let growing = rules.groups.into_iter().flat_map(|group| group.rules).filter(|rule| rule.expr.contains("increase("));
    for rule in growing {
        let (increase, new) = rule.expr.split_once(" or ").expect(&rule.alert);
        let range = increase.strip_prefix("increase(").unwrap().strip_suffix(") > 0").unwrap();
        let (series, span) = range.strip_suffix(']').unwrap().split_once('[').unwrap();
        assert_eq!(new, format!("({series} unless {series} offset {span}) > 0"), "{}", rule.alert);
    }
}
