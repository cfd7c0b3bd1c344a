//! btrfs calls that must not go by a path: a read-only snapshot of a subvolume, which mustn't cost a process in the window
//! either, and the deletion of exactly that snapshot, whatever has its name since.
#![allow(unsafe_code, reason = "ioctls that no safe crate offers")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Getter, NoArg, Setter, ioctl, opcode};

use super::filesystem::SUBVOLUME_INODE;

/// `BTRFS_SUBVOL_RDONLY`.
const READ_ONLY: u64 = 1 << 1;
/// `BTRFS_SUBVOL_SPEC_BY_ID`.
const BY_ID: u64 = 1 << 4;
/// Longest name that the call takes, without its final zero.
const LONGEST_NAME: usize = 4039;

/// `struct btrfs_ioctl_vol_args_v2`, <linux/btrfs.h>.
#[repr(C)]
struct VolumeArguments {
    fd: i64,
    transid: u64,
    flags: u64,
    unused: [u64; 4],
    name: [u8; LONGEST_NAME + 1],
}

/// `struct btrfs_ioctl_get_subvol_info_args`, <linux/btrfs.h>; what we don't read is left out by size alone.
#[repr(C)]
struct SubvolumeInfo {
    id: u64,
    name: [u8; 256],
    places_and_flags: [u64; 4],
    uuid: [u8; 16],
    parent_uuid: [u8; 16],
    received_uuid: [u8; 16],
    transactions: [u64; 4],
    times: [u64; 8],
    reserved: [u64; 8],
}

/// A subvolume by what it is, not by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subvolume {
    /// Its number on the file system, which no other gets after it.
    pub id: u64,
    uuid: [u8; 16],
    parent_uuid: [u8; 16],
}

impl Subvolume {
    /// The subvolume whose root directory is open; none where it is another directory, or not on btrfs.
    pub fn of(directory: BorrowedFd<'_>) -> Result<Option<Self>, Errno> {
        const GET_SUBVOL_INFO: rustix::ioctl::Opcode = opcode::read::<SubvolumeInfo>(0x94, 60);
        if rustix::fs::fstat(directory)?.st_ino != SUBVOLUME_INODE {
            return Ok(None);
        }
        // SAFETY: the opcode is BTRFS_IOC_GET_SUBVOL_INFO, which fills this structure; any bytes are valid in it.
        match unsafe { ioctl(directory, Getter::<GET_SUBVOL_INFO, SubvolumeInfo>::new()) } {
            Ok(info) => Ok(Some(Self { id: info.id, uuid: info.uuid, parent_uuid: info.parent_uuid })),
            Err(Errno::NOTTY) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// The subvolume that is `name` in `directory`; none where nothing or something else is. No link is followed.
    pub fn named(directory: BorrowedFd<'_>, name: &str) -> Result<Option<Self>, Errno> {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
        match rustix::fs::openat(directory, name, flags, Mode::empty()) {
            Ok(found) => Self::of(OwnedFd::as_fd(&found)),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// Whether it was made as a snapshot of `origin`.
    #[must_use]
    pub fn is_snapshot_of(&self, origin: &Self) -> bool {
        self.parent_uuid == origin.uuid
    }

    /// Deletes it, wherever it lies on the file system of `directory`: a name could lead to another one by now.
    pub fn delete(&self, directory: BorrowedFd<'_>) -> Result<(), Errno> {
        const SNAP_DESTROY_V2: rustix::ioctl::Opcode = opcode::write::<VolumeArguments>(0x94, 63);
        let mut arguments =
            VolumeArguments { fd: 0, transid: 0, flags: BY_ID, unused: [0; 4], name: [0; LONGEST_NAME + 1] };
        // The kernel's structure has a union here.
        arguments.name[..8].copy_from_slice(&self.id.to_ne_bytes());
        // SAFETY: the opcode is BTRFS_IOC_SNAP_DESTROY_V2, whose argument is this structure; the kernel only reads it.
        unsafe { ioctl(directory, Setter::<SNAP_DESTROY_V2, VolumeArguments>::new(arguments)) }
    }
}

/// Commits the file system's transaction and has deleted subvolumes cleared away, which `syncfs` leaves to the next half
/// minute.
pub fn sync(directory: BorrowedFd<'_>) -> Result<(), Errno> {
    const SYNC: rustix::ioctl::Opcode = opcode::none(0x94, 8);
    // SAFETY: the opcode is BTRFS_IOC_SYNC, which takes no argument.
    unsafe { ioctl(directory, NoArg::<SYNC>::new()) }
}

/// Makes `name` in `directory` a read-only snapshot of `subvolume`: all its files at one instant, with everything
/// that was written to them before the call.
pub fn snapshot_read_only(subvolume: BorrowedFd<'_>, directory: BorrowedFd<'_>, name: &str) -> Result<(), Errno> {
    const SNAP_CREATE_V2: rustix::ioctl::Opcode = opcode::write::<VolumeArguments>(0x94, 23);
    if name.is_empty() || name.len() > LONGEST_NAME || name.contains('/') || name.contains('\0') {
        return Err(Errno::INVAL);
    }
    let mut arguments = VolumeArguments {
        fd: i64::from(subvolume.as_raw_fd()),
        transid: 0,
        flags: READ_ONLY,
        unused: [0; 4],
        name: [0; LONGEST_NAME + 1],
    };
    arguments.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the opcode is BTRFS_IOC_SNAP_CREATE_V2, whose argument is this structure; the kernel only reads it, and
    // the descriptor in it is borrowed for the time of the call.
    unsafe { ioctl(directory.as_fd(), Setter::<SNAP_CREATE_V2, VolumeArguments>::new(arguments)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_have_the_kernels_size() {
        assert_eq!(size_of::<VolumeArguments>(), 4096);
        assert_eq!(size_of::<SubvolumeInfo>(), 504);
    }

    #[test]
    fn a_name_that_is_a_path_is_refused() {
        let here = std::fs::File::open("/").unwrap();
        for name in ["", "a/b", "a\0b"] {
            assert_eq!(snapshot_read_only(here.as_fd(), here.as_fd(), name), Err(Errno::INVAL));
        }
    }
}
