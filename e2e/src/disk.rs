//! Disk images with a file system on them.

use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::run;

/// Image format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// qcow2.
    Qcow2,
    /// Raw.
    Raw,
}

impl Format {
    /// As QEMU spells it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// File system on a whole disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filesystem {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
}

/// An image that a guest gets as a disk.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The image.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
}

impl Disk {
    /// An image that is already there.
    pub fn existing(path: impl Into<PathBuf>, format: Format) -> Self {
        Self { path: path.into(), format }
    }

    /// An image that is already there, qcow2 if it begins as such. Only for images whose first bytes no guest wrote.
    pub fn detect(path: &Path) -> Result<Self> {
        let mut start = [0; 4];
        let file = std::fs::File::open(path).with_context(|| format!("opening {}", path.display()))?;
        file.read_exact_at(&mut start, 0).with_context(|| format!("reading {}", path.display()))?;
        Ok(Self::existing(path, if &start == b"QFI\xfb" { Format::Qcow2 } else { Format::Raw }))
    }

    /// Makes an image of `mib` MiB with an empty file system. XFS needs 300 MiB.
    pub fn create(path: impl Into<PathBuf>, format: Format, filesystem: Filesystem, mib: u64) -> Result<Self> {
        Self::make(path.into(), format, |raw| make_raw(raw, filesystem, mib, &[]))
    }

    /// Makes an image of `mib` MiB with an ext4 that has `random` MiB of random data in a file of its own.
    pub fn create_filled(path: impl Into<PathBuf>, format: Format, mib: u64, random: u64) -> Result<Self> {
        let content = tempfile::tempdir()?;
        let mut ballast = std::fs::File::create(content.path().join("ballast"))?;
        std::io::copy(&mut std::fs::File::open("/dev/urandom")?.take(random << 20), &mut ballast)?;
        let options = [Path::new("-d"), content.path()];
        Self::make(path.into(), format, |raw| make_raw(raw, Filesystem::Ext4, mib, &options))
    }

    fn make(path: PathBuf, format: Format, make_raw: impl Fn(&Path) -> Result<()>) -> Result<Self> {
        let disk = Self { path, format };
        match format {
            Format::Raw => make_raw(&disk.path)?,
            Format::Qcow2 => {
                let raw = disk.path.with_extension("making");
                make_raw(&raw)?;
                convert(&raw, Format::Raw, &disk.path, Format::Qcow2)?;
                std::fs::remove_file(raw)?;
            }
        }
        Ok(disk)
    }
}

/// Copies the contents of an image, backing files included; reads one that a running QEMU holds open, too.
pub(crate) fn convert(from: &Path, from_format: Format, to: &Path, to_format: Format) -> Result<()> {
    let formats = ["convert", "-U", "-f", from_format.name(), "-O", to_format.name()].map(Path::new);
    run("qemu-img", formats.into_iter().chain([from, to])).map(drop)
}

fn make_raw(path: &Path, filesystem: Filesystem, mib: u64, more: &[&Path]) -> Result<()> {
    std::fs::File::create(path)?.set_len(mib << 20)?;
    let (program, options) = match filesystem {
        Filesystem::Ext4 => ("mkfs.ext4", ["-q", "-F"]),
        Filesystem::Xfs => ("mkfs.xfs", ["-q", "-f"]),
    };
    run(program, options.map(Path::new).into_iter().chain(more.iter().copied()).chain([path])).map(drop)
}
