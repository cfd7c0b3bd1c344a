//! `freezeframe-operator`.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use clap::Parser as _;
use freezeframe_operator::args::Args;
use freezeframe_operator::caches::Caches;
use freezeframe_operator::clock::Clock;
use freezeframe_operator::context::Context;
use freezeframe_operator::controllers;
use freezeframe_operator::leader::Candidate;
use freezeframe_operator::metrics::{Metrics, PhaseGauge};
use freezeframe_operator::schedule::gauges::ScheduleGauges;
use freezeframe_runtime::admin::AdminServer;
use freezeframe_runtime::readiness::Readiness;
use freezeframe_runtime::shutdown::Shutdown;
use freezeframe_runtime::telemetry;
use kube::Client;
use prometheus_client::registry::Registry;

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    telemetry::init(args.log_format)?;
    let shutdown = Shutdown::on_signals().context("listening for signals")?;
    let client = Client::try_default().await.context("finding the cluster")?;
    let (caches, sources) = Caches::new();
    let (metrics, readiness, mut registry) = (Metrics::default(), Readiness::default(), Registry::default());
    metrics.register(&mut registry);
    registry.register_collector(Box::new(PhaseGauge(caches.snapshots.clone())));
    registry.register_collector(Box::new(ScheduleGauges {
        schedules: caches.schedules.clone(),
        targets: caches.targets.clone(),
        clock: Clock::default(),
    }));
    let reachable = readiness.gate("cluster");
    let server = AdminServer::bind(args.metrics_addr, Arc::new(registry), readiness.clone()).await?;
    let serving = tokio::spawn(server.serve(shutdown.token()));
    client.apiserver_version().await.context("asking the cluster for its version")?;
    reachable.open();
    let context = Arc::new(Context::new(client.clone(), caches, metrics, Some(args.identity.clone())));
    let acting = Box::pin(controllers::run(context, sources, shutdown.token()));
    if args.leader_elect {
        let candidate = Candidate::new(client, &args.lease_namespace, &args.identity);
        candidate.lead(acting, shutdown.token()).await?;
    } else {
        acting.await;
    }
    shutdown.begin();
    serving.await?.context("the administrative server")
}
