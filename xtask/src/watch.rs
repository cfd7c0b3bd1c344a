//! Following one VMSnapshot as it happens, as `kubectl get --watch` would.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use freezeframe_api::conditions;
use freezeframe_api::v1alpha1::{Phase, VMSnapshot};
use futures::{StreamExt, TryStreamExt};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// A watch on one name, which need not exist yet.
pub struct Watch {
    seen: UnboundedReceiver<Result<(Instant, VMSnapshot)>>,
}

impl Watch {
    /// Starts; whatever happens to that name from now on is seen.
    pub async fn start(api: Api<VMSnapshot>, name: &str) -> Result<Self> {
        let only = watcher::Config::default().fields(&format!("metadata.name={name}"));
        let mut events = watcher::watcher(api, only).boxed();
        while !matches!(events.try_next().await?, Some(Event::InitDone)) {}
        let (seen, receiver) = unbounded_channel();
        // A task of its own notes the time of an event even while its reader is busy.
        tokio::spawn(async move {
            while let Some(event) = events.next().await {
                if !pass_on(event, &seen) {
                    break;
                }
            }
        });
        Ok(Self { seen: receiver })
    }

    /// The next version of the object and when it was seen.
    pub async fn next(&mut self, bound: Duration) -> Result<(Instant, VMSnapshot)> {
        let next = tokio::time::timeout(bound, self.seen.recv()).await;
        next.with_context(|| format!("nothing happened to the snapshot for {bound:?}"))?.context("the watch ended")?
    }

    /// Waits until the snapshot is Ready; one that failed is an error with its reason.
    ///
    /// `bound` is for each step, and `each` sees each version.
    pub async fn ready(
        &mut self,
        bound: Duration,
        mut each: impl FnMut(Instant, &VMSnapshot),
    ) -> Result<(Instant, VMSnapshot)> {
        loop {
            let (at, snapshot) = self.next(bound).await?;
            each(at, &snapshot);
            match snapshot.status.as_ref().map(|status| status.phase) {
                Some(Phase::Ready) => return Ok((at, snapshot)),
                Some(Phase::Failed) => bail!("the snapshot failed: {}", why(&snapshot)),
                _ => {}
            }
        }
    }
}

/// False when nobody listens any more.
fn pass_on(event: watcher::Result<Event<VMSnapshot>>, seen: &UnboundedSender<Result<(Instant, VMSnapshot)>>) -> bool {
    let passed = match event {
        Ok(Event::Apply(snapshot) | Event::InitApply(snapshot)) => Ok((Instant::now(), snapshot)),
        Ok(_) => return true,
        Err(error) => Err(anyhow!(error).context("watching the snapshot")),
    };
    seen.send(passed).is_ok()
}

fn why(snapshot: &VMSnapshot) -> String {
    let status = snapshot.status.as_ref();
    let ready = status.and_then(|status| conditions::find(&status.conditions, conditions::types::READY));
    ready.map_or_else(|| "no reason given".to_owned(), |ready| format!("{}: {}", ready.reason, ready.message))
}

/// A client for a kubeconfig.
pub async fn client(kubeconfig: &Path) -> Result<Client> {
    let config = Kubeconfig::read_from(kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}
