//! The cluster of the demo: one of our own, or the user's, which is left as it was found.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use freezeframe_e2e::{Cache, ControlPlane, Controllers};

use crate::progress::{capture, root, say};

/// What must not be there before: two installations would be in each other's way.
const TAKEN: &[&str] = &["crd/vmsnapshots.freezeframe.dev", "namespace/shop", "namespace/freezeframe-system"];

/// A way to an API server, by kubectl.
pub struct Cluster {
    kubectl: PathBuf,
    kubeconfig: PathBuf,
    /// Manifests applied, in their order; removed in reverse where the cluster isn't ours.
    applied: Vec<String>,
    own: Option<ControlPlane>,
}

impl Cluster {
    /// Starts etcd and an API server on loopback.
    pub async fn build(directory: &Path) -> Result<Self> {
        say("starting etcd and an API server on loopback");
        let plane = ControlPlane::start(&directory.join("control-plane"), Controllers::None).await?;
        let kubeconfig = plane.kubeconfig().to_owned();
        Ok(Self { kubectl: Cache::locate()?.binary("kubectl")?, kubeconfig, applied: vec![], own: Some(plane) })
    }

    /// Uses a cluster that is there.
    pub fn attach(kubeconfig: &Path) -> Result<Self> {
        let own_kubectl = Cache::locate()?.binary("kubectl").ok();
        let kubectl = own_kubectl.unwrap_or_else(|| "kubectl".into());
        let kubeconfig = kubeconfig.canonicalize().with_context(|| format!("looking for {}", kubeconfig.display()))?;
        let cluster = Self { kubectl, kubeconfig, applied: vec![], own: None };
        let mut get = vec!["get", "--ignore-not-found", "--output", "name"];
        get.extend(TAKEN);
        let there = cluster.ask(&get)?;
        ensure!(
            there.is_empty(),
            "the cluster has {} already; the demo would be in its way",
            there.replace('\n', " ").trim()
        );
        Ok(cluster)
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// kubectl's path.
    pub fn kubectl(&self) -> &Path {
        &self.kubectl
    }

    /// Runs kubectl and returns what it printed; arguments are split at spaces by the caller.
    pub fn ask(&self, arguments: &[&str]) -> Result<String> {
        capture(self.command().args(arguments))
    }

    /// Runs kubectl before the user's eyes; `line` has no quoted words.
    pub fn show(&self, line: &str) -> Result<String> {
        say(format_args!("$ kubectl {line}"));
        let printed = capture(self.command().args(line.split(' ')))?;
        for line in printed.lines() {
            println!("{}", format!("              {line}").trim_end());
        }
        Ok(printed)
    }

    /// Applies a manifest, given relative to the repository or absolute.
    pub fn apply(&mut self, manifest: &str) -> Result<()> {
        self.applied.push(manifest.to_owned());
        self.show(&format!("apply -f {manifest}")).map(drop)
    }

    /// Takes away what was applied. A cluster of our own goes as a whole.
    pub fn clear(&mut self) -> Result<()> {
        if self.own.take().is_some() {
            return Ok(());
        }
        let mut failed = vec![];
        for manifest in std::mem::take(&mut self.applied).iter().rev() {
            let delete = ["delete", "--ignore-not-found", "--wait", "--timeout=120s", "-f", manifest];
            failed.extend(self.ask(&delete).err().map(|error| format!("{error:#}")));
        }
        if failed.is_empty() { Ok(()) } else { bail!("left in the cluster: {}", failed.join("; ")) }
    }

    /// Deletes snapshots while operator and agent still serve their finalizers; if they don't, the finalizers go too.
    pub fn delete_snapshots(&self) -> Result<()> {
        if self.own.is_some() || self.applied.is_empty() {
            return Ok(());
        }
        let delete = "delete vmsnapshots.freezeframe.dev --all --namespace shop --wait --timeout=60s";
        let Err(error) = self.ask(&delete.split(' ').collect::<Vec<_>>()) else { return Ok(()) };
        say(format_args!("snapshots are not deleted, taking their finalizers away: {error:#}"));
        for kind in ["vmsnapshots", "vmsnapshotcontents"] {
            let named = self.ask(&["get", kind, "--all-namespaces", "--output", NAMES])?;
            for line in named.lines() {
                let (namespace, name) = line.split_once('/').unwrap_or(("", line));
                let patch = ["patch", kind, name, "--namespace", namespace, "--type=merge"];
                let no_finalizers = r#"{"metadata":{"finalizers":null}}"#;
                self.ask(&[&patch[..], &["--patch", no_finalizers]].concat())?;
            }
        }
        Ok(())
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.kubectl);
        command.arg("--kubeconfig").arg(&self.kubeconfig).current_dir(root());
        command
    }
}

const NAMES: &str = r#"jsonpath={range .items[*]}{.metadata.namespace}/{.metadata.name}{"\n"}{end}"#;
