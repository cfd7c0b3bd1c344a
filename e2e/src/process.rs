//! Child processes that end with their owner.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// A killed process needs no more than this to go, even on a busy machine.
const GONE: Duration = Duration::from_secs(10);

/// What to start: kept whole, so that the same thing can be started again.
#[derive(Clone, Debug)]
pub struct Invocation {
    program: PathBuf,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    directory: Option<PathBuf>,
}

impl Invocation {
    /// A program with no arguments yet.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self { program: program.into(), arguments: Vec::new(), environment: Vec::new(), directory: None }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn directory(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// Program and arguments, as one would type them.
    #[must_use]
    pub fn line(&self) -> Vec<OsString> {
        std::iter::once(self.program.clone().into_os_string()).chain(self.arguments.iter().cloned()).collect()
    }

    fn command(&self, log: &Path) -> Result<Command> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("opening {}", log.display()))?;
        // setpriv sets the parent-death signal and then becomes the program: the pid is the program's own.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).args(self.line());
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // Ctrl-C in a terminal is for the owner, which ends its programs in their order.
        command.process_group(0);
        Ok(command)
    }
}

/// A running program; killed and reaped on drop.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `invocation` with stdout and stderr appended to `<directory>/<name>.log`.
    pub fn spawn(name: &str, invocation: &Invocation, directory: &Path) -> Result<Self> {
        let log = directory.join(format!("{name}.log"));
        let child = spawn_on_lasting_thread(invocation.command(&log)?).with_context(|| format!("starting {name}"))?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed so far.
    pub fn log(&self) -> Result<String> {
        std::fs::read_to_string(&self.log).with_context(|| format!("reading {}", self.log.display()))
    }

    /// Sends a signal; one that has already ended is an error.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if let Some(status) = self.exit_status()? {
            bail!("{} has already ended: {status}", self.name);
        }
        kill_process(Pid::from_child(&self.child), signal)
            .with_context(|| format!("sending {signal:?} to {}", self.name))
    }

    /// SIGKILL, then reaped.
    pub fn kill_9(&mut self) -> Result<()> {
        self.signal(Signal::KILL)?;
        self.wait(GONE).map(drop)
    }

    /// SIGTERM, then waits at most `bound` for the end.
    pub fn terminate(&mut self, bound: Duration) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait(bound)
    }

    /// `None` while it runs.
    pub fn exit_status(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("asking after {}", self.name))
    }

    /// Waits at most `bound` for it to end by itself. Blocks the thread.
    pub fn wait(&mut self, bound: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.exit_status()? {
            return Ok(status);
        }
        // Not reaped yet, so the pid is still this child's.
        let descriptor = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty())?;
        let bound_spec = Timespec::try_from(bound).context("bound too long")?;
        poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&bound_spec))?;
        match self.exit_status()? {
            Some(status) => Ok(status),
            None => bail!("{} still runs after {bound:?}; it said: {}", self.name, self.last_words()),
        }
    }

    /// Fails, with the end of its log, if it has ended: for waits that would otherwise run into their bound.
    pub fn ensure_running(&mut self) -> Result<()> {
        match self.exit_status()? {
            None => Ok(()),
            Some(status) => bail!("{} ended: {status}; it said: {}", self.name, self.last_words()),
        }
    }

    fn last_words(&self) -> String {
        let log = self.log().unwrap_or_else(|error| error.to_string());
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(12)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself, and a drop has nobody to report to.
        let _ = self.kill_9();
    }
}

type SpawnRequest = (Command, Sender<std::io::Result<Child>>);

/// Spawns from a thread that lives as long as this process.
///
/// The parent-death signal is sent when the *thread* that forked ends. A test's thread ends with its test, and then a
/// control plane that several tests share would be gone.
fn spawn_on_lasting_thread(command: Command) -> Result<Child> {
    static SPAWNER: OnceLock<Sender<SpawnRequest>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (requests, inbox) = channel::<SpawnRequest>();
        std::thread::spawn(move || {
            for (mut command, answer) in inbox {
                // The asker waits for the answer, so it is there.
                let _ = answer.send(command.spawn());
            }
        });
        requests
    });
    let (answer, child) = channel();
    spawner.send((command, answer)).context("the spawning thread is gone")?;
    child.recv().context("the spawning thread is gone")?.context("spawn")
}
