//! What can go wrong with image files, and which of it means that there is none.

use std::path::PathBuf;

use rustix::io::Errno;

/// What can go wrong with an image file.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The path isn't absolute or has no file name.
    #[error("{0} is not the absolute path of a file")]
    NotAFilePath(PathBuf),
    /// The path is outside all roots.
    #[error("{0} is not beneath an image root of this node's agent")]
    OutsideRoots(PathBuf),
    /// A directory isn't there, and maybe its file system isn't either.
    #[error(
        "{missing} is gone, but nothing at all is in {above}: if a file system isn't mounted there, mount it; if what was \
         there is gone for good, make any file in {above}"
    )]
    MaybeUnmounted {
        /// The directory.
        missing: PathBuf,
        /// The lowest directory above it that is there.
        above: PathBuf,
    },
    /// A directory has nothing in it, and had images.
    #[error(
        "nothing at all is in {0}: if a file system isn't mounted there, mount it; if what was there is gone for good, \
         make any file in it"
    )]
    Empty(PathBuf),
    /// Not a regular file.
    #[error("{0} is not a regular file")]
    NotRegular(PathBuf),
    /// The operating system refused.
    #[error("failed to {doing} {path}")]
    Io {
        /// What we were doing.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// The operating system's answer.
        #[source]
        source: std::io::Error,
    },
}

impl ImageError {
    /// Whether the file system is full, or a quota is used up.
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        matches!(self, Self::Io { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded))
    }

    /// Whether the name leads to nothing that could be an image: it is gone, a link, a directory, a socket.
    #[must_use]
    pub fn is_no_image(&self) -> bool {
        const KINDS: [Errno; 5] = [Errno::NOENT, Errno::LOOP, Errno::ISDIR, Errno::NXIO, Errno::NODEV];
        match self {
            Self::NotRegular(_) => true,
            Self::Io { source, .. } => Errno::from_io_error(source).is_some_and(|errno| KINDS.contains(&errno)),
            Self::NotAFilePath(_) | Self::OutsideRoots(_) | Self::MaybeUnmounted { .. } | Self::Empty(_) => false,
        }
    }

    /// Whether the file isn't there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
    }

    /// Whether a directory isn't there, or something else has its name.
    #[must_use]
    pub fn is_no_directory(&self) -> bool {
        use std::io::ErrorKind::{NotADirectory, NotFound};
        matches!(self, Self::Io { source, .. } if matches!(source.kind(), NotADirectory | NotFound))
    }
}
