//! The administrative server over a real socket of the loopback device.
#![allow(clippy::unwrap_used, reason = "a test's helpers may stop it")]

use std::sync::Arc;
use std::time::Duration;

use freezeframe_runtime::admin::AdminServer;
use freezeframe_runtime::readiness::Readiness;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

struct Server {
    address: std::net::SocketAddr,
    readiness: Readiness,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

async fn server() -> Server {
    let counter = Counter::<u64>::default();
    counter.inc();
    let mut registry = Registry::default();
    registry.register("cuts", "Cuts made", counter);
    let (readiness, stop) = (Readiness::default(), CancellationToken::new());
    let server =
        AdminServer::bind("127.0.0.1:0".parse().unwrap(), Arc::new(registry), readiness.clone()).await.unwrap();
    let (address, token) = (server.address(), stop.clone());
    let task = tokio::spawn(async move { server.serve(token).await.unwrap() });
    Server { address, readiness, stop, task }
}

impl Server {
    async fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.unwrap();
        reply
    }
}

#[tokio::test]
async fn metrics_are_served_as_open_metrics_text() {
    let reply = server().await.get("/metrics").await;
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    assert!(reply.contains("application/openmetrics-text") && reply.contains("cuts_total 1\n"), "{reply}");
}

#[tokio::test]
async fn a_program_is_healthy_before_it_is_ready_and_readyz_names_what_it_waits_for() {
    let server = server().await;
    let gate = server.readiness.gate("watch");
    assert!(server.get("/healthz").await.starts_with("HTTP/1.1 200"));
    let reply = server.get("/readyz").await;
    assert!(reply.starts_with("HTTP/1.1 503") && reply.contains("waiting for: watch"), "{reply}");
    gate.open();
    assert!(server.get("/readyz").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn a_client_that_keeps_its_connection_open_does_not_hold_the_stop() {
    let server = server().await;
    let _idle = TcpStream::connect(server.address).await.unwrap();
    server.stop.cancel();
    tokio::time::timeout(Duration::from_secs(5), server.task).await.unwrap().unwrap();
}
