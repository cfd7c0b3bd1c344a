//! A file system of a test's own: an image, mounted through a loop device for as long as its owner lives. Needs root.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::run;

/// What a file system can do with what lies on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostFilesystem {
    /// XFS whose files can share data.
    Xfs,
    /// XFS whose files can't.
    OldXfs,
    /// btrfs.
    Btrfs,
}

impl HostFilesystem {
    fn mkfs(self) -> &'static [&'static str] {
        match self {
            Self::Xfs => &["mkfs.xfs", "-q", "-m", "reflink=1"],
            Self::OldXfs => &["mkfs.xfs", "-q", "-m", "reflink=0"],
            Self::Btrfs => &["mkfs.btrfs", "-q"],
        }
    }
}

/// A mounted file system; unmounted on drop, its loop device with it.
#[derive(Debug)]
pub struct LoopMount {
    mountpoint: PathBuf,
}

impl LoopMount {
    /// Makes a sparse image of `mib` MiB with an empty file system, and mounts it on `mountpoint`, which is made.
    pub fn new(filesystem: HostFilesystem, image: &Path, mib: u64, mountpoint: &Path) -> Result<Self> {
        std::fs::File::create(image)?.set_len(mib << 20)?;
        std::fs::create_dir_all(mountpoint)?;
        let (program, options) = filesystem.mkfs().split_at(1);
        run(program[0], options.iter().map(Path::new).chain([image]))?;
        run("mount", [Path::new("-o"), Path::new("loop"), image, mountpoint])?;
        Ok(Self { mountpoint: mountpoint.to_owned() })
    }

    fn unmounted(&self, command: &[&str]) -> bool {
        let output = Command::new("timeout").arg("20").args(command).arg(&self.mountpoint).output();
        output.is_ok_and(|output| output.status.success())
    }
}

impl Drop for LoopMount {
    fn drop(&mut self) {
        // A process that was just killed may hold the file system for a moment; a lazy unmount waits for it by itself.
        if !self.unmounted(&["umount"]) && !self.unmounted(&["umount", "-l"]) {
            eprintln!("{} is still mounted", self.mountpoint.display());
        }
    }
}
