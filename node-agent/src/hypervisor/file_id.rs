//! A file by what it is, not by its name: names change hands at a cut.
//!
//! An inode's number is given to another file when the first is gone. The time at which a file was made is another then,
//! where its file system keeps it.

use std::hash::{Hash, Hasher};

use rustix::fs::{Statx, StatxFlags};
use serde::{Deserialize, Serialize};

/// A file by what it is.
///
/// A record keeps no file system: its number may be another after a reboot of the host, and a record's ids are only ever
/// looked for in the directory that the record names.
#[derive(Clone, Copy, Debug, Eq, Serialize, Deserialize)]
pub struct FileId {
    /// The file system; none in what was read from a record.
    #[serde(skip)]
    pub device: Option<u64>,
    /// The inode there.
    pub inode: u64,
    /// When it was made, in seconds and nanoseconds of the file system's clock; none where nobody knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    born: Option<(i64, u32)>,
}

impl FileId {
    /// What [`Self::of`] needs to be asked for.
    pub const NEEDS: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::BTIME);

    /// A file as the kernel describes it.
    #[must_use]
    pub fn of(found: &Statx) -> Self {
        let device = rustix::fs::makedev(found.stx_dev_major, found.stx_dev_minor);
        let knows_birth = StatxFlags::from_bits_retain(found.stx_mask).contains(StatxFlags::BTIME);
        let born = knows_birth.then_some((found.stx_btime.tv_sec, found.stx_btime.tv_nsec));
        Self { device: Some(device), inode: found.stx_ino, born }
    }

    /// A block device, by its number. It is on no file system.
    #[must_use]
    pub fn of_device(number: u64) -> Self {
        Self::new(u64::MAX, number)
    }

    /// A file on a file system of this boot.
    #[must_use]
    pub fn new(device: u64, inode: u64) -> Self {
        Self { device: Some(device), inode, born: None }
    }
}

/// What one of them doesn't know isn't compared.
impl PartialEq for FileId {
    fn eq(&self, other: &Self) -> bool {
        let same_device = self.device.zip(other.device).is_none_or(|(one, other)| one == other);
        let same_birth = self.born.zip(other.born).is_none_or(|(one, other)| one == other);
        same_device && same_birth && self.inode == other.inode
    }
}

impl Hash for FileId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.inode.hash(state);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rustix::fs::{AtFlags, CWD, statx};

    use super::*;

    fn id(path: &Path) -> FileId {
        FileId::of(&statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, FileId::NEEDS).unwrap())
    }

    #[test]
    fn a_file_is_itself_under_another_name_and_in_a_record() {
        let here = tempfile::tempdir().unwrap();
        let (a, b) = (here.path().join("a"), here.path().join("b"));
        std::fs::write(&a, "").unwrap();
        let found = id(&a);
        std::fs::rename(&a, &b).unwrap();
        std::fs::write(&b, "more").unwrap();
        let record = serde_json::to_string(&found).unwrap();
        assert_eq!((id(&b), id(&b)), (found, serde_json::from_str(&record).unwrap()));
    }

    #[test]
    fn another_file_with_the_number_of_one_that_is_gone_is_not_that_one() {
        let one = FileId { born: Some((7, 1)), ..FileId::new(1, 12) };
        assert_ne!(one, FileId { born: Some((7, 2)), ..one });
        assert_ne!(one, FileId { device: None, born: Some((8, 1)), ..one });
        // A record of before births were kept.
        assert_eq!(one, serde_json::from_str(r#"{"inode": 12}"#).unwrap());
        assert_eq!(one, FileId::new(1, 12));
    }
}
