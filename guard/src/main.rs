//! The guard's process: arguments, logs, signals.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use freezeframe_guard::{Server, ServerError, StateDir, StateError, Timing};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Between two attempts to get the state directory from a former guard that is about to end.
const HANDOVER: Duration = Duration::from_millis(200);

/// Brings a guest back whatever happens to the node agent that froze or paused it.
#[derive(Debug, Parser)]
#[command(name = "freezeframe-guard", version)]
struct Args {
    /// Unix socket to listen at; created with mode 0600.
    #[arg(long, env = "FREEZEFRAME_GUARD_SOCKET")]
    socket: PathBuf,
    /// Directory of the records; it must outlive this process.
    #[arg(long, env = "FREEZEFRAME_GUARD_STATE_DIR")]
    state_dir: PathBuf,
    /// How log lines look. `RUST_LOG` filters them.
    #[arg(long, env = "FREEZEFRAME_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("start the runtime")]
    Runtime(#[source] std::io::Error),
    #[error("open the state directory")]
    State(#[from] StateError),
    #[error("serve")]
    Serve(#[from] ServerError),
}

fn main() -> ExitCode {
    let args = Args::parse();
    start_log(args.log_format);
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = &error as &dyn std::error::Error, "the guard ends");
            ExitCode::FAILURE
        }
    }
}

fn start_log(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    let colours = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
}

fn run(args: &Args) -> Result<(), Error> {
    let runtime = Runtime::new().map_err(Error::Runtime)?;
    let served = runtime.block_on(serve(args));
    // Not waiting for threads: one may be stuck in a file system for good, and the records are safe.
    runtime.shutdown_background();
    served
}

async fn serve(args: &Args) -> Result<(), Error> {
    let stopping = stop_on_signal().map_err(Error::Runtime)?;
    let Some(state) = open_state(&args.state_dir, &stopping).await? else { return Ok(()) };
    let server = Server::bind(&args.socket, state, Timing::default(), stopping)?;
    tracing::info!(socket = %args.socket.display(), "guarding");
    Ok(server.run().await?)
}

fn stop_on_signal() -> std::io::Result<watch::Receiver<bool>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (stop, stopping) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        tracing::info!("told to stop");
        stop.send_replace(true);
        // The sender lives on: a channel without one would be taken for one that never speaks.
        std::future::pending::<()>().await;
    });
    Ok(stopping)
}

/// Waits for a former guard to let go; `None` if told to stop meanwhile.
async fn open_state(path: &Path, stopping: &watch::Receiver<bool>) -> Result<Option<StateDir>, Error> {
    while !*stopping.borrow() {
        match StateDir::open(path) {
            Err(StateError::InUse { .. }) => tokio::time::sleep(HANDOVER).await,
            opened => return Ok(Some(opened?)),
        }
    }
    Ok(None)
}
