//! `VMSnapshotSchedule`: snapshots of many VMs at recurring times, and which of them are kept.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, MicroTime, Time};
use kube::core::Duration;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Keep, RetentionPlan, SnapshotTemplate, TargetSelector};

/// What happens when a snapshot is due while the one before it is still being taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ConcurrencyPolicy {
    /// It waits for that one; of several that wait only the latest is taken.
    #[default]
    Forbid,
    /// That one is cancelled and deleted, unless it is held or a restore needs it.
    Replace,
}

/// What becomes of a schedule's snapshots when the schedule is deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ScheduleDeletionPolicy {
    /// They stay, and nothing removes them any more.
    #[default]
    Orphan,
    /// They are deleted with it, by Kubernetes' garbage collector: the schedule is their owner. One with `hold: true`
    /// has no owner while it has that, and stays.
    Delete,
}

/// Snapshots at recurring times, and which of them are kept.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "freezeframe.dev",
    version = "v1alpha1",
    kind = "VMSnapshotSchedule",
    plural = "vmsnapshotschedules",
    shortname = "vmss",
    category = "freezeframe",
    namespaced,
    status = "VMSnapshotScheduleStatus",
    derive = "PartialEq",
    doc = "Snapshots at recurring times, and which of them are kept.",
    printcolumn(name = "Schedule", type_ = "string", json_path = ".spec.schedule"),
    printcolumn(name = "Suspend", type_ = "boolean", json_path = ".spec.suspend"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "VMs", type_ = "integer", json_path = ".status.vmCount"),
    printcolumn(name = "Active", type_ = "integer", json_path = ".status.activeCount"),
    printcolumn(name = "Oldest success", type_ = "date", json_path = ".status.lastSuccessfulTime"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Next", type_ = "string", json_path = ".status.nextTime", priority = 1),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.message", priority = 1)
)]
#[serde(rename_all = "camelCase")]
pub struct VMSnapshotScheduleSpec {
    /// When, as cron: minute, hour, day of month, month, day of week; or `@hourly`, `@daily`, `@weekly`, `@monthly`,
    /// `@yearly`. A sixth field in front is the second. Set by the user.
    #[schemars(
        length(min = 1, max = 128),
        regex(pattern = r"^(@(hourly|daily|midnight|weekly|monthly|yearly|annually)|[^\s@]+( +[^\s]+){4,5})$")
    )]
    pub schedule: String,
    /// The IANA time zone that the times are in, and that days, weeks, months and years of `keep` begin in, such as
    /// `Europe/Vienna`. Where the pattern has one time a day, one that is skipped when the clocks go forward is taken at
    /// the first instant after the gap, and one that comes twice when they go back is taken at the first. Set by the user;
    /// UTC when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+)*$"))]
    pub time_zone: Option<String>,
    /// Spreads the VMs over this long a time: each is taken at a delay of its own, the same each time. Set by the user, at
    /// most 24h; none when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$"))]
    #[x_kube(validation = Rule::new("duration(self) <= duration('24h')").message("jitter must be at most 24h"))]
    pub jitter: Option<Duration>,
    /// How late a snapshot may still be taken, for whatever reason it wasn't in time. Of several that were missed only
    /// the latest is made up for. Set by the user, 10s or more; however late when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$"))]
    #[x_kube(validation = Rule::new("duration(self) >= duration('10s')").message("startingDeadline must be at least 10s"))]
    pub starting_deadline: Option<Duration>,
    /// What happens when a snapshot is due while the one before it of the same VM is still being taken. Set by the user;
    /// `Forbid` when absent.
    #[serde(default)]
    pub concurrency_policy: ConcurrencyPolicy,
    /// Stops the schedule: nothing is taken and nothing is removed while it is true. When it ends, at most one snapshot
    /// a VM is made up for. Set by the user; false when absent.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub suspend: bool,
    /// The VMs: `VMTargets` of the same namespace. Set by the user; all of them when it is empty.
    #[serde(default)]
    pub selector: TargetSelector,
    /// What each snapshot is like. Set by the user; the defaults of a VMSnapshot when absent.
    #[serde(default)]
    pub template: SnapshotTemplate,
    /// How many snapshots of this schedule may be under way at a time; the others wait. Set by the user; all of them when
    /// absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10000))]
    pub max_concurrent: Option<i32>,
    /// Which snapshots of each VM are kept; the others are deleted. Set by the user; all are kept when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<Keep>,
    /// So many good snapshots of each VM, the latest ones, are kept whatever `keep` says. Good is one that is Ready at the
    /// level that it had to have. Set by the user; 1 when absent.
    #[serde(default = "min_healthy")]
    #[schemars(range(min = 1, max = 10000))]
    pub min_healthy: i32,
    /// So many failed snapshots of each VM, the latest ones, are kept. Set by the user; 3 when absent.
    #[serde(default = "failed_history_limit")]
    #[schemars(range(min = 0, max = 10000))]
    pub failed_history_limit: i32,
    /// What becomes of the schedule's snapshots when it is deleted. Set by the user, at any time; `Orphan` when absent.
    #[serde(default)]
    pub deletion_policy: ScheduleDeletionPolicy,
}

fn min_healthy() -> i32 {
    1
}

fn failed_history_limit() -> i32 {
    3
}

/// How one VM stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ScheduledVM {
    /// The VM.
    pub name: String,
    /// The latest time of the schedule for which a snapshot was made. Absent before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_schedule_time: Option<Time>,
    /// The cut of its latest good snapshot. Absent when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_successful_time: Option<MicroTime>,
    /// When the next snapshot is taken, jitter included. Absent when none will be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_time: Option<Time>,
    /// Its snapshots that are being taken.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub active: Vec<String>,
    /// The VM isn't selected any more. The rules still apply to the snapshots that it has.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deselected: bool,
    /// What keeps its next snapshot from being taken, or became of the last one. Absent when there is nothing to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// How the schedule stands. Set by the operator.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct VMSnapshotScheduleStatus {
    /// The generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The next time of the schedule, without jitter. Absent while nothing will be taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_time: Option<Time>,
    /// How far back one would have to go in the worst case: the cut of the latest good snapshot of the VM whose latest is
    /// the oldest. Absent when some VM has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_successful_time: Option<MicroTime>,
    /// VMs that are selected.
    #[serde(default)]
    pub vm_count: i32,
    /// Snapshots that are being taken.
    #[serde(default)]
    pub active_count: i32,
    /// The VMs that are selected, and those that were and still have snapshots of this schedule. By name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub vms: Vec<ScheduledVM>,
    /// For each VM which snapshots are kept and why, and which go. By name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["vmName".into()]))]
    pub plan: Vec<RetentionPlan>,
    /// The most important condition's message, for `kubectl get -o wide`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// `Ready` (the schedule can be followed, or is suspended), `Stalled` when the spec can't be followed as it is, and
    /// `Protected` (the last snapshot of each VM that ended is good).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}
