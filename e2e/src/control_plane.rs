//! One real control plane on loopback: etcd, kube-apiserver and, where asked for, kube-controller-manager.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use kube::config::{KubeConfigOptions, Kubeconfig};

use crate::certificates::Certificates;
use crate::tool::run_command;
use crate::{Cache, Invocation, Process, await_condition, free_port};

/// From exec to `readyz`; some 6 s on two idle cores.
const READY: Duration = Duration::from_secs(90);

/// Whether Kubernetes' own controllers run. Without them nothing collects garbage, finishes the deletion of a namespace or
/// makes default service accounts; a test that needs none of these starts faster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Controllers {
    /// etcd and the API server alone.
    None,
    /// kube-controller-manager too.
    Manager,
}

/// A control plane with TLS, RBAC and service accounts. All of it ends on drop.
#[derive(Debug)]
pub struct ControlPlane {
    // In the order in which they must end: the API server waits for etcd when it goes.
    controller_manager: Option<Process>,
    apiserver: Option<Process>,
    _etcd: Process,
    apiserver_invocation: Invocation,
    certificates: Certificates,
    directory: PathBuf,
    server: String,
    kubeconfig: PathBuf,
    kubectl: PathBuf,
}

impl ControlPlane {
    /// Starts one with its data, certificates and logs in `directory`, and waits until it is ready.
    pub async fn start(directory: &Path, controllers: Controllers) -> Result<Self> {
        let cache = Cache::locate()?;
        std::fs::create_dir_all(directory)?;
        let directory = directory.canonicalize()?;
        let certificates = Certificates::create(&directory)?;
        let (port, etcd_port) = (free_port()?, free_port()?);
        let server = format!("https://127.0.0.1:{port}");
        let kubeconfig = certificates.client("admin", "admin", &["system:masters"], &server)?;
        std::fs::write(directory.join("audit.yaml"), AUDIT_POLICY)?;
        let etcd = Process::spawn("etcd", &etcd(&cache, &directory, etcd_port)?, &directory)?;
        let mut plane = Self {
            controller_manager: None,
            apiserver: None,
            _etcd: etcd,
            apiserver_invocation: apiserver(&cache, &directory, port, etcd_port)?,
            certificates,
            server,
            kubeconfig,
            kubectl: cache.binary("kubectl")?,
            directory,
        };
        plane.start_apiserver().await?;
        if controllers == Controllers::Manager {
            plane.start_controller_manager(&cache)?;
        }
        Ok(plane)
    }

    /// The administrator's kubeconfig.
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// A kubeconfig of somebody else, for what may and may not be done; `name` is also the file's.
    pub fn kubeconfig_of(&self, name: &str, user: &str, groups: &[&str]) -> Result<PathBuf> {
        self.certificates.client(name, user, groups, &self.server)
    }

    /// A client with the administrator's rights.
    pub async fn client(&self) -> Result<kube::Client> {
        client_of(&self.kubeconfig).await
    }

    /// Where certificates, logs and `audit.log` are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The API goes away, at once.
    pub fn stop_apiserver(&mut self) -> Result<()> {
        let mut apiserver = self.apiserver.take().context("the API server does not run")?;
        apiserver.kill_9()
    }

    /// The API comes (back), at the same address; waits until it is ready.
    pub async fn start_apiserver(&mut self) -> Result<()> {
        let mut apiserver = Process::spawn("apiserver", &self.apiserver_invocation, &self.directory)?;
        let client = self.client().await?;
        await_condition("the API server to be ready", READY, async || {
            apiserver.ensure_running()?;
            let request = http::Request::get("/readyz").body(Vec::new())?;
            Ok((client.request_text(request).await? == "ok").then_some(()))
        })
        .await?;
        self.apiserver = Some(apiserver);
        Ok(())
    }

    /// Runs kubectl as administrator and returns what it printed.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        run_command(Command::new(&self.kubectl).arg("--kubeconfig").arg(&self.kubeconfig).args(arguments))
    }

    fn start_controller_manager(&mut self, cache: &Cache) -> Result<()> {
        let user = "system:kube-controller-manager";
        let kubeconfig = self.certificates.client("kcm", user, &[], &self.server)?.display().to_string();
        let invocation = Invocation::new(cache.binary("kube-controller-manager")?)
            .directory(&self.directory)
            .args(["--leader-elect=false", "--use-service-account-credentials", "--bind-address=127.0.0.1"])
            .args(["--service-account-private-key-file=sa.key", "--root-ca-file=ca.crt"])
            .args(["--cluster-signing-cert-file=ca.crt", "--cluster-signing-key-file=ca.key"])
            .args(["", "authentication-", "authorization-"].map(|kind| format!("--{kind}kubeconfig={kubeconfig}")))
            .args([format!("--secure-port={}", free_port()?)]);
        self.controller_manager = Some(Process::spawn("kcm", &invocation, &self.directory)?);
        Ok(())
    }
}

/// A client for any kubeconfig.
pub(crate) async fn client_of(kubeconfig: &Path) -> Result<kube::Client> {
    let config = Kubeconfig::read_from(kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
    Ok(kube::Client::try_from(config)?)
}

/// Who wrote what, without bodies: tests count API writes with it.
const AUDIT_POLICY: &str = "\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules: [{level: Metadata}]
";

fn etcd(cache: &Cache, directory: &Path, port: u16) -> Result<Invocation> {
    let clients = format!("http://127.0.0.1:{port}");
    let peers = format!("http://127.0.0.1:{}", free_port()?);
    Ok(Invocation::new(cache.binary("etcd")?)
        .directory(directory)
        .args(["--name=one", "--data-dir=etcd", "--unsafe-no-fsync", "--log-level=warn"])
        .args(["listen-client-urls", "advertise-client-urls"].map(|flag| format!("--{flag}={clients}")))
        .args(["listen-peer-urls", "initial-advertise-peer-urls"].map(|flag| format!("--{flag}={peers}")))
        .args([format!("--initial-cluster=one={peers}")]))
}

fn apiserver(cache: &Cache, directory: &Path, port: u16, etcd_port: u16) -> Result<Invocation> {
    Ok(Invocation::new(cache.binary("kube-apiserver")?)
        .directory(directory)
        .args([format!("--etcd-servers=http://127.0.0.1:{etcd_port}"), format!("--secure-port={port}")])
        .args(["--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", "--service-cluster-ip-range=10.0.0.0/24"])
        .args(["--tls-cert-file=apiserver.crt", "--tls-private-key-file=apiserver.key", "--client-ca-file=ca.crt"])
        .args(["--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file=sa.pub"])
        .args(["--service-account-signing-key-file=sa.key", "--authorization-mode=Node,RBAC"])
        .args(["--enable-admission-plugins=NodeRestriction", "--anonymous-auth=false", "--allow-privileged=true"])
        .args(["--endpoint-reconciler-type=none", "--profiling=false"])
        .args(["--audit-policy-file=audit.yaml", "--audit-log-path=audit.log"]))
}
