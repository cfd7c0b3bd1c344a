//! Booting from a snapshot's images: what a restored VM would find.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{GuestConfig, command_line};
use crate::{Cache, Disk, Format, Process, run};

/// Boot, journal replay and checking of every disk.
const VERIFIED: Duration = Duration::from_secs(180);

/// What the guest found on one disk after its kernel had replayed the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// `vda`, `vdb`, ...
    pub disk: String,
    /// Whole records in its log.
    pub records: u64,
    /// Bytes of a record that was cut in half.
    pub torn: u64,
    /// Records that say something other than they should.
    pub bad: u64,
    /// Whether the file system's own checker found nothing.
    pub clean: bool,
}

/// Boots a guest on `images` that mounts, counts and checks them and powers off. Blocks until then.
///
/// The images are not written: replay goes into overlays in `directory`.
pub fn verify_by_booting(images: &[Disk], directory: &Path) -> Result<Vec<Verified>> {
    std::fs::create_dir_all(directory)?;
    let mut config = GuestConfig::new("verify", "verify", directory, directory);
    config.disks = images.iter().enumerate().map(|(i, image)| overlay(image, directory, i)).collect::<Result<_>>()?;
    let invocation = command_line::build_verifying(&Cache::locate()?, &config)?;
    let mut qemu = Process::spawn("qemu", &invocation, directory)?;
    qemu.wait(VERIFIED)?;
    let console = std::fs::read(config.file("console.log")).context("reading the verifying guest's console")?;
    let console = String::from_utf8_lossy(&console);
    let lines = console.lines().filter_map(|line| line.trim().strip_prefix("guest: verify: "));
    let found: Vec<_> = lines.filter_map(parse).collect();
    anyhow::ensure!(found.len() == images.len(), "the verifying guest missed a disk:\n{console}");
    Ok(found)
}

fn overlay(image: &Disk, directory: &Path, index: usize) -> Result<Disk> {
    let path = directory.join(format!("verify-{index}.qcow2"));
    let backing = image.path.canonicalize()?;
    let options = ["create", "-q", "-f", "qcow2", "-F", image.format.name(), "-b"].map(Path::new);
    run("qemu-img", options.into_iter().chain([&*backing, &*path]))?;
    Ok(Disk::existing(path, Format::Qcow2))
}

fn parse(line: &str) -> Option<Verified> {
    let (disk, rest) = line.split_once(' ')?;
    let field = |name| rest.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let number = |name| field(name)?.parse().ok();
    Some(Verified {
        disk: disk.to_owned(),
        records: number("records")?,
        torn: number("torn")?,
        bad: number("bad")?,
        clean: field("fsck")? == "clean",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_console_is_understood() {
        let found = parse("vda records=12 torn=0 bad=3 filesystem=xfs fsck=dirty:1");
        assert_eq!(found, Some(Verified { disk: "vda".into(), records: 12, torn: 0, bad: 3, clean: false }));
        assert_eq!(parse("done"), None);
        assert_eq!(parse("vda filesystem=none"), None);
    }
}
