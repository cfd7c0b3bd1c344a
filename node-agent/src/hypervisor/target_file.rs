//! `target.yaml` in a VM's directory: what its owner says of it, for when no QEMU can be asked.
//!
//! Whoever may write to the VM's directory wrote it, so it is read as hostile input: beneath the root, no symbolic
//! link, bounded, and no field that isn't known. What it names is opened only beneath the agent's image roots.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use serde::{Deserialize, Serialize};

use super::VmKey;

/// Its name in the VM's directory.
pub const FILE: &str = "target.yaml";
/// Bytes that it may have: 256 disks with long paths.
const MOST_BYTES: u64 = 256 << 10;
/// Disks that it may name, as many as a VMTarget lists.
const MOST_DISKS: usize = 256;

/// A disk that is known though no QEMU has it open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct KnownDisk {
    /// The `-device` id that the VM's command line gives it.
    pub name: String,
    /// Absolute path of its image, or of a block device.
    pub path: PathBuf,
    /// Format of the image, such as `qcow2`.
    pub format: String,
    /// Whether the guest can't write to it: such a disk is left out of snapshots. False if absent.
    #[serde(default)]
    pub read_only: bool,
}

/// How a guest is started that doesn't start from its disks alone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct BootWith {
    /// Kernel that QEMU loads itself: a file beneath an image root. The disks' boot loader if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk of the kernel: a file beneath an image root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Command line of the kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub append: Option<String>,
    /// Memory, in MiB; never more than the agent allows. What the agent allows if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u32>,
    /// QEMU's machine, such as `pc`; `q35` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
}

/// The file's content.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetFile {
    /// The VM's disks, all of them.
    #[serde(default)]
    pub disks: Vec<KnownDisk>,
    /// Labels for the VMTarget.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// How a copy of the VM is started to see whether it boots; from its disks alone if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootWith>,
}

/// Which state of the file was read: another one has another stamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

/// Why the file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TargetFileError {
    /// The operating system refused.
    #[error("failed to read {FILE} of VM {vm}")]
    Io {
        /// The VM.
        vm: VmKey,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// It isn't what it should be.
    #[error("{FILE} of VM {vm} can't be used: {why}")]
    Content {
        /// The VM.
        vm: VmKey,
        /// What is wrong with it.
        why: String,
    },
}

/// Reads a VM's file; none if it has none.
pub fn read(root: &Path, vm: &VmKey) -> Result<Option<(TargetFile, Stamp)>, TargetFileError> {
    let failed = |source: io::Error| TargetFileError::Io { vm: vm.clone(), source };
    let wrong = |why: String| TargetFileError::Content { vm: vm.clone(), why };
    let Some(file) = open(root, vm).map_err(failed)? else { return Ok(None) };
    let found = file.metadata().map_err(failed)?;
    if !found.is_file() || found.size() > MOST_BYTES {
        return Err(wrong(format!("it isn't a file of at most {MOST_BYTES} bytes")));
    }
    let mut text = String::new();
    file.take(MOST_BYTES).read_to_string(&mut text).map_err(failed)?;
    let content: TargetFile = serde_yaml::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    check(&content).map_err(wrong)?;
    let modified = (found.mtime(), found.mtime_nsec());
    Ok(Some((content, Stamp { inode: found.ino(), size: found.size(), modified })))
}

fn open(root: &Path, vm: &VmKey) -> io::Result<Option<File>> {
    let directory = match directory(root, vm) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        directory => directory?,
    };
    // Without NONBLOCK, opening a named pipe would wait for somebody to write to it.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    match rustix::fs::openat(directory, FILE, flags, Mode::empty()) {
        Err(rustix::io::Errno::NOENT) => Ok(None),
        opened => Ok(Some(opened?.into())),
    }
}

fn directory(root: &Path, vm: &VmKey) -> io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, root, flags, Mode::empty())?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    Ok(rustix::fs::openat2(root, Path::new(&vm.namespace).join(&vm.name), flags, Mode::empty(), resolve)?)
}

fn check(content: &TargetFile) -> Result<(), String> {
    if content.disks.len() > MOST_DISKS {
        return Err(format!("it names more than {MOST_DISKS} disks"));
    }
    let mut names = BTreeSet::new();
    for disk in &content.disks {
        let name = &disk.name;
        if !is_device_id(name) {
            return Err(format!("`{name}` can't be a device's id in QEMU"));
        }
        if !names.insert(name) {
            return Err(format!("it names disk `{name}` twice"));
        }
        if !disk.path.is_absolute() {
            return Err(format!("disk `{name}` has no absolute path"));
        }
    }
    Ok(())
}

/// How a copy of a VM is started to see whether it boots: as the VM's own file says.
#[must_use]
pub fn boot_with(root: &Path, vm: &VmKey) -> Option<BootWith> {
    match read(root, vm) {
        Ok(found) => found.and_then(|(file, _)| file.boot),
        Err(error) => {
            tracing::warn!(error = &error as &dyn std::error::Error, "how the VM starts isn't known");
            None
        }
    }
}

/// Whether QEMU takes it as the id of a device, and the API as the name of a disk.
#[must_use]
pub fn is_device_id(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    name.len() <= 63 && name.starts_with(|first: char| first.is_ascii_alphabetic()) && name.bytes().all(inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm() -> VmKey {
        VmKey { namespace: "shop".into(), name: "db-1".into() }
    }

    fn root() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("shop/db-1")).unwrap();
        root
    }

    fn said(text: &str) -> String {
        let root = root();
        std::fs::write(root.path().join("shop/db-1").join(FILE), text).unwrap();
        read(root.path(), &vm()).unwrap_err().to_string()
    }

    #[test]
    fn what_it_says_is_read_and_a_change_has_another_stamp() {
        let root = root();
        assert!(read(root.path(), &vm()).unwrap().is_none());
        let file = root.path().join("shop/db-1").join(FILE);
        let text = "disks:\n- {name: vda, path: /a.qcow2, format: qcow2}\n- {name: cd, path: /b, format: raw, readOnly: true}\n";
        std::fs::write(&file, format!("{text}labels: {{app: db}}\n")).unwrap();
        let (found, first) = read(root.path(), &vm()).unwrap().unwrap();
        let told: Vec<_> = found.disks.iter().map(|disk| (disk.name.as_str(), disk.read_only)).collect();
        assert_eq!((told, found.labels["app"].as_str()), (vec![("vda", false), ("cd", true)], "db"));
        std::fs::write(&file, "{\"disks\": []}").unwrap();
        let (found, second) = read(root.path(), &vm()).unwrap().unwrap();
        assert_eq!(found, TargetFile::default());
        assert_ne!(first, second);
    }

    #[test]
    fn what_would_surprise_is_refused_in_words() {
        assert!(said("disks: []\nowner: me\n").contains("owner"));
        assert!(said("disks: [{name: a, path: /x, format: raw, cache: none}]").contains("cache"));
        assert!(said("disks: [{name: a, path: x, format: raw}]").contains("no absolute path"));
        assert!(said("disks: [{name: 'a,b', path: /x, format: raw}]").contains("can't be a device's id"));
        let twice = "disks: [{name: a, path: /x, format: raw}, {name: a, path: /y, format: raw}]";
        assert!(said(twice).contains("twice"));
        assert!(said(&"#".repeat(300 << 10)).contains("at most"));
    }

    #[test]
    fn a_link_or_a_pipe_is_not_read() {
        for make in [
            |path: &Path| std::os::unix::fs::symlink("/etc/passwd", path).unwrap(),
            |path: &Path| rustix::fs::mknodat(CWD, path, rustix::fs::FileType::Fifo, Mode::RUSR, 0).unwrap(),
        ] {
            let root = root();
            make(&root.path().join("shop/db-1").join(FILE));
            assert!(read(root.path(), &vm()).is_err());
        }
        let root = root();
        std::os::unix::fs::symlink("db-1", root.path().join("shop/db-2")).unwrap();
        assert!(read(root.path(), &VmKey { namespace: "shop".into(), name: "db-2".into() }).is_err());
    }
}
