//! The witness: what images hold, seen from outside and without QEMU's help, before and after journal replay.
//!
//! Images are copied first and never written.

mod journal;
mod records;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

pub use records::Records;

use crate::disk::convert;
use crate::{Disk, Filesystem, run};

/// What was found on one image.
#[derive(Clone, Debug)]
pub struct DiskReport {
    /// Its file system.
    pub filesystem: Filesystem,
    /// What is there for one who does not replay the journal.
    pub before_replay: Records,
    /// What is there for one who does: a VM that boots from it.
    pub records: Records,
    /// The file system needs no recovery: it was frozen or unmounted when the image was cut.
    pub journal_empty: bool,
    /// The file system's checker finds nothing after replay, and for ext4 with an empty journal before it either.
    pub fs_clean: bool,
}

/// What was found on the images of one cut, in the order given.
#[derive(Clone, Debug)]
pub struct Report {
    /// One entry an image.
    pub disks: Vec<DiskReport>,
}

impl Report {
    /// Records on the first disk minus those on the second, after replay: 0 or 1 where both were cut at one instant.
    pub fn a_minus_b(&self) -> Result<i64> {
        let [a, b, ..] = self.disks.as_slice() else { anyhow::bail!("a cut of fewer than two disks") };
        Ok(i64::try_from(a.records.whole)? - i64::try_from(b.records.whole)?)
    }

    /// Fails unless the images of a guest with [`Load::Row`](crate::Load::Row) are all of one instant: each disk has as
    /// many records as the one before it or one less, and the last as many as the first or one less.
    pub fn ensure_row_of_one_instant(&self) -> Result<()> {
        let counts: Vec<_> = self.disks.iter().map(|disk| disk.records.whole).collect();
        let falls = counts.is_sorted_by(|before, after| before >= after);
        let [first, .., last] = counts.as_slice() else { anyhow::bail!("a cut of fewer than two disks") };
        ensure!(falls && first - last <= 1, "the disks are not of one instant: {counts:?}");
        self.ensure_one_instant()
    }

    /// Fails unless the images are at least crash-consistent and of one instant.
    pub fn ensure_one_instant(&self) -> Result<()> {
        for disk in &self.disks {
            ensure!(disk.fs_clean, "file system damaged: {disk:?}");
            ensure!(disk.records.torn == 0 && disk.records.bad == 0, "records damaged: {disk:?}");
        }
        let difference = self.a_minus_b()?;
        ensure!((0..=1).contains(&difference), "the disks are not of one instant: A - B = {difference}");
        Ok(())
    }

    /// Fails unless, besides, every file system was frozen: nothing is left to replay.
    pub fn ensure_frozen(&self) -> Result<()> {
        self.ensure_one_instant()?;
        for disk in &self.disks {
            ensure!(disk.journal_empty, "the journal needs replay: {disk:?}");
            ensure!(disk.before_replay == disk.records, "replay changed the records: {disk:?}");
        }
        Ok(())
    }
}

/// Looks at images; needs root for loop mounts. Blocks for some seconds.
pub fn check(images: &[Disk]) -> Result<Report> {
    let scratch = tempfile::Builder::new().prefix("witness").tempdir()?;
    let disks = images.iter().map(|image| check_one(image, &scratch)).collect::<Result<_>>()?;
    Ok(Report { disks })
}

fn check_one(image: &Disk, scratch: &TempDir) -> Result<DiskReport> {
    let raw = scratch.path().join("image.raw");
    convert(&image.path, image.format, &raw, crate::Format::Raw)?;
    let filesystem = detect(&raw).with_context(|| format!("looking at {}", image.path.display()))?;
    let journal_empty = journal::is_empty(&raw, filesystem)?;
    let clean_before = !(journal_empty && filesystem == Filesystem::Ext4) || journal::fsck_is_clean(&raw, filesystem)?;
    let (without_replay, with_replay) = match filesystem {
        Filesystem::Ext4 => ("ro,loop,noload", "loop"),
        Filesystem::Xfs => ("ro,loop,norecovery,nouuid", "loop,nouuid"),
    };
    let before_replay = mounted(&raw, without_replay, scratch.path(), Records::read)?;
    let records = mounted(&raw, with_replay, scratch.path(), Records::read)?;
    let fs_clean = clean_before && journal::fsck_is_clean(&raw, filesystem)?;
    std::fs::remove_file(raw)?;
    Ok(DiskReport { filesystem, before_replay, records, journal_empty, fs_clean })
}

fn detect(raw: &Path) -> Result<Filesystem> {
    use std::os::unix::fs::FileExt;
    let mut start = [0; 1082];
    std::fs::File::open(raw)?.read_exact_at(&mut start, 0)?;
    match start {
        [b'X', b'F', b'S', b'B', ..] => Ok(Filesystem::Xfs),
        [.., 0x53, 0xef] => Ok(Filesystem::Ext4),
        _ => anyhow::bail!("neither ext4 nor XFS"),
    }
}

/// Mounts `raw`, looks, and unmounts also when the look failed.
fn mounted<T>(raw: &Path, options: &str, scratch: &Path, look: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let mountpoint = scratch.join("mnt");
    std::fs::create_dir_all(&mountpoint)?;
    run("mount", ["-o".as_ref(), options.as_ref(), raw.as_os_str(), mountpoint.as_os_str()])?;
    let seen = look(&mountpoint);
    run("umount", [&mountpoint])?;
    seen
}
