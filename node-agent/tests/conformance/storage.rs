//! Real file systems in a directory of one test's own.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use freezeframe_e2e::{HostFilesystem, LoopMount};
use tempfile::TempDir;

/// Smallest that both `mkfs.xfs` and `mkfs.btrfs` take.
const SIZE_MIB: u64 = 320;
const IMAGE: &str = "fs.img";

/// What a disk's image lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Whatever the temporary directory is on: a file system that can't share data between files.
    Plain,
    /// XFS that can share data between files.
    Xfs,
    /// XFS that can't.
    OldXfs,
    /// The VM's directory is a subvolume of a btrfs.
    Btrfs,
}

/// A file system, mounted for as long as this lives.
pub struct Storage {
    // Unmounted before the directory is removed.
    _mount: Option<LoopMount>,
    directory: TempDir,
    mountpoint: PathBuf,
    kind: Kind,
}

impl Storage {
    pub fn new(kind: Kind) -> Self {
        Self::mounted_on("root", kind)
    }

    /// The VM's directory is a file system of its own.
    pub fn of_vm(kind: Kind) -> Self {
        Self::mounted_on("root/vm", kind)
    }

    fn mounted_on(mountpoint: &str, kind: Kind) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mountpoint = directory.path().join(mountpoint);
        std::fs::create_dir_all(&mountpoint).unwrap();
        let filesystem = match kind {
            Kind::Plain => None,
            Kind::Xfs => Some(HostFilesystem::Xfs),
            Kind::OldXfs => Some(HostFilesystem::OldXfs),
            Kind::Btrfs => Some(HostFilesystem::Btrfs),
        };
        let image = directory.path().join(IMAGE);
        let mount = filesystem.map(|filesystem| LoopMount::new(filesystem, &image, SIZE_MIB, &mountpoint).unwrap());
        let storage = Self { _mount: mount, directory, mountpoint, kind };
        match kind {
            _ if storage.mountpoint == storage.images() => {}
            Kind::Btrfs => drop(run("btrfs subvolume create", &[&storage.images()])),
            _ => std::fs::create_dir(storage.images()).unwrap(),
        }
        storage
    }

    /// The image of the file system.
    pub fn image(&self) -> PathBuf {
        self.directory.path().join(IMAGE)
    }

    /// The file system's root.
    pub fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    /// Where a VM's images are.
    pub fn images(&self) -> PathBuf {
        self.root().join("vm")
    }

    /// All files, by their paths, and all subvolumes, also those that are deleted and not yet gone.
    pub fn contents(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        list(&self.root(), &mut found);
        if self.kind == Kind::Btrfs {
            let all =
                ["btrfs subvolume list", "btrfs subvolume list -d"].map(|list| run(list, &[&self.mountpoint])).concat();
            found.extend(
                all.lines().filter_map(|line| line.split(" path ").nth(1)).map(|path| format!("subvolume {path}")),
            );
        }
        found
    }
}

fn list(directory: &Path, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            list(&entry.path(), found);
        } else {
            found.insert(entry.path().display().to_string());
        }
    }
}

/// Runs a command line with paths behind it, and returns what it printed.
pub fn run(command: &str, paths: &[&Path]) -> String {
    let mut words = command.split(' ');
    let program = words.next().unwrap();
    let output = Command::new(program).args(words).args(paths).output();
    let output = output.unwrap_or_else(|error| panic!("these tests need {program}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command} {paths:?} (needs root): {said}");
    String::from_utf8(output.stdout).unwrap()
}
