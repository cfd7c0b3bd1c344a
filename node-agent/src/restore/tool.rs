//! The runs of `qemu-img` that a restore needs: with progress, at the lowest priority, ended when they are dropped, and
//! when the agent dies.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::AsyncReadExt;
use tokio::process::Command;

/// Bound of a run that reads metadata only.
const METADATA_TIMEOUT: Duration = Duration::from_secs(120);
/// A copy that moves nothing for this long is stuck.
const NO_PROGRESS: Duration = Duration::from_secs(600);
/// Longest of what a tool says that is kept.
const LONGEST: usize = 2000;

/// A run of `qemu-img` that failed.
#[derive(Debug, thiserror::Error)]
#[error("qemu-img failed: {0}")]
pub struct ToolError(String);

#[derive(Deserialize)]
struct Measured {
    required: u64,
}

/// Bytes that a full copy of an image needs, in whichever format: qcow2's own estimate, which is never less than raw's.
pub async fn measure(image: &Path, format: &str) -> Result<u64, ToolError> {
    let mut command = Command::new("qemu-img");
    command.args(["measure", "--output=json", "-f", format, "-O", "qcow2"]).arg(image);
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = match tokio::time::timeout(METADATA_TIMEOUT, output).await {
        Ok(output) => output.map_err(|error| ToolError(error.to_string()))?,
        Err(_) => return Err(ToolError(format!("no end after {METADATA_TIMEOUT:?}"))),
    };
    if !output.status.success() {
        return Err(ToolError(said(&output.stderr)));
    }
    let measured: Result<Measured, _> = serde_json::from_slice(&output.stdout);
    measured.map(|measured| measured.required).map_err(|error| ToolError(error.to_string()))
}

/// Where a copy goes.
pub struct Target<'a> {
    /// The image.
    pub image: &'a Path,
    /// Its format.
    pub format: &'a str,
    /// Whether it is there already, of the source's size; else it is made.
    pub exists: bool,
}

/// Copies an image with all that it backs onto; `told` learns of each percent.
pub async fn convert(
    source: (&Path, &str),
    target: Target<'_>,
    told: &(dyn Fn(i32) + Send + Sync),
) -> Result<(), ToolError> {
    // The signal comes with the end of the *thread* that starts it: one of the runtime's, which live as long as the agent.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "ionice", "-c", "3", "nice", "-n", "19"]);
    command.args(["qemu-img", "convert", "-p", "-f", source.1, "-O", target.format]);
    command.args(target.exists.then_some("-n")).arg(source.0).arg(target.image);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| ToolError(error.to_string()))?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let errors = tokio::spawn(async move {
        let mut text = vec![];
        if let Some(stderr) = stderr {
            // Only words for a message: what can't be read isn't in it.
            let _ = stderr.take(LONGEST as u64).read_to_end(&mut text).await;
        }
        text
    });
    if let Some(mut stdout) = stdout {
        follow(&mut stdout, told).await?;
    }
    let status = tokio::time::timeout(METADATA_TIMEOUT, child.wait()).await;
    let status = status.map_err(|_| ToolError("it doesn't end".into()))?.map_err(|e| ToolError(e.to_string()))?;
    if status.success() {
        return Ok(());
    }
    Err(ToolError(said(&errors.await.unwrap_or_default())))
}

/// Reads progress until the tool closes its output.
async fn follow(
    stdout: &mut (impl tokio::io::AsyncRead + Unpin),
    told: &(dyn Fn(i32) + Send + Sync),
) -> Result<(), ToolError> {
    let (mut chunk, mut last) = ([0; 256], -1);
    loop {
        let read = tokio::time::timeout(NO_PROGRESS, stdout.read(&mut chunk)).await;
        let read = read.map_err(|_| ToolError(format!("no progress for {NO_PROGRESS:?}")))?;
        match read.map_err(|error| ToolError(error.to_string()))? {
            0 => return Ok(()),
            length => {
                if let Some(percent) = percent(&String::from_utf8_lossy(&chunk[..length])).filter(|now| *now != last) {
                    last = percent;
                    told(percent);
                }
            }
        }
    }
}

/// The last progress in what `qemu-img -p` printed, such as `    (12.34/100%)`.
fn percent(text: &str) -> Option<i32> {
    let (before, _) = text.rsplit_once("/100%)")?;
    let (_, number) = before.rsplit_once('(')?;
    number.split('.').next()?.trim().parse().ok()
}

fn said(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().chars().take(LONGEST).collect()
}

#[cfg(test)]
mod tests {
    use super::percent;

    #[test]
    fn progress_is_the_last_that_was_printed() {
        assert_eq!(percent("    (1.00/100%)\r    (12.34/100%)\r"), Some(12));
        assert_eq!(percent("    (100.00/100%)\r\n"), Some(100));
        assert_eq!(percent("    (1"), None);
    }
}
