//! What came out, in one table.

use std::time::Duration;

use freezeframe_api::v1alpha1::ConsistencyEvidence;

use super::proof::Proved;

/// One snapshot, from outside and from its status.
pub struct Taken {
    /// Last record known durable before the snapshot was asked for.
    pub acknowledged: u64,
    /// The writer's longest gap in the seconds before.
    pub usual_gap: Duration,
    /// The writer's longest gap from apply until it had gone on.
    pub gap: Duration,
    /// Creation seen to Ready seen.
    pub to_ready: Duration,
    /// From the snapshot's status.
    pub evidence: ConsistencyEvidence,
}

/// The kill and restart of the first VM.
pub struct Restart {
    /// Last record known durable before.
    pub before: u64,
    /// First record after.
    pub first: u64,
}

/// All of it.
pub struct Summary {
    pub taken: Taken,
    pub proved: Proved,
    pub restart: Restart,
    pub second: Taken,
    pub last: Proved,
}

impl Summary {
    pub fn print(&self) {
        println!("\nSummary                     first       second");
        let Self { taken: first, second, proved, restart, last } = self;
        let millis = |value: Option<i64>| value.map_or("-".to_owned(), |value| format!("{value} ms"));
        let evidence = |name: &str, of: fn(&ConsistencyEvidence) -> Option<i64>| {
            row(name, &millis(of(&first.evidence)), &millis(of(&second.evidence)));
        };
        row("consistency, proved", &level(first), &level(second));
        row("file systems frozen", &frozen(first), &frozen(second));
        evidence("freeze (the guest's part)", |evidence| evidence.freeze_millis);
        evidence("hold (ours)", |evidence| evidence.hold_millis);
        row("created to Ready", &in_millis(first.to_ready), &in_millis(second.to_ready));
        row("writer's longest gap", &in_millis(first.gap), &in_millis(second.gap));
        row("  in the 3 s before", &in_millis(first.usual_gap), &in_millis(second.usual_gap));
        println!("\nfirst snapshot   disk A {} records, disk B {}, A-B = {}", proved.a, proved.b, proved.a_minus_b);
        println!("killed VM        was told of record {}, went on with {}", restart.before, restart.first);
        println!("the VM at last   disk A {} records, disk B {}, A-B = {}\n", last.a, last.b, last.a_minus_b);
    }
}

fn row(name: &str, first: &str, second: &str) {
    println!("{name:26}  {first:10}  {second}");
}

fn level(taken: &Taken) -> String {
    format!("{:?}", taken.evidence.level)
}

fn frozen(taken: &Taken) -> String {
    taken.evidence.frozen_filesystems.map_or("none".to_owned(), |count| count.to_string())
}

fn in_millis(duration: Duration) -> String {
    format!("{} ms", duration.as_millis())
}
