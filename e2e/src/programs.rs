//! The programs under test: operator, node agent and guard, as built, killed and stopped at will.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use crate::{Invocation, Process, admin, await_condition, free_port};

/// A program that ends on SIGTERM does so within this.
const TERMINATED: Duration = Duration::from_secs(30);
const READY: Duration = Duration::from_secs(30);

/// Where the programs of one node work.
#[derive(Clone, Debug)]
pub struct Site {
    /// Name of the node.
    pub node_name: String,
    /// Root of the directories with the VMs' sockets.
    pub vm_root: PathBuf,
    /// Where images may be touched.
    pub image_roots: Vec<PathBuf>,
    /// For state, logs and the guard's socket.
    pub directory: PathBuf,
    /// The agent's and the operator's way to the API.
    pub kubeconfig: PathBuf,
}

/// One program, running or not, that can be started again as it was.
#[derive(Debug)]
pub struct Program {
    name: &'static str,
    invocation: Invocation,
    directory: PathBuf,
    process: Process,
    metrics_port: Option<u16>,
}

/// All three of one node.
#[derive(Debug)]
pub struct Programs {
    /// `freezeframe-operator`.
    pub operator: Program,
    /// `freezeframe-agent`.
    pub agent: Program,
    /// `freezeframe-guard`.
    pub guard: Program,
}

impl Programs {
    /// Starts the guard, waits until it listens, then starts agent and operator and waits until they are ready.
    pub async fn start(site: &Site) -> Result<Self> {
        let mut guard = Program::guard(site)?;
        let socket = guard_socket(site);
        await_condition("the guard to listen", READY, async || {
            guard.process.ensure_running()?;
            Ok(socket.exists().then_some(()))
        })
        .await?;
        let (mut operator, mut agent) = (Program::operator(site)?, Program::agent(site)?);
        operator.await_ready().await?;
        agent.await_ready().await?;
        Ok(Self { operator, agent, guard })
    }
}

impl Program {
    /// Starts a guard.
    pub fn guard(site: &Site) -> Result<Self> {
        let invocation = Invocation::new(binary("freezeframe-guard")?)
            .args([Path::new("--socket"), &guard_socket(site)])
            .args([Path::new("--state-dir"), &made(site.directory.join("guard"))?]);
        Self::start("guard", invocation, site, None)
    }

    /// Starts a node agent.
    pub fn agent(site: &Site) -> Result<Self> {
        let port = free_port()?;
        let roots = site.image_roots.iter().flat_map(|root| [Path::new("--image-root"), root]);
        let invocation = Invocation::new(binary("freezeframe-agent")?)
            .args(["--node-name", &site.node_name, "--metrics-addr", &format!("127.0.0.1:{port}")])
            .args([Path::new("--vm-root"), &site.vm_root, Path::new("--guard-socket"), &guard_socket(site)])
            .args([Path::new("--state-dir"), &made(site.directory.join("agent"))?])
            // KVM may be there and yet boot nothing, as for the guests.
            .args(["--boot-accelerator", "tcg"])
            .args(roots)
            .env("KUBECONFIG", &site.kubeconfig);
        Self::start("agent", invocation, site, Some(port))
    }

    /// Starts an operator.
    pub fn operator(site: &Site) -> Result<Self> {
        let port = free_port()?;
        let invocation = Invocation::new(binary("freezeframe-operator")?)
            .args(["--metrics-addr", &format!("127.0.0.1:{port}")])
            .env("KUBECONFIG", &site.kubeconfig);
        Self::start("operator", invocation, site, Some(port))
    }

    fn start(name: &'static str, invocation: Invocation, site: &Site, metrics_port: Option<u16>) -> Result<Self> {
        let invocation = invocation.env("RUST_BACKTRACE", "1");
        let process = Process::spawn(name, &invocation, &site.directory)?;
        Ok(Self { name, invocation, directory: site.directory.clone(), process, metrics_port })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Waits until its readiness probe succeeds.
    pub async fn await_ready(&mut self) -> Result<()> {
        let port = self.metrics_port()?;
        await_condition(&format!("the {} to be ready", self.name), READY, async || {
            self.process.ensure_running()?;
            let (code, body) = admin::get(port, "/readyz").await?;
            ensure!(code == 200, "/readyz answers {code}: {body}");
            Ok(Some(()))
        })
        .await
    }

    /// Its metrics, in the Prometheus text format.
    pub async fn metrics(&self) -> Result<String> {
        let (code, body) = admin::get(self.metrics_port()?, "/metrics").await?;
        ensure!(code == 200, "/metrics answers {code}: {body}");
        Ok(body)
    }

    fn metrics_port(&self) -> Result<u16> {
        self.metrics_port.with_context(|| format!("the {} has no administrative port", self.name))
    }

    /// Everything it has printed, over all its lives.
    pub fn log(&self) -> Result<String> {
        self.process.log()
    }

    /// SIGKILL.
    pub fn kill_9(&mut self) -> Result<()> {
        self.process.kill_9()
    }

    /// SIGSTOP: it is there and does nothing.
    pub fn stop(&mut self) -> Result<()> {
        self.process.signal(Signal::STOP)
    }

    /// SIGCONT.
    pub fn cont(&mut self) -> Result<()> {
        self.process.signal(Signal::CONT)
    }

    /// SIGTERM; fails if it has not ended soon, or not with success.
    pub fn terminate(&mut self) -> Result<()> {
        let status = self.process.terminate(TERMINATED)?;
        ensure!(status.success(), "{} ended with {status} on SIGTERM", self.name);
        Ok(())
    }

    /// SIGTERM, and doesn't wait.
    pub fn ask_to_end(&mut self) -> Result<()> {
        self.process.signal(Signal::TERM)
    }

    /// Waits until it has ended by itself; fails if that was not with success.
    pub async fn await_success(&mut self) -> Result<()> {
        let what = format!("the {} to end", self.name);
        let status = await_condition(&what, TERMINATED, async || self.process.exit_status()).await?;
        ensure!(status.success(), "{} ended with {status}", self.name);
        Ok(())
    }

    /// Whether it runs; a stopped one does.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.process.exit_status()?.is_none())
    }

    /// Starts it as before; one that still runs is killed first.
    pub fn restart(&mut self) -> Result<()> {
        if self.is_running()? {
            self.kill_9()?;
        }
        self.process = Process::spawn(self.name, &self.invocation, &self.directory)?;
        Ok(())
    }

    /// Starts it with one more environment variable, for this life alone; one that still runs is killed first.
    pub fn restart_with(&mut self, variable: &str, value: impl AsRef<OsStr>) -> Result<()> {
        if self.is_running()? {
            self.kill_9()?;
        }
        let invocation = self.invocation.clone().env(variable, value);
        self.process = Process::spawn(self.name, &invocation, &self.directory)?;
        Ok(())
    }
}

fn guard_socket(site: &Site) -> PathBuf {
    site.directory.join("guard.sock")
}

fn made(directory: PathBuf) -> Result<PathBuf> {
    std::fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
    Ok(directory)
}

/// A binary of this workspace: beside the running executable, or one level up for a test's.
fn binary(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let found = own.ancestors().skip(1).take(2).map(|directory| directory.join(name)).find(|path| path.exists());
    found.with_context(|| format!("{name} is not built: run `cargo build --workspace --bins`"))
}
