//! What file system an image is on, as far as drivers care.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::image::ImageRoots;

const BTRFS_MAGIC: i64 = 0x9123_683e;
const XFS_MAGIC: i64 = 0x5846_5342;
/// Inode of every subvolume's root directory.
pub(super) const SUBVOLUME_INODE: u64 = 256;

/// The file system of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Filesystem {
    /// XFS; whether it was made with reflinks shows at the first clone.
    Xfs,
    /// btrfs, with the subvolume that the image is in.
    Btrfs {
        /// Root directory of the subvolume; none where it isn't beneath an image root.
        subvolume: Option<PathBuf>,
    },
    /// Another one, which can't share data between files.
    Other,
}

impl Filesystem {
    /// Looks at the file system of an image; none if it can't be examined.
    #[must_use]
    pub fn of(image: &Path, roots: &ImageRoots) -> Option<Self> {
        let found = rustix::fs::statfs(image).ok()?;
        match found.f_type {
            XFS_MAGIC => Some(Self::Xfs),
            BTRFS_MAGIC => {
                Some(Self::Btrfs { subvolume: subvolume_of(image).filter(|root| roots.directory(root).is_ok()) })
            }
            _ => Some(Self::Other),
        }
    }
}

/// The nearest directory above a file that is a subvolume's root.
fn subvolume_of(file: &Path) -> Option<PathBuf> {
    let is_root = |directory: &&Path| std::fs::symlink_metadata(directory).is_ok_and(|m| m.ino() == SUBVOLUME_INODE);
    file.ancestors().skip(1).find(is_root).map(Path::to_owned)
}

/// Space on a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// The file system.
    pub device: u64,
    /// Bytes that are free for us.
    pub free: u64,
    /// Its size, in bytes.
    pub total: u64,
}

impl Room {
    /// Looks at the file system of a directory; none if it can't be examined.
    #[must_use]
    pub fn of(directory: &Path) -> Option<Self> {
        let device = std::fs::metadata(directory).ok()?.dev();
        let found = rustix::fs::statvfs(directory).ok()?;
        let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
        Some(Self { device, free: bytes(found.f_bavail), total: bytes(found.f_blocks) })
    }

    /// Free space in whole percents of the size.
    #[must_use]
    pub fn free_percent(&self) -> u64 {
        u64::try_from(u128::from(self.free) * 100 / u128::from(self.total.max(1))).unwrap_or(100)
    }
}
