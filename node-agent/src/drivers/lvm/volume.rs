//! Names of logical volumes, as types: what is one of these is safe on a command line of LVM and in a path.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Longest name of a group or a volume.
const MOST_NAME: usize = 127;
/// Longest name that device-mapper takes, the suffix of a volume's hidden device included.
const MOST_DEVICE_NAME: usize = 127;
/// The longest of these suffixes that a snapshot can need.
const HIDDEN_SUFFIX: &str = "-real";
/// What LVM keeps for names of its own.
const RESERVED: [&str; 14] = [
    "_cdata", "_cmeta", "_corig", "_iorig", "_mimage", "_mlog", "_pmspare", "_rimage", "_rmeta", "_tdata", "_tmeta",
    "_vdata", "_vorigin", "_wcorig",
];

/// Why something isn't the name of a volume.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// A character that LVM doesn't allow, or none at all.
    #[error("`{0}` is not a name that LVM allows")]
    Malformed(String),
    /// LVM's own.
    #[error("`{0}` is a name that LVM keeps for itself")]
    Reserved(String),
    /// Too long.
    #[error("`{name}` is too long for LVM by {over} characters")]
    TooLong {
        /// The name.
        name: String,
        /// How many characters must go.
        over: usize,
    },
}

/// A logical volume of a volume group.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct Volume {
    group: String,
    name: String,
}

#[derive(Deserialize)]
struct Unchecked {
    group: String,
    name: String,
}

impl TryFrom<Unchecked> for Volume {
    type Error = NameError;

    fn try_from(names: Unchecked) -> Result<Self, NameError> {
        Self::new(&names.group, &names.name)
    }
}

impl Volume {
    /// Checks both names.
    pub fn new(group: &str, name: &str) -> Result<Self, NameError> {
        check(group)?;
        check(name)?;
        let reserved = name.starts_with("snapshot") || name.starts_with("pvmove");
        if reserved || RESERVED.iter().any(|part| name.contains(part)) {
            return Err(NameError::Reserved(name.to_owned()));
        }
        let volume = Self { group: group.to_owned(), name: name.to_owned() };
        let length = volume.device_name().len() + HIDDEN_SUFFIX.len();
        match length.checked_sub(MOST_DEVICE_NAME) {
            None | Some(0) => Ok(volume),
            Some(over) => Err(NameError::TooLong { name: volume.to_string(), over }),
        }
    }

    /// Reads the name that device-mapper has for it: the two names with a hyphen between, their own hyphens doubled.
    #[must_use]
    pub fn of_device_name(device: &str) -> Option<Self> {
        let bytes = device.as_bytes();
        let is_hyphen = |at: usize| bytes.get(at) == Some(&b'-');
        let mut at = 0;
        while at < bytes.len() {
            match (is_hyphen(at), is_hyphen(at + 1)) {
                (true, true) => at += 2,
                (true, false) => {
                    let (group, name) = (device.get(..at)?, device.get(at + 1..)?);
                    // A hyphen that stands alone in the rest is the suffix of a hidden device.
                    let name = name.replace("--", "\0");
                    if name.contains('-') {
                        return None;
                    }
                    return Self::new(&group.replace("--", "-"), &name.replace('\0', "-")).ok();
                }
                _ => at += 1,
            }
        }
        None
    }

    /// The volume whose device is at `/dev/<group>/<name>`.
    pub fn of_path(device: &Path) -> Result<Self, NameError> {
        let text = device.to_str().unwrap_or_default();
        match text.strip_prefix("/dev/").and_then(|names| names.split_once('/')) {
            Some((group, name)) => Self::new(group, name),
            None => Err(NameError::Malformed(text.to_owned())),
        }
    }

    /// The volume that the snapshot `id` of this one is.
    pub fn snapshot(&self, id: &str) -> Result<Self, NameError> {
        Self::new(&self.group, &format!("{}-vmsnap-{id}", self.name))
    }

    /// The volume group.
    #[must_use]
    pub fn group(&self) -> &str {
        &self.group
    }

    /// Its name in the group.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its device.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/{}/{}", self.group, self.name))
    }

    /// Whether a path names the volume, and not the device that it is for now.
    #[must_use]
    pub fn is_named_by(&self, device: &Path) -> bool {
        device == self.path() || device == Path::new("/dev/mapper").join(self.device_name())
    }

    fn device_name(&self) -> String {
        format!("{}-{}", self.group.replace('-', "--"), self.name.replace('-', "--"))
    }
}

/// As LVM's commands want it.
impl std::fmt::Display for Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.group, self.name)
    }
}

fn check(name: &str) -> Result<(), NameError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "+_.-".contains(c);
    if name.is_empty() || name.starts_with('-') || [".", ".."].contains(&name) || !name.chars().all(allowed) {
        return Err(NameError::Malformed(name.to_owned()));
    }
    match name.len().checked_sub(MOST_NAME) {
        None | Some(0) => Ok(()),
        Some(over) => Err(NameError::TooLong { name: name.to_owned(), over }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(group: &str, name: &str) -> Volume {
        Volume::new(group, name).unwrap()
    }

    #[test]
    fn a_name_that_could_be_an_option_or_a_path_is_refused() {
        for name in ["", "-f", "a/b", "..", ".", "a b", "a\n", "a;b", "$(x)", "ä"] {
            assert!(Volume::new("vg0", name).is_err(), "{name:?}");
            assert!(Volume::new(name, "a").is_err(), "{name:?}");
        }
    }

    #[test]
    fn names_that_lvm_keeps_for_itself_are_refused() {
        for name in ["snapshot1", "pvmove0", "pool_tdata", "a_mlog"] {
            assert_eq!(Volume::new("vg0", name), Err(NameError::Reserved(name.into())));
        }
    }

    #[test]
    fn a_device_name_is_split_where_its_hyphen_stands_alone() {
        assert_eq!(Volume::of_device_name("vg0-a"), Some(volume("vg0", "a")));
        assert_eq!(Volume::of_device_name("my--vg-a--b--c"), Some(volume("my-vg", "a-b-c")));
        assert_eq!(Volume::of_device_name("a---b"), Some(volume("a-", "b")), "no name begins with a hyphen");
        for other in ["vg0", "", "-", "vg0-", "vg0-a-real", "vg0-pool-tpool", "vg0-pool_tdata"] {
            assert_eq!(Volume::of_device_name(other), None, "{other}");
        }
    }

    #[test]
    fn a_volume_is_named_by_its_names_and_not_by_its_number() {
        let volume = volume("my-vg", "a");
        for (path, is) in [("/dev/my-vg/a", true), ("/dev/mapper/my--vg-a", true), ("/dev/dm-3", false)] {
            assert_eq!(volume.is_named_by(Path::new(path)), is, "{path}");
        }
    }

    #[test]
    fn a_snapshots_name_holds_its_origins_and_its_id() {
        let snapshot = volume("vg0", "disk-a").snapshot("0a1b2c3d4e5f").unwrap();
        assert_eq!(snapshot.to_string(), "vg0/disk-a-vmsnap-0a1b2c3d4e5f");
        assert_eq!(snapshot.path(), PathBuf::from("/dev/vg0/disk-a-vmsnap-0a1b2c3d4e5f"));
    }

    #[test]
    fn a_snapshot_whose_name_would_be_too_long_says_by_how_much() {
        let long = volume("vg0", &"x".repeat(105));
        let over = |error| matches!(error, NameError::TooLong { over: 9, .. });
        assert!(long.snapshot("0a1b2c3d4e5f").is_err_and(over), "{:?}", long.snapshot("0a1b2c3d4e5f"));
    }

    #[test]
    fn a_record_with_a_bad_name_is_not_read() {
        let read = serde_json::from_str::<Volume>;
        assert!(read(r#"{"group": "vg0", "name": "a"}"#).is_ok());
        assert!(read(r#"{"group": "vg0", "name": "../a"}"#).is_err());
    }
}
