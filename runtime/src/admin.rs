//! The administrative HTTP server: `/metrics`, `/healthz` and `/readyz`.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::readiness::Readiness;

/// How long connections may outlive the stop: a scraper that keeps its connection open must not hold the program.
const LINGER: Duration = Duration::from_secs(2);

/// Why the server doesn't run.
#[derive(Debug, Error)]
pub enum Error {
    /// The address can't be listened on.
    #[error("listening for administrative requests on {address}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// The server broke.
    #[error("serving administrative requests")]
    Serve(#[source] io::Error),
}

/// A server that listens already, so that its address is known before it runs.
#[derive(Debug)]
pub struct AdminServer {
    listener: TcpListener,
    address: SocketAddr,
    state: AdminState,
}

#[derive(Clone, Debug)]
struct AdminState {
    registry: Arc<Registry>,
    readiness: Readiness,
}

impl AdminServer {
    /// Listens on `address`; port 0 takes any free one.
    pub async fn bind(address: SocketAddr, registry: Arc<Registry>, readiness: Readiness) -> Result<Self, Error> {
        let bind = |source| Error::Bind { address, source };
        let listener = TcpListener::bind(address).await.map_err(bind)?;
        let address = listener.local_addr().map_err(bind)?;
        Ok(Self { listener, address, state: AdminState { registry, readiness } })
    }

    /// The address that is listened on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop` is cancelled; requests under way then have two seconds to end.
    pub async fn serve(self, stop: CancellationToken) -> Result<(), Error> {
        info!(address = %self.address, "serving metrics and probes");
        let router = router(self.state);
        let serve = axum::serve(self.listener, router).with_graceful_shutdown(stop.clone().cancelled_owned());
        tokio::select! {
            result = async { serve.await } => result.map_err(Error::Serve),
            () = async { stop.cancelled().await; tokio::time::sleep(LINGER).await } => Ok(()),
        }
    }
}

fn router(state: AdminState) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(state)
}

async fn metrics(State(state): State<AdminState>) -> Response {
    let mut text = String::new();
    match encode(&mut text, &state.registry) {
        Ok(()) => ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
            .into_response(),
        Err(e) => {
            error!(error = %e, "encoding the metrics");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

async fn ready(State(state): State<AdminState>) -> Response {
    let closed = state.readiness.closed();
    if closed.is_empty() {
        "ok\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, format!("waiting for: {}\n", closed.join(", "))).into_response()
    }
}
