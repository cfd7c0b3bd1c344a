//! Entry point of the node agent.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use freezeframe_guard::client::Guard;
use freezeframe_node_agent::args::Args;
use freezeframe_node_agent::boot::Boots;
use freezeframe_node_agent::drivers::Drivers;
use freezeframe_node_agent::fill::FillWatch;
use freezeframe_node_agent::governor::{Depths, Governor};
use freezeframe_node_agent::hypervisor::image::ImageRoots;
use freezeframe_node_agent::locks::VmLocks;
use freezeframe_node_agent::metrics::Metrics;
use freezeframe_node_agent::orders::{self, Context};
use freezeframe_node_agent::restore::Restores;
use freezeframe_node_agent::session::Sessions;
use freezeframe_node_agent::session::journal::Journal;
use freezeframe_node_agent::session::machine::StoppedVms;
use freezeframe_node_agent::session::space_watch::SpaceWatch;
use freezeframe_node_agent::targets::Targets;
use freezeframe_runtime::admin::AdminServer;
use freezeframe_runtime::readiness::Readiness;
use freezeframe_runtime::shutdown::Shutdown;
use freezeframe_runtime::telemetry;
use prometheus_client::registry::Registry;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    telemetry::init(args.log_format)?;
    let shutdown = Shutdown::on_signals()?;
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let readiness = Readiness::default();
    let api_reached = readiness.gate("api");
    let admin = AdminServer::bind(args.metrics_addr, Arc::new(registry), readiness).await?;
    let admin = tokio::spawn(admin.serve(shutdown.token()));

    let sessions = Arc::new(sessions(&args)?);
    let client = kube::Client::try_default().await.context("failed to read how to reach the Kubernetes API")?;
    api_reached.open();
    let locks = VmLocks::default();
    let governor = Governor { sessions: sessions.clone(), locks: locks.clone(), depths: Depths::default() };
    let targets = Targets {
        client: client.clone(),
        node: args.node_name.clone(),
        sessions: sessions.clone(),
        locks: locks.clone(),
        metrics: metrics.clone(),
        depths: governor.depths.clone(),
    };
    let fills = FillWatch {
        client: client.clone(),
        sessions: sessions.clone(),
        locks: locks.clone(),
        metrics: metrics.clone(),
        every: Duration::from_secs(args.fill_interval),
    };
    tracing::info!(node = args.node_name, vm_root = %args.vm_root.display(), "agent starts");
    let targets = tokio::spawn(targets.run(shutdown.token()));
    let restores = Context {
        client: client.clone(),
        work: Arc::new(Restores {
            sessions: sessions.clone(),
            journal: sessions.restores.clone(),
            boots: sessions.boots.clone(),
        }),
        locks: locks.clone(),
        metrics: metrics.clone(),
    };
    let (node, stop) = (args.node_name.clone(), shutdown.token());
    let restores = tokio::spawn(async move { orders::run(restores, &node, stop).await });
    let fills = tokio::spawn(fills.run(shutdown.token()));
    let governor = tokio::spawn(governor.run(shutdown.token()));
    orders::run(Context { client, work: sessions, locks, metrics }, &args.node_name, shutdown.token()).await;
    restores.await.context("restoring ended badly")?;
    targets.await.context("publishing targets ended badly")?;
    fills.await.context("watching snapshots ended badly")?;
    governor.await.context("shortening chains ended badly")?;
    admin.await.context("the admin server ended badly")??;
    tracing::info!("agent ends");
    Ok(())
}

fn sessions(args: &Args) -> anyhow::Result<Sessions> {
    let mut roots = args.image_roots.clone();
    roots.push(args.vm_root.clone());
    let timeout = Duration::from_secs(args.boot_timeout);
    Ok(Sessions {
        vm_root: args.vm_root.clone(),
        roots: ImageRoots::new(roots),
        guard: Guard::new(&args.guard_socket),
        journal: Journal::open(args.state_dir.join("contents"))?,
        restores: Journal::open(args.state_dir.join("restores"))?,
        drivers: Drivers::default(),
        stopped: StoppedVms::awaiting_targets(),
        space: SpaceWatch::new(args.space_low_percent),
        boots: Arc::new(Boots::new(args.boot_memory, timeout, args.boots_at_once, args.boot_accelerator)),
    })
}
