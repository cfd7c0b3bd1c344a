//! How the guest is brought to rest for the cut.

use kube::KubeSchema;
use kube::core::Duration;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// When the virtual CPUs are paused over the cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Pause {
    /// Where a storage layer needs it, or nothing could be frozen.
    #[default]
    Auto,
    /// Over every cut.
    Always,
}

/// How the guest is brought to rest, and for how long at the most.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Quiesce {
    /// How long to wait for the guest agent's answer before the freeze; a guest that is booting may be given minutes.
    /// Set by the user, 1s to 5m; 5s when absent.
    #[serde(default = "agent_timeout")]
    #[schemars(length(max = 16), regex(pattern = r"^([0-9]+(\.[0-9]+)?(ms|s|m))+$"))]
    #[x_kube(validation = Rule::new("duration(self) >= duration('1s') && duration(self) <= duration('5m')")
        .message("agentTimeout must be between 1s and 5m"))]
    pub agent_timeout: Duration,
    /// How long the guest may take to freeze its file systems. Set by the user, 100ms to 60s; 20s when absent.
    #[serde(default = "freeze_timeout")]
    #[schemars(length(max = 16), regex(pattern = r"^([0-9]+(\.[0-9]+)?(ms|s|m))+$"))]
    #[x_kube(validation = Rule::new("duration(self) >= duration('100ms') && duration(self) <= duration('60s')")
        .message("freezeTimeout must be between 100ms and 60s"))]
    pub freeze_timeout: Duration,
    /// How long the guest may be held frozen after that, whatever happens. Set by the user, 100ms to 60s; 5s when
    /// absent. Windows thaws by itself after 10s.
    #[serde(default = "max_hold")]
    #[schemars(length(max = 16), regex(pattern = r"^([0-9]+(\.[0-9]+)?(ms|s|m))+$"))]
    #[x_kube(validation = Rule::new("duration(self) >= duration('100ms') && duration(self) <= duration('60s')")
        .message("maxHold must be between 100ms and 60s"))]
    pub max_hold: Duration,
    /// Mount points in the guest to freeze. Set by the user; all of them when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 1024)))]
    pub mountpoints: Vec<String>,
    /// When the virtual CPUs are paused over the cut. Set by the user; `Auto` when absent.
    #[serde(default)]
    pub pause: Pause,
}

fn agent_timeout() -> Duration {
    std::time::Duration::from_secs(5).into()
}

fn freeze_timeout() -> Duration {
    std::time::Duration::from_secs(20).into()
}

fn max_hold() -> Duration {
    std::time::Duration::from_secs(5).into()
}

impl Default for Quiesce {
    fn default() -> Self {
        Self {
            agent_timeout: agent_timeout(),
            freeze_timeout: freeze_timeout(),
            max_hold: max_hold(),
            mountpoints: vec![],
            pause: Pause::Auto,
        }
    }
}
