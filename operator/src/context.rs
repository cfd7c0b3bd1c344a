//! What every reconcile may use.

use std::sync::Arc;

use freezeframe_api::OPERATOR_MANAGER;
use kube::Client;
use kube::runtime::events::{Recorder, Reporter};

use crate::caches::Caches;
use crate::clock::Clock;
use crate::metrics::Metrics;
use crate::retries::Retries;
use crate::written::Written;

/// What every reconcile may use.
#[derive(Clone)]
pub struct Context {
    /// The server.
    pub client: Client,
    /// What the watches have seen.
    pub caches: Caches,
    /// Where events go.
    pub recorder: Recorder,
    /// Counters.
    pub metrics: Metrics,
    /// Errors in a row.
    pub retries: Arc<Retries>,
    /// Own writes that the caches don't show yet.
    pub written: Arc<Written>,
    /// The time of day.
    pub clock: Clock,
}

impl Context {
    /// A context without history.
    #[must_use]
    pub fn new(client: Client, caches: Caches, metrics: Metrics, instance: Option<String>) -> Self {
        let reporter = Reporter { controller: OPERATOR_MANAGER.to_owned(), instance };
        Self {
            recorder: Recorder::new(client.clone(), reporter),
            client,
            caches,
            metrics,
            retries: Arc::default(),
            written: Arc::default(),
            clock: Clock::default(),
        }
    }
}
