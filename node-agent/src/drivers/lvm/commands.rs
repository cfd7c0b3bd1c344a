//! `lvm2`'s own commands: arguments that are built from checked names, a fixed environment, no shell, reports as JSON.

use std::process::{Output, Stdio};
use std::time::Duration;

use serde::Deserialize;
use tokio::process::Command;

use super::parameters::Size;
use super::volume::Volume;
use crate::drivers::{DriverError, Result};

/// Bound of a command that only reads, and of one outside the window. LVM waits for other commands' locks that long.
const TIMEOUT: Duration = Duration::from_secs(60);
/// What every volume of ours is tagged with.
const TAG: &str = "freezeframe";
/// What a volume is tagged with that a restore has replaced, and that thick snapshots still need: it goes with the last.
const REPLACED: &str = "freezeframe-replaced";
/// Of the ids that snapshots and restores mark volumes with, in characters.
const ID_LENGTH: usize = 12;
/// All that we read of a volume, its pool and its group.
const FIELDS: &str = "lv_name,lv_uuid,lv_attr,lv_size,lv_metadata_size,origin,origin_size,pool_lv,segtype,data_percent,\
                      metadata_percent,lv_tags,lv_health_status,vg_free,vg_extent_size,chunk_size";
/// Neither old metadata kept nor events of pools listened to: both are the node's to configure, and cost time in the
/// window. What the window does is on disk all the same: LVM commits its metadata before the command ends.
const IN_WINDOW: &str = "backup/backup=0 backup/archive=0 activation/monitoring=0";

/// One volume as LVM reports it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Row {
    /// Its name.
    pub lv_name: String,
    /// What it is, whatever it is called.
    pub lv_uuid: String,
    /// Ten flags, see lvs(8).
    pub lv_attr: String,
    /// Its size, in bytes; of a thick snapshot the size of the space for changes.
    #[serde(deserialize_with = "number")]
    pub lv_size: u64,
    /// Size of a pool's metadata, in bytes.
    #[serde(deserialize_with = "number")]
    pub lv_metadata_size: u64,
    /// Name of the volume that it is a snapshot of; empty if of none.
    pub origin: String,
    /// Size of that volume, in bytes, for a thick snapshot.
    #[serde(deserialize_with = "number")]
    pub origin_size: u64,
    /// Name of its thin pool; empty if it is thick.
    pub pool_lv: String,
    /// Its kind, such as `linear` or `thin`.
    pub segtype: String,
    /// How full it is, in percent; empty where that means nothing.
    pub data_percent: String,
    /// How full a pool's metadata is, in percent.
    pub metadata_percent: String,
    /// Its tags, with commas between.
    pub lv_tags: String,
    /// What is wrong with it; empty if nothing.
    pub lv_health_status: String,
    /// Free bytes in the volume group.
    #[serde(deserialize_with = "number")]
    pub vg_free: u64,
    /// What the group's volumes' sizes are multiples of, in bytes.
    #[serde(deserialize_with = "number")]
    pub vg_extent_size: u64,
    /// Bytes that a pool gives to a volume at once.
    #[serde(deserialize_with = "number")]
    pub chunk_size: u64,
}

impl Row {
    /// Whether it is the snapshot that we made under this id.
    #[must_use]
    pub fn is_ours(&self, id: &str) -> bool {
        let own = tag(id);
        self.lv_tags.split(',').any(|tag| tag == own)
    }

    /// Whether it is a volume that a restore put away because snapshots of ours need it.
    #[must_use]
    pub fn is_put_away(&self) -> bool {
        self.lv_tags.split(',').any(|tag| tag == REPLACED)
    }

    /// Whether it is a volume of its own, thick or thin, that nothing depends on or was made of.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        matches!(self.flag(0), '-' | 'V') && self.origin.is_empty()
    }

    /// Whether its user made it for copies of VMs of a namespace.
    #[must_use]
    pub fn is_target_of(&self, namespace: &str) -> bool {
        let wanted = target_tag(namespace);
        self.lv_tags.split(',').any(|tag| tag == wanted)
    }

    /// Whether a snapshot or a restore has marked it as its own.
    #[must_use]
    pub fn is_claimed(&self) -> bool {
        let ours = |tag: &str| tag.strip_prefix(TAG).and_then(|rest| rest.strip_prefix('-')).is_some_and(is_id);
        self.lv_tags.split(',').any(ours)
    }

    /// Whether it is a snapshot that is worth nothing without this volume.
    #[must_use]
    pub fn needs(&self, origin: &str) -> bool {
        self.is_thick_snapshot() && self.origin == origin
    }

    /// Size of what one reads from it, in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        if self.is_thick_snapshot() { self.origin_size } else { self.lv_size }
    }

    /// Whether it is a thick snapshot that lost its contents, because the space for changes was used up.
    #[must_use]
    pub fn is_overflowed(&self) -> bool {
        // Invalid, and invalid while suspended.
        matches!(self.flag(4), 'I' | 'S') || (self.is_thick_snapshot() && self.data_used() >= 100.0)
    }

    /// Whether a process has its device open, or a file system of it is mounted.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.flag(5) == 'o'
    }

    /// Percent of its data space that is in use.
    #[must_use]
    pub fn data_used(&self) -> f64 {
        self.data_percent.parse().unwrap_or(0.0)
    }

    /// Percent of its metadata space that is in use.
    #[must_use]
    pub fn metadata_used(&self) -> f64 {
        self.metadata_percent.parse().unwrap_or(0.0)
    }

    fn is_thick_snapshot(&self) -> bool {
        !self.origin.is_empty() && self.pool_lv.is_empty()
    }

    fn flag(&self, at: usize) -> char {
        self.lv_attr.chars().nth(at).unwrap_or('-')
    }
}

/// A number that is empty where it means nothing.
fn number<'de, D: serde::Deserializer<'de>>(from: D) -> std::result::Result<u64, D::Error> {
    let text = String::deserialize(from)?;
    if text.is_empty() { Ok(0) } else { text.parse().map_err(serde::de::Error::custom) }
}

#[derive(Deserialize)]
struct Report {
    report: Vec<Volumes>,
}

#[derive(Deserialize)]
struct Volumes {
    lv: Vec<Row>,
}

/// All volumes of a group, hidden ones not.
pub async fn volumes(group: &str) -> Result<Vec<Row>> {
    report(&["lvs"], group).await
}

/// The same for who only watches: no lock is waited for, nor has a command in a window to wait for ours. What is being
/// changed just then is told as it was, or the report fails.
pub async fn volumes_unlocked(group: &str) -> Result<Vec<Row>> {
    report(&["lvs", "--nolocking"], group).await
}

async fn report(command: &[&str], group: &str) -> Result<Vec<Row>> {
    let format = ["--reportformat", "json", "--units", "b", "--nosuffix", "--options", FIELDS];
    parse(&run(command.iter().copied().chain(format).chain([group])).await?)
}

/// The volume of that name, if there is one.
pub async fn find(volume: &Volume) -> Result<Option<Row>> {
    Ok(volumes(volume.group()).await?.into_iter().find(|row| row.lv_name == volume.name()))
}

/// Makes a snapshot's device appear, now and after each start of the node, unless `row` shows that it does already.
pub async fn activate(volume: &Volume, row: &Row) -> Result<()> {
    let name = volume.to_string();
    if row.flag(9) == 'k' {
        run(["lvchange", "--quiet", "--setactivationskip", "n", &name]).await?;
    }
    if row.flag(4) != 'a' {
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
    run(fixed.into_iter().chain(["--addtag", TAG, "--addtag", &tag, "--name", made.name(), made.group()]))
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

/// What its user tags a volume with that copies of a namespace's VMs may go to.
#[must_use]
pub fn target_tag(namespace: &str) -> String {
    format!("{TAG}-target-{namespace}")
}

fn is_id(text: &str) -> bool {
    text.len() == ID_LENGTH && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Marks a replaced volume to be removed with the last snapshot that needs it.
pub async fn put_away(volume: &Volume) -> Result<()> {
    run(["lvchange", "--quiet", "--addtag", REPLACED, &volume.to_string()]).await.map(drop)
}

fn clone_arguments(snapshot: &Volume, made: &Volume, id: &str) -> Vec<String> {
    let fixed = ["lvcreate", "--quiet", "--snapshot", "--permission", "rw", "--setactivationskip", "n"];
    let tags = ["--addtag", TAG, "--addtag", &tag(id)].map(str::to_owned);
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
    let tags = ["--addtag", TAG, "--addtag", &tag(id)].map(str::to_owned);
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

fn tag(id: &str) -> String {
    format!("{TAG}-{id}")
}

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

fn parse(report: &[u8]) -> Result<Vec<Row>> {
    let malformed = |error: serde_json::Error| failed(format!("a report that can't be read: {error}"));
    let report: Report = serde_json::from_slice(report).map_err(malformed)?;
    Ok(report.report.into_iter().flat_map(|volumes| volumes.lv).collect())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// As lvm2 2.03.16 prints it.
    const REPORT: &str = r#"{"report": [{"lv": [
        {"lv_name":"a", "lv_uuid":"uuid-a", "lv_attr":"Vwi-aotz--", "lv_size":"536870912", "lv_metadata_size":"", "origin":"",
         "origin_size":"", "pool_lv":"pool", "segtype":"thin", "data_percent":"6.25", "metadata_percent":"",
         "lv_tags":"", "lv_health_status":"", "vg_free":"3208642560", "vg_extent_size":"4194304", "chunk_size":"0"},
        {"lv_name":"pool", "lv_uuid":"uuid-p", "lv_attr":"twi-aotz--", "lv_size":"1073741824", "lv_metadata_size":"4194304", "origin":"",
         "origin_size":"", "pool_lv":"", "segtype":"thin-pool", "data_percent":"3.12", "metadata_percent":"11.04",
         "lv_tags":"", "lv_health_status":"", "vg_free":"3208642560", "vg_extent_size":"4194304", "chunk_size":"65536"},
        {"lv_name":"t-vmsnap-1", "lv_uuid":"uuid-t", "lv_attr":"sri-a-s---", "lv_size":"67108864", "lv_metadata_size":"", "origin":"t",
         "origin_size":"536870912", "pool_lv":"", "segtype":"linear", "data_percent":"0.01", "metadata_percent":"",
         "lv_tags":"freezeframe,freezeframe-1", "lv_health_status":"", "vg_free":"3208642560",
         "vg_extent_size":"4194304", "chunk_size":"4096"}]}]}"#;

    pub(crate) fn row(name: &str) -> Row {
        parse(REPORT.as_bytes()).unwrap().into_iter().find(|row| row.lv_name == name).unwrap()
    }

    #[test]
    fn a_report_is_read_with_its_empty_numbers() {
        let pool = row("pool");
        assert_eq!((pool.lv_size, pool.lv_metadata_size, pool.origin_size), (1 << 30, 4 << 20, 0));
        assert!((pool.metadata_used() - 11.04).abs() < f64::EPSILON);
        assert!(row("a").is_open() && !row("t-vmsnap-1").is_open());
    }

    #[test]
    fn what_is_no_report_is_an_error() {
        for text in ["", "{}", r#"{"report": [{"lv": [{"lv_name": "a"}]}]}"#] {
            assert!(parse(text.as_bytes()).is_err());
        }
    }

    #[test]
    fn only_the_snapshot_of_this_very_id_is_ours() {
        let snapshot = row("t-vmsnap-1");
        assert!(snapshot.is_ours("1"));
        assert!(!snapshot.is_ours("2") && !snapshot.is_ours("") && !row("a").is_ours("1"));
    }

    #[test]
    fn a_target_is_tagged_by_its_user_and_claimed_by_one_snapshot() {
        let mut volume = row("a");
        assert!(volume.is_plain() && !volume.is_target_of("shop") && !volume.is_claimed());
        volume.lv_tags = "backup,freezeframe-target-shop".into();
        assert!(volume.is_target_of("shop") && !volume.is_target_of("sho") && !volume.is_claimed());
        volume.lv_tags += ",freezeframe-0a1b2c3d4e5f";
        assert!(volume.is_claimed());
        assert!(!row("pool").is_plain() && !row("t-vmsnap-1").is_plain());
        assert!(!Row { lv_attr: "owi-a-s---".into(), ..volume }.is_plain(), "an origin");
    }

    #[test]
    fn a_full_or_invalid_thick_snapshot_has_overflowed() {
        let good = row("t-vmsnap-1");
        assert!(!good.is_overflowed());
        assert!(Row { lv_attr: "sri-I-s---".into(), ..good.clone() }.is_overflowed());
        assert!(Row { data_percent: "100.00".into(), ..good }.is_overflowed());
        assert!(!Row { data_percent: "100.00".into(), ..row("a") }.is_overflowed(), "a full thin volume is just full");
    }

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
