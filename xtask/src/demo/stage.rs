//! Everything that runs during the demo, and how it ends.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use freezeframe_api::v1alpha1::VMSnapshot;
use freezeframe_e2e::{Disk, Filesystem, Format, Guest, GuestConfig, Load, Programs, Site};
use kube::Api;
use tempfile::TempDir;

use super::cluster::Cluster;
use crate::progress::say;
use crate::watch;

/// Namespace and name that the examples speak of.
pub const NAMESPACE: &str = "shop";
pub const VM: &str = "db-1";
const SOON: Duration = Duration::from_secs(60);

/// All of it; absent before it is started and after it was taken.
pub struct Stage {
    // In the order in which they must end.
    pub programs: Option<Programs>,
    pub guest: Option<Guest>,
    cluster: Option<Cluster>,
    foreign: Option<PathBuf>,
    load: Load,
    directory: TempDir,
}

impl Stage {
    /// An empty one, for a cluster of its own or the one that `kubeconfig` leads to.
    pub fn new(kubeconfig: Option<&Path>, load: Load) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("freezeframe-demo-").tempdir()?;
        let foreign = kubeconfig.map(Path::to_owned);
        Ok(Self { programs: None, guest: None, cluster: None, foreign, load, directory })
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn images(&self) -> PathBuf {
        self.directory().join("images").join(NAMESPACE).join(VM)
    }

    pub fn guest(&self) -> Result<&Guest> {
        self.guest.as_ref().context("the guest does not run")
    }

    pub fn cluster(&mut self) -> Result<&mut Cluster> {
        self.cluster.as_mut().context("there is no cluster")
    }

    pub async fn snapshots(&mut self) -> Result<Api<VMSnapshot>> {
        let client = watch::client(self.cluster()?.kubeconfig()).await?;
        Ok(Api::namespaced(client, NAMESPACE))
    }

    pub async fn start_cluster(&mut self) -> Result<()> {
        self.cluster = Some(match &self.foreign {
            Some(kubeconfig) => Cluster::attach(kubeconfig)?,
            None => Cluster::build(self.directory.path()).await?,
        });
        Ok(())
    }

    /// Boots a guest with an ext4 and an XFS disk, both qcow2, under load.
    pub async fn boot_guest(&mut self) -> Result<()> {
        let load = match self.load {
            Load::Heavy => "a writer that syncs records to both, and two that fill its page cache",
            _ => "a writer that syncs records to both",
        };
        say(format_args!("booting a guest with two qcow2 disks (ext4, XFS) and {load}"));
        let images = self.images();
        std::fs::create_dir_all(&images)?;
        let private = self.directory().join("guest");
        let mut config = GuestConfig::new(NAMESPACE, VM, &self.vm_root(), &private);
        config.load = self.load;
        for (name, filesystem) in [("vda", Filesystem::Ext4), ("vdb", Filesystem::Xfs)] {
            let path = images.join(format!("{name}.qcow2"));
            config.disks.push(Disk::create(path, Format::Qcow2, filesystem, 512)?);
        }
        self.guest = Some(Guest::boot(config).await?);
        self.guest()?.await_records(50, SOON).await.map(drop)
    }

    pub async fn start_programs(&mut self) -> Result<()> {
        say("starting guard, node agent and operator");
        let directory = self.directory().join("node");
        std::fs::create_dir_all(&directory)?;
        let site = Site {
            node_name: "demo-node".into(),
            vm_root: self.vm_root(),
            image_roots: vec![self.directory().join("images")],
            directory,
            kubeconfig: self.cluster()?.kubeconfig().to_owned(),
        };
        self.programs = Some(Programs::start(&site).await?);
        Ok(())
    }

    /// Ends everything. A cluster that isn't ours first loses what was made in it, snapshots while they are still served.
    pub fn clear(mut self) -> Result<()> {
        let released = self.cluster.as_ref().map_or(Ok(()), Cluster::delete_snapshots);
        drop(self.programs.take());
        let cleared = self.cluster.as_mut().map_or(Ok(()), Cluster::clear);
        drop(self.guest.take());
        drop(self.cluster.take());
        released.and(cleared).and(self.directory.close().context("removing the demo's directory"))
    }

    /// The last that the programs said: for a run that failed.
    pub fn print_logs(&self) {
        let Some(programs) = &self.programs else { return };
        for (name, program) in
            [("agent", &programs.agent), ("operator", &programs.operator), ("guard", &programs.guard)]
        {
            let log = program.log().unwrap_or_else(|error| error.to_string());
            let lines: Vec<&str> = log.lines().collect();
            println!("--- the {name}'s last lines\n{}", lines[lines.len().saturating_sub(12)..].join("\n"));
        }
    }

    /// What `--keep` is for.
    pub fn print_what_to_try(&mut self) -> Result<()> {
        let logs = self.directory().join("node").display().to_string();
        let images = self.images().display().to_string();
        let cluster = self.cluster()?;
        say("all of it still runs. In another terminal, in this directory:");
        println!("  export KUBECONFIG={}", cluster.kubeconfig().display());
        println!("  alias kubectl={}", cluster.kubectl().display());
        println!("  kubectl get vmsnap,vmt,vmsnapc --namespace {NAMESPACE}");
        println!("  kubectl apply -f examples/vmsnapshot.yaml; kubectl get vmsnap --namespace {NAMESPACE} --watch");
        println!("  kubectl delete vmsnap --namespace {NAMESPACE} --all");
        println!("Logs are in {logs}, the VM's images in {images}.");
        println!("Ctrl-C ends and removes everything.");
        Ok(())
    }

    fn vm_root(&self) -> PathBuf {
        self.directory().join("vms")
    }
}
