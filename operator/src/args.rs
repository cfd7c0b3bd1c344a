//! The command line.

use std::net::SocketAddr;

use clap::{ArgAction, Parser};
use freezeframe_runtime::telemetry::LogFormat;

/// Turns snapshots of virtual machines into work orders for nodes. Finds the cluster by KUBECONFIG, else as a pod.
#[derive(Clone, Debug, Parser)]
#[command(name = "freezeframe-operator", version)]
pub struct Args {
    /// Address of /metrics, /healthz and /readyz; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:8080")]
    pub metrics_addr: SocketAddr,
    /// Format of log lines: text or json. `RUST_LOG` sets the level.
    #[arg(long, default_value = "text")]
    pub log_format: LogFormat,
    /// Act only while holding a lease, so that several replicas may run.
    #[arg(long, action = ArgAction::Set, default_value_t = true)]
    pub leader_elect: bool,
    /// Namespace of the lease.
    #[arg(long, env = "POD_NAMESPACE", default_value = "freezeframe-system")]
    pub lease_namespace: String,
    /// Name of this process on the lease, unlike that of any other.
    #[arg(long, default_value_t = identity())]
    pub identity: String,
}

fn identity() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_else(|_| "unknown-host".to_owned());
    format!("{}_{}", host.trim(), std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leader_election_is_on_unless_it_is_set_to_false() {
        assert!(Args::try_parse_from(["operator"]).unwrap().leader_elect);
        assert!(!Args::try_parse_from(["operator", "--leader-elect", "false"]).unwrap().leader_elect);
    }
}
