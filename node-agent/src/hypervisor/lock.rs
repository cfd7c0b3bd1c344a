//! Keeping every QEMU out of an image while its name changes hands.
//!
//! QEMU locks bytes of each image that it opens (open file description locks, `file.locking=auto`). A write lock on the
//! whole file conflicts with all of them: it can't be had while a QEMU has the image open, and no QEMU can open the
//! image while it is held. The kernel gives it up with the descriptor, so also when this process dies.

use std::os::fd::OwnedFd;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rustix::fs::{Mode, OFlags};

use super::image::{ImageDirectory, ImageError};

// The constants are integers, the structure's fields shorts.
#[allow(clippy::cast_possible_truncation, reason = "1 and 0")]
const WRITE: libc::c_short = libc::F_WRLCK as libc::c_short;
#[allow(clippy::cast_possible_truncation, reason = "1 and 0")]
const FROM_START: libc::c_short = libc::SEEK_SET as libc::c_short;

/// An image that no QEMU has open, or can open.
#[derive(Debug)]
pub struct ImageLock(#[expect(dead_code, reason = "held, never used")] OwnedFd);

impl ImageLock {
    /// Locks an image; none if another process has it open as QEMU does.
    pub fn take(directory: &ImageDirectory, name: &str) -> Result<Option<Self>, ImageError> {
        Self::of(directory.open(name, OFlags::RDWR)?, &directory.join(name))
    }

    /// The same for a block device, whose path was checked.
    pub fn take_device(path: &Path) -> Result<Option<Self>, ImageError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(device) => Self::of(device, path),
            Err(errno) => Err(ImageError::Io { doing: "open", path: path.to_owned(), source: errno.into() }),
        }
    }

    fn of(file: OwnedFd, path: &Path) -> Result<Option<Self>, ImageError> {
        let whole = libc::flock { l_type: WRITE, l_whence: FROM_START, l_start: 0, l_len: 0, l_pid: 0 };
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole)) {
            Ok(_) => Ok(Some(Self(file))),
            Err(Errno::EAGAIN | Errno::EACCES) => Ok(None),
            Err(errno) => Err(ImageError::Io { doing: "lock", path: path.to_owned(), source: errno.into() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::image::trusted_directory;

    #[test]
    fn a_locked_image_cannot_be_locked_again_until_it_is_let_go() {
        let here = tempfile::tempdir().unwrap();
        std::fs::write(here.path().join("disk"), "data").unwrap();
        let directory = trusted_directory(here.path()).unwrap();
        let held = ImageLock::take(&directory, "disk").unwrap();
        assert!(held.is_some());
        // Another descriptor of this process closes, which would end a lock of the process.
        drop(directory.open("disk", OFlags::RDONLY).unwrap());
        assert!(ImageLock::take(&directory, "disk").unwrap().is_none());
        drop(held);
        assert!(ImageLock::take(&directory, "disk").unwrap().is_some());
    }
}
