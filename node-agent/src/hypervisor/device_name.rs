//! The one name by which everybody is to know a block device.
//!
//! QEMU's image locks belong to a device's node, so a second node elsewhere, of the same number, would know nothing of
//! them. And numbers, like the kernel's names, may be another device's after a restart of the host: the links that udev
//! makes last.

use std::fs::{read_dir, read_to_string};
use std::path::{Path, PathBuf};

use super::device::number_of;
use super::image::ImageRoots;

/// Where udev, or device-mapper, names devices by what they are.
const LASTING: [&str; 2] = ["/dev/mapper", "/dev/disk/by-id"];

/// A name of a device beneath `/dev` and an image root: one that lasts, if there is one; else the kernel's.
#[must_use]
pub fn name_of(number: u64, roots: &ImageRoots) -> Option<PathBuf> {
    let lasting = LASTING.into_iter().flat_map(|directory| sorted(Path::new(directory)));
    let mut names = lasting.chain(kernels(number));
    names.find(|path| roots.names(path) && number_of(path).is_ok_and(|found| found == number))
}

fn sorted(directory: &Path) -> Vec<PathBuf> {
    let entries = read_dir(directory).into_iter().flatten().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

fn kernels(number: u64) -> Option<PathBuf> {
    let system = format!("/sys/dev/block/{}:{}/uevent", rustix::fs::major(number), rustix::fs::minor(number));
    let said = read_to_string(system).ok()?;
    said.lines().find_map(|line| line.strip_prefix("DEVNAME=")).map(|name| Path::new("/dev").join(name))
}
