//! `lvm2`'s own commands: arguments that are built from checked names, a fixed environment, no shell.

use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::process::Command;

use super::parameters::Size;
use super::report::{self, Row};
use super::tags::{OURS, REPLACED, tag};
use super::volume::Volume;
use crate::drivers::{DriverError, Result};

/// Bound of a command that only reads, and of one outside the window. LVM waits for other commands' locks that long.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Neither old metadata kept nor events of pools listened to: both are the node's to configure, and cost time in the
/// window. What the window does is on disk all the same: LVM commits its metadata before the command ends.
const IN_WINDOW: &str = "backup/backup=0 backup/archive=0 activation/monitoring=0";

/// All volumes of a group, hidden ones not.
pub async fn volumes(group: &str) -> Result<Vec<Row>> {
    list(&["lvs"], group).await
}

/// The same for who only watches: no lock is waited for, nor has a command in a window to wait for ours. What is being
/// changed just then is told as it was, or the report fails.
pub async fn volumes_unlocked(group: &str) -> Result<Vec<Row>> {
    list(&["lvs", "--nolocking"], group).await
}

async fn list(command: &[&str], group: &str) -> Result<Vec<Row>> {
    let printed = run(command.iter().copied().chain(report::FORMAT).chain([group])).await?;
    report::parse(&printed).map_err(|error| failed(format!("a report that can't be read: {error}")))
}

/// The volume of that name, if there is one.
pub async fn find(volume: &Volume) -> Result<Option<Row>> {
    Ok(volumes(volume.group()).await?.into_iter().find(|row| row.lv_name == volume.name()))
}

/// Makes a snapshot's device appear, now and after each start of the node, unless `row` shows that it does already.
pub async fn activate(volume: &Volume, row: &Row) -> Result<()> {
    let name = volume.to_string();
    if row.skips_activation() {
        run(["lvchange", "--quiet", "--setactivationskip", "n", &name]).await?;
    }
    if !row.is_active() {
        run(["lvchange", "--quiet", "--activate", "y", &name]).await?;
    }
    Ok(())
}

/// Removes a volume with its contents.
pub async fn remove(volume: &Volume) -> Result<()> {
    run(["lvremove", "--quiet", "--force", &volume.to_string()]).await.map(drop)
}

/// Makes a writable thin volume of a thin snapshot: it shares the snapshot's blocks, and outlives it.
pub async fn clone(snapshot: &Volume, made: &Volume, id: &str) -> Result<()> {
    run(clone_arguments(snapshot, made, id).iter().map(String::as_str)).await.map(drop)
}

/// Makes a volume of a size in bytes, whose content is whatever lies there.
pub async fn create(made: &Volume, size: u64, id: &str) -> Result<()> {
    let (size, tag) = (format!("{size}b"), tag(id));
    let fixed = ["lvcreate", "--quiet", "--yes", "--wipesignatures", "n", "--zero", "n", "--size", &size];
    run(fixed.into_iter().chain(["--addtag", OURS, "--addtag", &tag, "--name", made.name(), made.group()]))
        .await
        .map(drop)
}

/// Gives a volume another name, which must be free.
pub async fn rename(volume: &Volume, new: &Volume) -> Result<()> {
    run(["lvrename", "--quiet", volume.group(), volume.name(), new.name()]).await.map(drop)
}

/// Marks a volume as holding a snapshot's data.
pub async fn claim(volume: &Volume, id: &str) -> Result<()> {
    run(["lvchange", "--quiet", "--addtag", &tag(id), &volume.to_string()]).await.map(drop)
}

/// Takes that mark away.
pub async fn disclaim(volume: &Volume, id: &str) -> Result<()> {
    run(["lvchange", "--quiet", "--deltag", &tag(id), &volume.to_string()]).await.map(drop)
}

/// Marks a replaced volume to be removed with the last snapshot that needs it.
pub async fn put_away(volume: &Volume) -> Result<()> {
    run(["lvchange", "--quiet", "--addtag", REPLACED, &volume.to_string()]).await.map(drop)
}

fn clone_arguments(snapshot: &Volume, made: &Volume, id: &str) -> Vec<String> {
    let fixed = ["lvcreate", "--quiet", "--snapshot", "--permission", "rw", "--setactivationskip", "n"];
    let tags = ["--addtag", OURS, "--addtag", &tag(id)].map(str::to_owned);
    let names = ["--name", made.name(), &snapshot.to_string()].map(str::to_owned);
    [fixed.map(str::to_owned).as_slice(), &tags, &names].concat()
}

/// How the space for a snapshot is had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// From the origin's pool, as it is needed. With a size LVM would make a thick snapshot of a thin volume.
    Pool,
    /// Set apart now.
    Apart(Size),
}

/// Arguments of the command that makes a snapshot, read-only and not yet active.
#[must_use]
pub fn snapshot_arguments(origin: &Volume, snapshot: &Volume, id: &str, space: Space) -> Vec<String> {
    let fixed = ["lvcreate", "--quiet", "--config", IN_WINDOW, "--snapshot", "--permission", "r"].map(str::to_owned);
    let space = match space {
        Space::Pool => ["--setactivationskip".to_owned(), "y".to_owned()],
        Space::Apart(size) => size.arguments(),
    };
    let tags = ["--addtag", OURS, "--addtag", &tag(id)].map(str::to_owned);
    let names = ["--name", snapshot.name(), &origin.to_string()].map(str::to_owned);
    [fixed.as_slice(), &space, &tags, &names].concat()
}

/// Runs `lvm` in the calling thread, to its end whatever that takes: one that is killed in the middle may leave a
/// volume suspended.
pub fn run_here(arguments: &[String]) -> Result<()> {
    let mut command = std::process::Command::new("lvm");
    command.args(arguments).env_clear().envs(ENVIRONMENT).stdin(Stdio::null());
    succeeded(command.output()).map(drop)
}

const ENVIRONMENT: [(&str, &str); 3] =
    [("LC_ALL", "C"), ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), ("LVM_SUPPRESS_FD_WARNINGS", "1")];

async fn run<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Result<Vec<u8>> {
    let mut command = Command::new("lvm");
    command.args(arguments).env_clear().envs(ENVIRONMENT).stdin(Stdio::null());
    match tokio::time::timeout(TIMEOUT, command.output()).await {
        Ok(ended) => succeeded(ended),
        Err(_) => Err(failed(format!("no end after {TIMEOUT:?}"))),
    }
}

fn succeeded(ended: std::io::Result<Output>) -> Result<Vec<u8>> {
    match ended {
        Ok(output) if output.status.success() => Ok(output.stdout),
        Ok(output) => Err(failed(String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; "))),
        Err(error) => Err(failed(error.to_string())),
    }
}

fn failed(output: String) -> DriverError {
    DriverError::Tool { tool: "lvm", output }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thin_snapshot_is_made_without_a_size_and_a_thick_one_with_it() {
        let (origin, snapshot) = (Volume::new("vg0", "a").unwrap(), Volume::new("vg0", "a-vmsnap-1").unwrap());
        let line = |space| snapshot_arguments(&origin, &snapshot, "1", space).join(" ");
        let thin = line(Space::Pool);
        assert!(!thin.contains("--size") && !thin.contains("--extents"), "{thin}");
        assert!(thin.ends_with("--addtag freezeframe --addtag freezeframe-1 --name a-vmsnap-1 vg0/a"), "{thin}");
        assert!(line(Space::Apart(Size::Percent(20))).contains(" --extents 20%ORIGIN "));
        assert!(line(Space::Apart(Size::Bytes(1 << 30))).contains(" --size 1073741824b "));
    }
}
