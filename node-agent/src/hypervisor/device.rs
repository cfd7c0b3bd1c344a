//! Block devices that QEMU has as disks, and the logical volumes among them.
//!
//! QEMU tells us a path, and QEMU is not trusted: the path must be beneath `/dev`, lead to a block device, and the
//! QEMU process must have this very device open, so that it can't name a device that it was never given.

use std::fs::{File, metadata, read_dir, read_to_string};
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use freezeframe_qemu::{BlockGraph, Node};
use serde::{Deserialize, Serialize};

use super::image::ImageError;
use crate::drivers::lvm::volume::Volume;

/// Deepest stack of hidden devices below a volume that is looked through.
const MOST_DEPTH: usize = 3;
/// Length of LVM's identifiers of groups and of volumes, without hyphens.
const IDENTIFIER: usize = 32;

/// A block device that is a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockDevice {
    /// The path that QEMU was given.
    pub path: PathBuf,
    /// The logical volume that it is; none if it is something else.
    pub volume: Option<LogicalVolume>,
}

/// What the kernel tells of a logical volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogicalVolume {
    /// Its name.
    pub volume: Volume,
    /// Whether its data is in a thin pool.
    pub thin: bool,
}

impl BlockDevice {
    /// The block device that is a disk's only image; else why there is none.
    pub fn of(top: &Node, graph: &BlockGraph, qemu_pid: i32) -> Result<Self, String> {
        if graph.chain(&top.name).len() > 1 {
            return Err(format!("image {} has backing files", top.file));
        }
        let path = Path::new(&top.file);
        let number = number_of(path)?;
        if qemu_pid > 0 && !holds(qemu_pid, number) {
            return Err(format!("QEMU doesn't have {} open", path.display()));
        }
        let system = format!("/sys/dev/block/{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
        Ok(Self { path: path.to_owned(), volume: logical_volume(Path::new(&system)) })
    }
}

/// The device number of the block device at a path beneath `/dev`.
pub fn number_of(path: &Path) -> Result<u64, String> {
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !plain || !path.starts_with("/dev") {
        return Err(format!("image {} is not a device beneath /dev", path.display()));
    }
    let found = metadata(path).map_err(|error| format!("{} can't be examined: {error}", path.display()))?;
    if !found.file_type().is_block_device() {
        return Err(format!("{} is not a block device", path.display()));
    }
    Ok(found.rdev())
}

/// A block device as the kernel made it, and how much was written to it since.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// This start of the host.
    boot: String,
    /// The kernel's number of the device: never given twice in one start of the host.
    sequence: u64,
    /// Sectors written, and discarded.
    written: [u64; 2],
}

/// Where `stat` in sysfs has them, see the kernel's `Documentation/block/stat.rst`. Not how many requests they were: a
/// flush counts as one, of no sectors.
const WRITTEN: [usize; 2] = [6, 13];

impl DeviceState {
    /// Looks at the device at a path, after what the host's cache has of it is written. Needs Linux 5.15.
    pub fn of(path: &Path) -> Result<Self, ImageError> {
        sync(path)?;
        let number = number_of(path).map_err(std::io::Error::other);
        let number = number.map_err(|source| ImageError::Io { doing: "examine", path: path.to_owned(), source })?;
        let system = format!("/sys/dev/block/{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
        let read = |file: &str| {
            let io = |source| ImageError::Io { doing: "read", path: file.into(), source };
            read_to_string(file).map_err(io)
        };
        let (sequence, written) = (read(&format!("{system}/diskseq"))?, read(&format!("{system}/stat"))?);
        let parsed = sequence.trim().parse().ok().zip(parse_written(&written));
        let strange =
            || ImageError::Io { doing: "understand", path: system.into(), source: ErrorKind::InvalidData.into() };
        let (sequence, written) = parsed.ok_or_else(strange)?;
        Ok(Self { boot: read("/proc/sys/kernel/random/boot_id")?.trim().to_owned(), sequence, written })
    }
}

fn parse_written(stat: &str) -> Option<[u64; 2]> {
    let numbers: Vec<u64> = stat.split_whitespace().map(|number| number.parse().ok()).collect::<Option<_>>()?;
    let mut written = [0; 2];
    for (into, at) in written.iter_mut().zip(WRITTEN) {
        *into = *numbers.get(at)?;
    }
    Some(written)
}

/// Writes out what the host's cache has of a device, and the device's own cache.
pub fn sync(path: &Path) -> Result<(), ImageError> {
    let io = |source| ImageError::Io { doing: "flush", path: path.to_owned(), source };
    File::open(path).and_then(|device| device.sync_data()).map_err(io)
}

fn holds(pid: i32, number: u64) -> bool {
    let Ok(descriptors) = read_dir(format!("/proc/{pid}/fd")) else { return false };
    let is_it = |path: PathBuf| metadata(path).is_ok_and(|m| m.file_type().is_block_device() && m.rdev() == number);
    descriptors.flatten().any(|descriptor| is_it(descriptor.path()))
}

/// Reads a device-mapper device's directory in sysfs; none if it isn't a logical volume that one can see.
fn logical_volume(system: &Path) -> Option<LogicalVolume> {
    let identifier = identifier(system)?;
    // Hidden devices have a suffix behind the two identifiers.
    if identifier.len() != 2 * IDENTIFIER {
        return None;
    }
    let volume = Volume::of_device_name(read_to_string(system.join("dm/name")).ok()?.trim())?;
    Some(LogicalVolume { volume, thin: is_above_pool(system, &identifier, MOST_DEPTH) })
}

fn identifier(system: &Path) -> Option<String> {
    let text = read_to_string(system.join("dm/uuid")).ok()?;
    text.trim().strip_prefix("LVM-").filter(|rest| rest.len() >= 2 * IDENTIFIER).map(str::to_owned)
}

/// Whether there is a thin pool of the same group below, with nothing but the volume's own hidden devices between.
fn is_above_pool(system: &Path, volume: &str, depth: usize) -> bool {
    let Ok(below) = read_dir(system.join("slaves")) else { return false };
    below.flatten().any(|below| {
        let below = below.path();
        let Some(found) = identifier(&below) else { return false };
        let is_pool = found[..IDENTIFIER] == volume[..IDENTIFIER] && found.ends_with("-tpool");
        is_pool || (depth > 0 && found.starts_with(volume) && is_above_pool(&below, volume, depth - 1))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device in a tree that looks like sysfs.
    fn device(root: &Path, name: &str, uuid: &str, below: &[&str]) -> PathBuf {
        let path = root.join(name);
        std::fs::create_dir_all(path.join("dm")).unwrap();
        std::fs::create_dir_all(path.join("slaves")).unwrap();
        std::fs::write(path.join("dm/name"), format!("{name}\n")).unwrap();
        std::fs::write(path.join("dm/uuid"), format!("{uuid}\n")).unwrap();
        for below in below {
            std::os::unix::fs::symlink(root.join(below), path.join("slaves").join(below)).unwrap();
        }
        path
    }

    fn uuid(volume: char, suffix: &str) -> String {
        format!("LVM-{}{}{suffix}", "g".repeat(IDENTIFIER), volume.to_string().repeat(IDENTIFIER))
    }

    #[test]
    fn a_devices_writes_and_discards_are_read_from_its_numbers() {
        let stat = "  100 1 200 3   40 5 60 7   0 9 10   110 12 130 14   15 16\n";
        assert_eq!(parse_written(stat), Some([60, 130]));
        assert_eq!(parse_written("1 2 3"), None);
        assert_eq!(parse_written(&stat.replace("60", "x")), None);
    }

    #[test]
    fn a_volume_above_a_pool_is_thin_and_one_above_a_disk_is_not() {
        let root = tempfile::tempdir().unwrap();
        device(root.path(), "vg0-pool-tpool", &uuid('p', "-tpool"), &[]);
        let thin = device(root.path(), "vg0-a", &uuid('a', ""), &["vg0-pool-tpool"]);
        let thick = device(root.path(), "vg0-b", &uuid('b', ""), &[]);
        assert!(logical_volume(&thin).unwrap().thin);
        assert!(!logical_volume(&thick).unwrap().thin);
    }

    #[test]
    fn the_origin_of_a_thick_snapshot_is_seen_through() {
        let root = tempfile::tempdir().unwrap();
        device(root.path(), "vg0-pool-tpool", &uuid('p', "-tpool"), &[]);
        device(root.path(), "vg0-a-real", &uuid('a', "-real"), &["vg0-pool-tpool"]);
        let origin = device(root.path(), "vg0-a", &uuid('a', ""), &["vg0-a-real"]);
        assert!(logical_volume(&origin).unwrap().thin);
    }

    #[test]
    fn a_thick_volume_of_a_group_on_a_thin_volume_is_thick() {
        let root = tempfile::tempdir().unwrap();
        let inner = format!("LVM-{}{}", "h".repeat(IDENTIFIER), "c".repeat(IDENTIFIER));
        device(root.path(), "vg0-pool-tpool", &uuid('p', "-tpool"), &[]);
        device(root.path(), "vg0-a", &uuid('a', ""), &["vg0-pool-tpool"]);
        let thick = device(root.path(), "vg1-c", &inner, &["vg0-a"]);
        assert!(!logical_volume(&thick).unwrap().thin);
    }

    #[test]
    fn hidden_devices_and_other_mappings_are_no_volumes() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(logical_volume(&device(root.path(), "vg0-a-real", &uuid('a', "-real"), &[])), None);
        assert_eq!(logical_volume(&device(root.path(), "crypt", "CRYPT-LUKS2-x", &[])), None);
    }

    #[test]
    fn only_block_devices_beneath_dev_are_devices() {
        for path in ["/dev/null", "/dev/../etc/passwd", "/etc/passwd", "nbd://host/x", "/dev"] {
            assert!(number_of(Path::new(path)).is_err(), "{path}");
        }
    }
}
