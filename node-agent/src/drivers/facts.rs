//! What is known of a disk, and what a driver says to it.

use std::path::PathBuf;

use super::Layer;
use crate::hypervisor::device::BlockDevice;
use crate::hypervisor::filesystem::Filesystem;

/// What a driver may look at to say whether it can take a disk.
#[derive(Clone, Debug)]
pub struct DiskFacts {
    /// Format of the image, such as `qcow2`.
    pub format: String,
    /// What QEMU calls the image: a path, or a URL.
    pub source: String,
    /// Path of the image on this node, where it is a file beneath an image root; else why it isn't.
    pub path: std::result::Result<PathBuf, String>,
    /// The block device that is the disk's only image; else why there is none.
    pub device: std::result::Result<BlockDevice, String>,
    /// The block device that its image is on, whatever is below that.
    pub on_device: Option<PathBuf>,
    /// The file system that the image is on, where it is a file.
    pub filesystem: Option<Filesystem>,
    /// The images of its chain, top first, where each is a file beneath an image root; else why not.
    pub chain: std::result::Result<Vec<ChainImage>, String>,
    /// Whether the image is encrypted.
    pub encrypted: bool,
    /// Whether it has dirty bitmaps that a layer on top would leave behind.
    pub has_bitmaps: bool,
    /// Who may write to it.
    pub writers: Writers,
    /// Why it isn't what it should be: the VM was started with an image that a layer had been made on.
    pub not_followed: Option<String>,
}

/// Who may write to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writers {
    /// Its one device in this VM.
    Guest,
    /// Nobody: the guest can only read it.
    Nobody,
    /// Its device, and others in this VM or elsewhere.
    Others,
}

/// One image of a disk's chain, and what a copy of its file would depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainImage {
    /// Which image.
    pub layer: Layer,
    /// The file system that it is on.
    pub filesystem: Option<Filesystem>,
    /// The backing string of its header, where it is qcow2 or QED and has one.
    pub backing: Option<String>,
    /// Whether its header says that it is encrypted.
    pub encrypted: bool,
    /// Whether files can be made beside it.
    pub writable: bool,
}

/// Whether a driver can take a disk, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It can.
    Usable(String),
    /// It can't.
    Unusable(String),
}
