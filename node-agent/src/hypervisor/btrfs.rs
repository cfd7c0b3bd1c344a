//! The one btrfs call that must not cost a process in the window: a read-only snapshot of a subvolume.
#![allow(unsafe_code, reason = "an ioctl that no safe crate offers")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::io::Errno;
use rustix::ioctl::{Setter, ioctl, opcode};

/// `BTRFS_SUBVOL_RDONLY`.
const READ_ONLY: u64 = 1 << 1;
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
    }

    #[test]
    fn a_name_that_is_a_path_is_refused() {
        let here = std::fs::File::open("/").unwrap();
        for name in ["", "a/b", "a\0b"] {
            assert_eq!(snapshot_read_only(here.as_fd(), here.as_fd(), name), Err(Errno::INVAL));
        }
    }
}
