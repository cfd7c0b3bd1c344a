//! What a guest is made of.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::Disk;

/// Names of a guest's disks, on its command line and inside.
pub(crate) const DISK_NAMES: [&str; 8] = ["vda", "vdb", "vdc", "vdd", "vde", "vdf", "vdg", "vdh"];
/// It takes 3.5 s on an idle machine; several guests boot at once on a busy one.
const BOOTED: Duration = Duration::from_secs(120);

/// What the guest does with its disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// Mounts them and leaves them alone.
    None,
    /// The witness on the first two disks: a record on each, synced, over and over; the others have records of their own.
    Light,
    /// The witness and two writers that fill the page cache and never sync.
    Heavy,
    /// The witness over all disks, one after the other.
    Row,
}

impl Load {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Light => "light",
            Self::Heavy => "heavy",
            Self::Row => "row",
        }
    }
}

/// Whether the guest runs qemu-ga.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Agent {
    /// It does, and reports through `qga.sock`.
    On,
    /// The port is there and nobody in the guest opens it.
    Off,
}

/// What goes wrong in the guest, on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Nothing.
    None,
    /// A hook of its owner keeps the guest's freezes waiting, before anything is frozen, until [`release_freeze`].
    ///
    /// [`release_freeze`]: super::Guest::release_freeze
    SlowFreeze,
    /// Something in the guest thaws the first disk as soon as it is frozen.
    Thawer,
}

impl Trouble {
    pub(super) fn switch(self) -> String {
        match self {
            Self::None => String::new(),
            Self::SlowFreeze => "slowfreeze=on".into(),
            Self::Thawer => "thawer=on".into(),
        }
    }
}

/// How the disks stand on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// `-blockdev`, with node names `file-vda` and `fmt-vda`.
    Blockdev,
    /// `-drive`, with node names that QEMU makes up.
    Drive,
}

/// A guest to boot: change what a test is about, keep the rest.
#[derive(Clone, Debug)]
pub struct GuestConfig {
    /// Name of the VM.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Root of the directories with the sockets for the agent: `<vm_root>/<namespace>/<name>/{qmp,qga}.sock`.
    pub vm_root: PathBuf,
    /// For what is ours alone: private sockets, console, log.
    pub directory: PathBuf,
    /// At most eight, `vda` first; the witness is on the first two, or all with [`Load::Row`].
    pub disks: Vec<Disk>,
    /// What it does.
    pub load: Load,
    /// Pause of a writer after each record.
    pub writer_pause: Duration,
    /// Whether it has a guest agent.
    pub agent: Agent,
    /// What goes wrong in it.
    pub trouble: Trouble,
    /// How its disks are given.
    pub style: Style,
    /// How long it may take from exec to its load and its agent.
    pub boot_bound: Duration,
    /// Memory in MiB; 128 is the least that boots.
    pub memory_mib: u32,
    /// More arguments for QEMU.
    pub extra_arguments: Vec<String>,
}

impl GuestConfig {
    /// Light load with an agent, disks by `-blockdev`; everything of its own beneath `directory`.
    #[must_use]
    pub fn new(namespace: &str, name: &str, vm_root: &Path, directory: &Path) -> Self {
        Self {
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            vm_root: vm_root.to_owned(),
            directory: directory.to_owned(),
            disks: Vec::new(),
            load: Load::Light,
            writer_pause: Duration::from_millis(10),
            agent: Agent::On,
            trouble: Trouble::None,
            style: Style::Blockdev,
            boot_bound: BOOTED,
            memory_mib: 192,
            extra_arguments: Vec::new(),
        }
    }

    /// Where `qmp.sock` and `qga.sock` are.
    #[must_use]
    pub fn socket_directory(&self) -> PathBuf {
        self.vm_root.join(&self.namespace).join(&self.name)
    }

    /// A file of its private directory.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}
