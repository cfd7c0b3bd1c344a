//! What a restore must remember over a crash.

use std::path::{Path, PathBuf};

use freezeframe_api::v1alpha1::{BootCheck, VMRestoreContentStatus};
use serde::{Deserialize, Serialize};

use super::order::RestoreOrder;
use crate::hypervisor::image::FileId;
use crate::session::journal::Record;

/// How far a restore came, for whoever finds its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    /// The VM was seen to be stopped, and nothing else was done: that is not done again.
    Stopped,
    /// Images are being made under names of their own: it can go on, or be taken back.
    Open,
    /// All images are made, and get the disks' names. Once the first has it, it can only go on.
    Switching,
    /// Every disk is back.
    Done,
    /// It failed, or was cancelled: what is left is to take everything back.
    Failed,
    /// Nothing of it is left.
    TakenBack,
}

/// How a disk's image is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Method {
    /// A file of its own that shares the snapshot's blocks until either is written.
    Clone,
    /// A new qcow2 layer on top of the snapshot's image, which it needs.
    Link,
    /// A full copy.
    Copy,
    /// A thin volume of its own that shares the snapshot's blocks until either is written.
    Volume,
    /// A full copy in a new volume.
    VolumeCopy,
}

/// What an image is, whatever it is called.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ImageId {
    /// A file.
    File(FileId),
    /// A logical volume, by LVM's UUID of it.
    Volume(String),
}

/// One disk of a restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRestore {
    /// The disk, as the snapshot lists it.
    pub disk: String,
    /// The driver that took the snapshot of it.
    pub driver: String,
    /// The snapshot's image.
    pub source: PathBuf,
    /// Its format.
    pub source_format: String,
    /// How the new image is made.
    pub method: Method,
    /// The image that is made, or replaced.
    pub path: PathBuf,
    /// Its format.
    pub format: String,
    /// An image whose owner and mode the new one gets.
    pub like: PathBuf,
    /// Virtual size, in bytes.
    pub size: u64,
    /// Space that making it needs at most, in bytes.
    pub needed: u64,
    /// The new image, once it is complete and on disk.
    pub made: Option<ImageId>,
    /// The image that it replaces; none for a new VM.
    pub replaced: Option<ImageId>,
}

impl DiskRestore {
    /// Name of the new image until it gets the disk's.
    #[must_use]
    pub fn unfinished(&self, id: &str) -> PathBuf {
        appended(&self.path, &format!(".vmrestore-{id}"))
    }

    /// Whether its images are logical volumes.
    #[must_use]
    pub fn is_volume(&self) -> bool {
        matches!(self.method, Method::Volume | Method::VolumeCopy)
    }

    /// Name of the replaced image while several disks change hands.
    #[must_use]
    pub fn away(&self, id: &str) -> PathBuf {
        appended(&self.path, &format!(".vmreplaced-{id}"))
    }
}

fn appended(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

/// The record of one restore on this node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RestoreRecord {
    /// The work order.
    pub order: RestoreOrder,
    /// How far it came.
    pub stage: Stage,
    /// The disks.
    pub disks: Vec<DiskRestore>,
    /// A new VM's directory, once it has everything but its name: when that name is free again, the VM is made.
    #[serde(default)]
    pub directory: Option<FileId>,
    /// What came of starting the new images.
    pub boot: Option<BootCheck>,
    /// What was, or is to be, reported.
    pub status: Option<VMRestoreContentStatus>,
}

impl RestoreRecord {
    /// The record of an order of which nothing has been made yet.
    #[must_use]
    pub fn new(order: &RestoreOrder, disks: Vec<DiskRestore>) -> Self {
        Self { order: order.clone(), stage: Stage::Open, disks, directory: None, boot: None, status: None }
    }

    /// Whether what is still to be done reads the snapshot's images, perhaps for hours, and no more: a new VM's are
    /// copied from them. As long as that is on record they stay as they are ([`super::reading`]), and the turn of the
    /// snapshot's VM isn't needed.
    #[must_use]
    pub fn only_reads(&self) -> bool {
        let copied = |disk: &DiskRestore| matches!(disk.method, Method::Copy | Method::VolumeCopy);
        let links = self.disks.iter().any(|disk| disk.method == Method::Link);
        self.stage == Stage::Open && self.order.new_vm.is_some() && !links && self.disks.iter().any(copied)
    }

    /// Whether there is still something to do.
    #[must_use]
    pub fn is_unsettled(&self) -> bool {
        matches!(self.stage, Stage::Open | Stage::Switching | Stage::Failed)
    }
}

impl Record for RestoreRecord {
    fn uid(&self) -> &str {
        &self.order.uid
    }
}
