//! Leader election by a Lease: of several replicas one acts.
//!
//! ```text
//! standing by ── lease free, or not renewed for its whole duration ──► leading
//!      ▲                                                                  │ not renewed for `GIVE_UP_AFTER`,
//!      └────────────────── (a new process) ◄── exit ◄── lost ◄────────────┘ or taken by another
//! ```
//! Whether another's lease has run out is judged by how long *we* have seen it unchanged, and whether our own holds by
//! when *we* sent the last renewal that succeeded: clocks of different machines are never compared. A leader that can't
//! renew gives up well before another one may take over.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::core::ObjectMeta;
use kube::{Api, Client};
use thiserror::Error;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Name of the lease.
pub const LEASE_NAME: &str = "freezeframe-operator";

/// How long a lease holds that isn't renewed.
const DURATION: Duration = Duration::from_secs(15);

/// How long a leader goes on without a renewal: five seconds less, for what it has sent to end.
const GIVE_UP_AFTER: Duration = Duration::from_secs(10);

/// How often the lease is renewed, or looked at.
const PERIOD: Duration = Duration::from_secs(3);

/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(3);

/// One that would lead.
#[derive(Clone)]
pub struct Candidate {
    leases: Api<Lease>,
    identity: String,
}

/// The lease was lost by one that acted as its holder.
#[derive(Debug, Error)]
#[error("the lease is lost")]
pub struct Lost;

/// The lease as it was last seen to change.
struct Seen {
    spec: LeaseSpec,
    since: Instant,
}

impl Candidate {
    /// A candidate of that name for the lease of that namespace.
    #[must_use]
    pub fn new(client: Client, namespace: &str, identity: &str) -> Self {
        Self { leases: Api::namespaced(client, namespace), identity: identity.to_owned() }
    }

    /// Stands by for the lease, then acts until the end of `act`, and gives the lease up; or until it is lost: `act` is
    /// dropped then, for nothing that was begun as the leader may go on. `stop` ends the standing by.
    pub async fn lead(&self, act: impl Future<Output = ()>, stop: CancellationToken) -> Result<(), Lost> {
        let Some(held) = stop.run_until_cancelled(self.acquire()).await else { return Ok(()) };
        let release = CancellationToken::new();
        let keep = self.keep(held, release.clone());
        tokio::pin!(keep);
        tokio::select! {
            () = &mut keep => return Err(Lost),
            () = act => {}
        }
        release.cancel();
        keep.await;
        Ok(())
    }

    /// Returns when this one leads, with the instant at which it asked to.
    pub async fn acquire(&self) -> Instant {
        let mut seen = None;
        info!(identity = self.identity, "standing by for the lease");
        loop {
            let sent = Instant::now();
            if self.attempt(&mut seen).await {
                info!(identity = self.identity, "leading");
                return sent;
            }
            sleep(PERIOD).await;
        }
    }

    /// Renews the lease, `held` since that instant, until it is lost, and returns then; or until `stop`, and gives it
    /// up then.
    pub async fn keep(&self, mut held: Instant, stop: CancellationToken) {
        let mut seen = None;
        loop {
            let renewal = async {
                sleep(PERIOD).await;
                (Instant::now(), self.attempt(&mut seen).await)
            };
            let (sent, renewed) = tokio::select! {
                () = stop.cancelled() => return self.release().await,
                () = sleep_until(held + GIVE_UP_AFTER) => break,
                attempt = renewal => attempt,
            };
            if renewed {
                held = sent;
            } else if seen.as_ref().is_some_and(|seen: &Seen| !self.holds(&seen.spec)) {
                break;
            }
        }
        warn!(identity = self.identity, "the lease is lost");
    }

    /// Takes or renews the lease if it may be; says whether it is ours now.
    async fn attempt(&self, seen: &mut Option<Seen>) -> bool {
        match timeout(ATTEMPT, self.try_hold(seen)).await {
            Ok(Ok(held)) => held,
            Ok(Err(error)) => {
                warn!(error = &error as &dyn std::error::Error, "asking for the lease");
                false
            }
            Err(_) => {
                warn!("no answer about the lease within {} s", ATTEMPT.as_secs());
                false
            }
        }
    }

    async fn try_hold(&self, seen: &mut Option<Seen>) -> Result<bool, kube::Error> {
        let Some(lease) = self.leases.get_opt(LEASE_NAME).await? else {
            return lost_race(self.leases.create(&PostParams::default(), &self.lease(None)).await);
        };
        let spec = lease.spec.clone().unwrap_or_default();
        if seen.as_ref().is_none_or(|seen| seen.spec != spec) {
            *seen = Some(Seen { spec: spec.clone(), since: Instant::now() });
        }
        let run_out = seen.as_ref().is_some_and(|seen| seen.since.elapsed() >= DURATION);
        if !self.holds(&spec) && !is_free(&spec) && !run_out {
            return Ok(false);
        }
        // The resource version in it makes this fail if anybody was faster.
        lost_race(self.leases.replace(LEASE_NAME, &PostParams::default(), &self.lease(Some(lease))).await)
    }

    /// Gives the lease up, so that a successor need not wait for it to run out. A failure costs just that wait.
    async fn release(&self) {
        let give_up = async {
            let mut lease = self.leases.get(LEASE_NAME).await?;
            if let Some(spec) = lease.spec.as_mut().filter(|spec| self.holds(spec)) {
                spec.holder_identity = None;
                self.leases.replace(LEASE_NAME, &PostParams::default(), &lease).await?;
            }
            Ok::<_, kube::Error>(())
        };
        match timeout(ATTEMPT, give_up).await {
            Ok(Ok(())) => info!("gave the lease up"),
            failed => warn!(?failed, "the lease was not given up"),
        }
    }

    fn holds(&self, spec: &LeaseSpec) -> bool {
        spec.holder_identity.as_ref() == Some(&self.identity)
    }

    /// The lease with this candidate as its holder from now on.
    fn lease(&self, old: Option<Lease>) -> Lease {
        let now = Some(MicroTime(Timestamp::now()));
        let mut lease = old.unwrap_or_else(|| Lease {
            metadata: ObjectMeta { name: Some(LEASE_NAME.to_owned()), ..ObjectMeta::default() },
            spec: None,
        });
        let spec = lease.spec.get_or_insert_default();
        if !self.holds(spec) {
            spec.acquire_time.clone_from(&now);
            spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0).saturating_add(1));
        }
        spec.holder_identity = Some(self.identity.clone());
        spec.lease_duration_seconds = i32::try_from(DURATION.as_secs()).ok(); // A small constant.
        spec.renew_time = now;
        lease
    }
}

fn is_free(spec: &LeaseSpec) -> bool {
    spec.holder_identity.as_ref().is_none_or(String::is_empty)
}

/// A conflict means that another one has it now: no error, only no.
fn lost_race(result: Result<Lease, kube::Error>) -> Result<bool, kube::Error> {
    match result {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.is_conflict() => Ok(false),
        Err(error) => Err(error),
    }
}
