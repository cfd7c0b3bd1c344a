//! Real file systems in a directory of one test's own.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// Smallest that both `mkfs.xfs` and `mkfs.btrfs` take.
const SIZE: u64 = 320 << 20;

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
    directory: TempDir,
    kind: Kind,
}

impl Storage {
    pub fn new(kind: Kind) -> Self {
        let storage = Self { directory: tempfile::tempdir().unwrap(), kind };
        std::fs::create_dir(storage.root()).unwrap();
        match kind {
            Kind::Plain => {}
            Kind::Xfs => storage.mount("mkfs.xfs -q -m reflink=1"),
            Kind::OldXfs => storage.mount("mkfs.xfs -q -m reflink=0"),
            Kind::Btrfs => storage.mount("mkfs.btrfs -q"),
        }
        match kind {
            Kind::Btrfs => drop(run("btrfs subvolume create", &[&storage.images()])),
            _ => std::fs::create_dir(storage.images()).unwrap(),
        }
        storage
    }

    fn mount(&self, mkfs: &str) {
        let image = self.directory.path().join("fs.img");
        std::fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
        run(mkfs, &[&image]);
        run("mount -o loop", &[&image, &self.root()]);
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
            let all = run("btrfs subvolume list", &[&self.root()]) + &run("btrfs subvolume list -d", &[&self.root()]);
            found.extend(
                all.lines().filter_map(|line| line.split(" path ").nth(1)).map(|path| format!("subvolume {path}")),
            );
        }
        found
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        // A process that was just killed may hold the file system for a moment; a lazy unmount waits for it by itself.
        // Its loop device goes with it.
        if !matches!(self.kind, Kind::Plain) {
            let root = self.root();
            let unmounted = |arguments: &[&str]| {
                Command::new("timeout").arg("20").args(arguments).arg(&root).output().is_ok_and(|o| o.status.success())
            };
            if !unmounted(&["umount"]) && !unmounted(&["umount", "-l"]) {
                eprintln!("{} is still mounted", root.display());
            }
        }
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
