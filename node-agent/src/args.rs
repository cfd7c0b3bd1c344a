//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use freezeframe_runtime::telemetry::LogFormat;

use crate::boot::Accelerator;

/// Freezes guests, cuts their disks, lets them go.
#[derive(Clone, Debug, clap::Parser)]
#[command(name = "freezeframe-agent", version)]
pub struct Args {
    /// Name of the Kubernetes node that this agent works for.
    #[arg(long, env = "NODE_NAME")]
    pub node_name: String,
    /// Where VMs are found: `<root>/<namespace>/<name>/{qmp.sock,qga.sock}`.
    #[arg(long, default_value = "/run/freezeframe/vms")]
    pub vm_root: PathBuf,
    /// Beneath which image files may be. May be given several times; the VM root is always one.
    #[arg(long = "image-root")]
    pub image_roots: Vec<PathBuf>,
    /// Where this agent keeps its journal.
    #[arg(long, default_value = "/var/lib/freezeframe/agent")]
    pub state_dir: PathBuf,
    /// How often it is looked how full snapshots are that can overflow, in seconds.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub fill_interval: u64,
    /// Below how many percent of free space a file system that disks of VMs grow on is low on space.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=99))]
    pub space_low_percent: u64,
    /// Socket of this node's guard.
    #[arg(long, default_value = "/run/freezeframe/guard.sock")]
    pub guard_socket: PathBuf,
    /// Memory of a guest that is started to see whether it boots, in MiB.
    #[arg(long, default_value_t = 512)]
    pub boot_memory: u32,
    /// How long such a guest may take until its guest agent answers, in seconds.
    #[arg(long, default_value_t = 120)]
    pub boot_timeout: u64,
    /// How many such guests run at once.
    #[arg(long, default_value_t = 1)]
    pub boots_at_once: usize,
    /// What runs these guests' instructions.
    #[arg(long, value_enum, default_value = "auto")]
    pub boot_accelerator: Accelerator,
    /// Address of `/metrics`, `/healthz` and `/readyz`.
    #[arg(long, default_value = "127.0.0.1:9810")]
    pub metrics_addr: SocketAddr,
    /// How log lines look: `text` or `json`.
    #[arg(long, default_value = "text")]
    pub log_format: LogFormat,
}
