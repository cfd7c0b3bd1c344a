//! Which snapshots of a schedule are kept, and the account that is given of it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which good snapshots of a VM are kept: each that any of these fields asks for. As restic's `forget` counts them: of each
/// hour (day, week, ...) that has any, the latest one, for the latest so many hours that do; and while there are fewer than
/// that, the oldest of all too. Days begin at midnight in the schedule's time zone, weeks are those of ISO 8601.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.last) || has(self.hourly) || has(self.daily) || has(self.weekly) || has(self.monthly) || has(self.yearly) || has(self.within)")
        .message("keep must ask for something; leave it out to keep everything")
)]
pub struct Keep {
    /// The latest so many. Set by the user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10000))]
    pub last: Option<i32>,
    /// The latest one of each hour, for so many hours. Set by the user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10000))]
    pub hourly: Option<i32>,
    /// The latest one of each day, for so many days. Set by the user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10000))]
    pub daily: Option<i32>,
    /// The latest one of each week, for so many weeks. Set by the user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10000))]
    pub weekly: Option<i32>,
    /// The latest one of each month, for so many months. Set by the user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10000))]
    pub monthly: Option<i32>,
    /// The latest one of each year, for so many years. Set by the user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10000))]
    pub yearly: Option<i32>,
    /// All that are younger than this, counted back from the latest one and not from today. As restic writes it: years `y`,
    /// months `m`, days `d` and hours `h`, in this order, such as `1y`, `6m`, `2y5m7d3h` or `36h`; `m` is never minutes. Set
    /// by the user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 2, max = 32),
        regex(pattern = r"^([0-9]{1,3}y)?([0-9]{1,4}m)?([0-9]{1,5}d)?([0-9]{1,6}h)?$")
    )]
    #[x_kube(validation = Rule::new("self.matches('[1-9]')").message("within must be longer than nothing"))]
    pub within: Option<String>,
}

/// One snapshot that is kept.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeptSnapshot {
    /// Its name.
    pub name: String,
    /// Its cut. Absent when it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<MicroTime>,
    /// Why: fields of `keep` (`last`, `hourly`, ..., `within`; `oldest daily` for one that is kept because there are fewer
    /// days than asked for), `minHealthy`, `held`, `restore` (one needs it), `failed` (its history), or `unproved` before
    /// one of these (Ready below the level it had to have, and later than any good one).
    pub reasons: Vec<String>,
}

/// What retention makes of the snapshots of one VM.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RetentionPlan {
    /// The VM.
    pub vm_name: String,
    /// What is kept, latest first; at most the latest 64.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keep: Vec<KeptSnapshot>,
    /// What is being removed, latest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remove: Vec<String>,
    /// What goes when the next snapshot is Ready, if nothing else changes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub next: Vec<String>,
}
