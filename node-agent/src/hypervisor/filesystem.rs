//! What file system an image is on, as far as drivers care.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::image::ImageRoots;

const BTRFS_MAGIC: i64 = 0x9123_683e;
const XFS_MAGIC: i64 = 0x5846_5342;
/// Inode of every subvolume's root directory.
const SUBVOLUME_INODE: u64 = 256;

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
