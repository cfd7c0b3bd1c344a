//! Which file each node of a block graph really holds.
//!
//! QEMU reports names, and names change hands at a cut. What a node holds is certain in two cases: we handed the file
//! over as a descriptor (*pinned*), or nobody else holds the file that its name leads to now (*named*). A node whose
//! name leads to a file that a pinned node holds is *stale*: QEMU would reopen it by that name and destroy data, so it
//! must never become writable again.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use freezeframe_qemu::{BlockGraph, Node};
use freezeframe_qemu::{FdSet, Qmp, Result as QemuResult};
use rustix::fs::OFlags;
use serde_json::{Value, json};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use super::QMP_TIMEOUT;
use super::device::number_of;
use super::image::{FileId, ImageDirectory, ImageError, ImageRoots};

const OPAQUE_PREFIX: &str = "freezeframe:";
const FDSET_PREFIX: &str = "/dev/fdset/";
/// Sets below this number are left to the VM's owner.
const FIRST_FDSET: i64 = 7_000;

/// What is known of a node's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeFile {
    /// Held by descriptor: names don't matter to QEMU.
    Pinned {
        /// The file.
        id: FileId,
        /// The directory it was in when it was handed over; files don't move between directories.
        directory: PathBuf,
    },
    /// Held by a name that still leads to it.
    Named {
        /// The file.
        id: FileId,
        /// Its path.
        path: PathBuf,
    },
    /// A block device, by a name that nobody changes.
    Device {
        /// Which.
        id: FileId,
        /// Its path.
        path: PathBuf,
    },
    /// Held by a name that now leads to another file, or nowhere.
    Stale,
    /// Not a file that we may touch: another protocol, or outside the image roots.
    Foreign {
        /// Why, in words.
        why: String,
    },
}

impl NodeFile {
    /// The file, where it is certain.
    #[must_use]
    pub fn id(&self) -> Option<FileId> {
        match self {
            Self::Pinned { id, .. } | Self::Named { id, .. } | Self::Device { id, .. } => Some(*id),
            Self::Stale | Self::Foreign { .. } => None,
        }
    }

    /// Whether QEMU can switch the node to writable without opening another file by its name.
    #[must_use]
    pub fn may_become_writable(&self) -> bool {
        matches!(self, Self::Pinned { .. } | Self::Named { .. } | Self::Device { .. })
    }
}

/// Which file each node of a graph holds.
#[derive(Clone, Debug, Default)]
pub struct NodeFiles(HashMap<String, NodeFile>);

impl NodeFiles {
    /// The file of a format node, or of a protocol node itself.
    #[must_use]
    pub fn of(&self, node: &Node) -> Option<&NodeFile> {
        node.file_child.as_ref().and_then(|child| self.0.get(child)).or_else(|| self.0.get(&node.name))
    }
}

/// Reads which file each node holds, of the QEMU that is process `pid` (0: not visible from here).
///
/// All of it is QEMU's word, and QEMU is not trusted: a file that the process doesn't have open was never given to it,
/// and is foreign.
pub async fn node_files(qmp: &Qmp, graph: &BlockGraph, roots: &ImageRoots, pid: i32) -> QemuResult<NodeFiles> {
    let sets = qmp.query_fdsets(QMP_TIMEOUT).await?;
    let (directory, open) = (working_directory(pid), open_files(pid));
    let pinned = |node: &Node| pinned_file(node, &sets);
    let held: HashSet<FileId> = graph.nodes().filter_map(|node| pinned(node).and_then(|file| file.id())).collect();
    let resolve = |node: &Node| {
        let file = pinned(node).unwrap_or_else(|| named_file(node, roots, directory.as_deref(), &held));
        if_open(file, open.as_ref())
    };
    Ok(NodeFiles(graph.nodes().map(|node| (node.name.clone(), resolve(node))).collect()))
}

/// Whether QEMU opened the node's file by descriptor.
#[must_use]
pub fn is_by_descriptor(node: &Node) -> bool {
    node.file.starts_with(FDSET_PREFIX)
}

fn pinned_file(node: &Node, sets: &[FdSet]) -> Option<NodeFile> {
    let number: i64 = node.file.strip_prefix(FDSET_PREFIX)?.parse().ok()?;
    let set = sets.iter().find(|set| set.id == number)?;
    set.fds.iter().find_map(|fd| parse_opaque(fd.opaque.as_deref()?))
}

fn named_file(node: &Node, roots: &ImageRoots, qemu_directory: Option<&Path>, held: &HashSet<FileId>) -> NodeFile {
    let path = match qemu_directory {
        Some(directory) => directory.join(&node.file),
        None => PathBuf::from(&node.file),
    };
    if let Ok(number) = number_of(&path) {
        return NodeFile::Device { id: FileId::of_device(number), path };
    }
    let found = roots.directory_of(&path).and_then(|(directory, name)| directory.id(&name));
    match found {
        Ok(Some(id)) if !held.contains(&id) => NodeFile::Named { id, path },
        Ok(_) => NodeFile::Stale,
        Err(error) => NodeFile::Foreign { why: error.to_string() },
    }
}

fn opaque(id: FileId, directory: &Path) -> String {
    // QEMU's memory doesn't outlive this boot, so the file system's number may be in it.
    format!("{OPAQUE_PREFIX}{}:{}:{}", id.device.unwrap_or_default(), id.inode, directory.display())
}

fn parse_opaque(text: &str) -> Option<NodeFile> {
    let mut parts = text.strip_prefix(OPAQUE_PREFIX)?.splitn(3, ':');
    let id = FileId::new(parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    Some(NodeFile::Pinned { id, directory: parts.next()?.into() })
}

fn if_open(file: NodeFile, open: Option<&HashSet<FileId>>) -> NodeFile {
    match (file.id(), open) {
        (Some(id), Some(open)) if !open.contains(&id) => {
            NodeFile::Foreign { why: "QEMU names a file that it doesn't have open".into() }
        }
        _ => file,
    }
}

/// All files that a process has open; none if it isn't visible, or not ours to look at.
fn open_files(pid: i32) -> Option<HashSet<FileId>> {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).ok().filter(|_| pid > 0)?;
    let found = descriptors.flatten().filter_map(|descriptor| std::fs::metadata(descriptor.path()).ok());
    let id = |found: std::fs::Metadata| {
        let device = found.file_type().is_block_device();
        if device { FileId::of_device(found.rdev()) } else { FileId::new(found.dev(), found.ino()) }
    };
    Some(found.map(id).collect())
}

/// Working directory of the QEMU process, against which its relative names are meant; none if it isn't visible.
#[must_use]
fn working_directory(pid: i32) -> Option<PathBuf> {
    (pid > 0).then(|| std::fs::read_link(format!("/proc/{pid}/cwd")).ok()).flatten()
}

/// Why a file couldn't be handed to QEMU.
#[derive(Debug, thiserror::Error)]
pub enum HandOverError {
    /// The file couldn't be opened.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// QEMU refused it.
    #[error("failed to hand {path} to QEMU")]
    Qemu {
        /// The file.
        path: PathBuf,
        /// QEMU's answer.
        #[source]
        source: freezeframe_qemu::Error,
    },
}

/// Hands a file to QEMU as a set of two descriptors, read-write and read-only, and returns the name to open it by.
///
/// Two, because QEMU takes from the set the one whose access fits, each time it switches the node.
pub async fn hand_over(qmp: &Qmp, directory: &ImageDirectory, name: &str) -> Result<String, HandOverError> {
    let path = directory.join(name);
    let refused = |source| HandOverError::Qemu { path: path.clone(), source };
    let id = directory.id(name)?.ok_or_else(|| ImageError::NotRegular(path.clone()))?;
    let sets = qmp.query_fdsets(QMP_TIMEOUT).await.map_err(refused)?;
    let number = sets.iter().map(|set| set.id + 1).max().unwrap_or(0).max(FIRST_FDSET);
    add_both(qmp, directory, name, id, number).await?;
    Ok(format!("{FDSET_PREFIX}{number}"))
}

/// Hands a block device to QEMU, to be written, and returns the name to open it by. [`take_back`] knows it by `id`.
pub async fn hand_over_device(qmp: &Qmp, device: impl AsFd, id: FileId, path: &Path) -> Result<String, HandOverError> {
    let refused = |source| HandOverError::Qemu { path: path.to_owned(), source };
    let sets = qmp.query_fdsets(QMP_TIMEOUT).await.map_err(refused)?;
    let number = sets.iter().map(|set| set.id + 1).max().unwrap_or(0).max(FIRST_FDSET);
    let text = opaque(id, path.parent().unwrap_or(path));
    qmp.add_fd(number, &text, device.as_fd(), QMP_TIMEOUT).await.map_err(refused)?;
    Ok(format!("{FDSET_PREFIX}{number}"))
}

/// Gives QEMU fresh descriptors for a file that it holds by descriptor; whether it does.
///
/// QEMU's image locks belong to an open file description. A node that switches between read-write and read-only leaves
/// its locks behind on the one that it used before, which lives on in the set: the next switch would find the image
/// locked, by itself. Replaced, it is closed, and its locks go.
pub async fn renew(qmp: &Qmp, directory: &ImageDirectory, name: &str) -> Result<bool, HandOverError> {
    let path = directory.join(name);
    let refused = |source| HandOverError::Qemu { path: path.clone(), source };
    let id = directory.id(name)?.ok_or_else(|| ImageError::NotRegular(path.clone()))?;
    let sets = qmp.query_fdsets(QMP_TIMEOUT).await.map_err(refused)?;
    let holds = |set: &FdSet| set.fds.iter().any(|fd| file_of(fd.opaque.as_deref()) == Some(id));
    let held: Vec<_> = sets.into_iter().filter(holds).collect();
    for set in &held {
        add_both(qmp, directory, name, id, set.id).await?;
        for old in &set.fds {
            let old = json!({"fdset-id": set.id, "fd": old.fd});
            qmp.execute::<Value>("remove-fd", old, QMP_TIMEOUT).await.map_err(refused)?;
        }
    }
    Ok(!held.is_empty())
}

fn file_of(opaque: Option<&str>) -> Option<FileId> {
    parse_opaque(opaque?).and_then(|file| file.id())
}

async fn add_both(
    qmp: &Qmp,
    directory: &ImageDirectory,
    name: &str,
    id: FileId,
    number: i64,
) -> Result<(), HandOverError> {
    let text = opaque(id, directory.path());
    for access in [OFlags::RDWR, OFlags::RDONLY] {
        let file = directory.open(name, access)?;
        let refused = |source| HandOverError::Qemu { path: directory.join(name), source };
        qmp.add_fd(number, &text, file.as_fd(), QMP_TIMEOUT).await.map_err(refused)?;
    }
    Ok(())
}

/// Takes back every set that holds `id`; QEMU closes its descriptors when no node uses them any more.
pub async fn take_back(qmp: &Qmp, id: FileId) -> QemuResult<()> {
    for set in qmp.query_fdsets(QMP_TIMEOUT).await? {
        if set.fds.iter().any(|fd| file_of(fd.opaque.as_deref()) == Some(id)) {
            qmp.remove_fdset(set.id, QMP_TIMEOUT).await?;
        }
    }
    Ok(())
}

/// Takes back every set of ours that no node uses any more.
pub async fn take_back_unused(qmp: &Qmp, graph: &BlockGraph) -> QemuResult<()> {
    for set in qmp.query_fdsets(QMP_TIMEOUT).await? {
        let ours = set.fds.iter().any(|fd| fd.opaque.as_deref().and_then(parse_opaque).is_some());
        let name = format!("{FDSET_PREFIX}{}", set.id);
        if ours && graph.nodes().all(|node| node.file != name) {
            qmp.remove_fdset(set.id, QMP_TIMEOUT).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_opaque_string_is_read_back_whatever_the_directory_is_called() {
        let id = FileId::new(65024, 12);
        let directory = PathBuf::from("/images/a:b/c");
        assert_eq!(parse_opaque(&opaque(id, &directory)), Some(NodeFile::Pinned { id, directory }));
    }

    #[test]
    fn a_file_that_qemu_names_but_does_not_have_open_is_foreign() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let found = file.as_file().metadata().unwrap();
        let id = FileId::new(found.dev(), found.ino());
        let named = NodeFile::Named { id, path: file.path().into() };
        let ours = open_files(i32::try_from(std::process::id()).unwrap());
        assert_eq!(if_open(named.clone(), ours.as_ref()), named);
        drop(file);
        let ours = open_files(i32::try_from(std::process::id()).unwrap());
        assert!(matches!(if_open(named.clone(), ours.as_ref()), NodeFile::Foreign { .. }));
        assert_eq!(if_open(named.clone(), open_files(0).as_ref()), named);
    }

    #[test]
    fn somebody_elses_opaque_string_is_not_ours() {
        for text in ["", "rdwr:/x", "freezeframe:", "freezeframe:1:x:/d", "freezeframe:1:2"] {
            assert_eq!(parse_opaque(text), None);
        }
    }
}
