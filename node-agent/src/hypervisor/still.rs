//! A stopped VM's disks, opened in a QEMU of ours whose virtual CPUs never start.
//!
//! Drivers find there what they find in a running VM: the same monitor, the same block graph, the same jobs. Its
//! devices take QEMU's image locks as a guest's would: while it lives the VM can't be started, and it can't be started
//! itself while the VM, or anybody else, has an image open.
//!
//! It isn't `qemu-storage-daemon`, which in QEMU 7.2 takes no descriptors and lists no disks.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use freezeframe_qemu::Error as QemuError;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::sync::OnceCell;
use tokio::time::{Instant, sleep, timeout};

use super::device::number_of;
use super::disks::{Disks, disks};
use super::image::ImageRoots;
use super::target_file::{KnownDisk, is_device_id};
use super::{OpenError, QMP_TIMEOUT, Vm, VmKey};

/// Bound of starting QEMU and of its end; a tenth of a second on an idle machine.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Denies it, beyond what QEMU never needs, other programs and other rights.
pub(crate) const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
/// Formats of images that may be opened; QEMU's other drivers are protocols and filters.
const FORMATS: [&str; 9] = ["raw", "qcow2", "qed", "qcow", "vdi", "vmdk", "vpc", "vhdx", "parallels"];

/// Why a stopped VM's disks can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum StillError {
    /// QEMU couldn't be started.
    #[error("failed to start a QEMU for the disks of stopped VM {vm}")]
    Start {
        /// The VM.
        vm: VmKey,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Its monitor couldn't be used.
    #[error("failed to reach the QEMU that has the disks of stopped VM {vm}")]
    Reach {
        /// The VM.
        vm: VmKey,
        /// Why.
        #[source]
        source: Box<OpenError>,
    },
    /// A disk that isn't what is known of it.
    #[error("disk `{disk}` of stopped VM {vm} can't be opened: {why}")]
    Disk {
        /// The VM.
        vm: VmKey,
        /// The disk.
        disk: String,
        /// Why.
        why: String,
    },
    /// What it has open can't be read.
    #[error("failed to read what images stopped VM {vm} has")]
    Graph {
        /// The VM.
        vm: VmKey,
        /// QEMU's answer.
        #[source]
        source: QemuError,
    },
    /// QEMU refused a disk: most likely another process has its image open.
    #[error("disk `{disk}` of stopped VM {vm} can't be opened")]
    Qemu {
        /// The VM.
        vm: VmKey,
        /// The disk.
        disk: String,
        /// QEMU's answer.
        #[source]
        source: Box<QemuError>,
    },
}

/// How a disk is opened.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    /// As the VM would, with its locks.
    AsTheVm,
    /// To look at it, read-only, with no lock that anybody would notice.
    Look,
}

/// A QEMU with a stopped VM's disks; it ends when this is dropped, or when this process does.
pub struct Still {
    vm: Vm,
    process: Child,
    // The sockets' directory: dropped last.
    _directory: TempDir,
}

impl Still {
    /// Opens a stopped VM's disks with the locks that the VM itself would take. Disks keep their names.
    pub async fn start(vm: &VmKey, disks: &[KnownDisk], roots: &ImageRoots) -> Result<Self, StillError> {
        Self::open(vm, disks, roots, Access::AsTheVm).await
    }

    /// Opens a stopped VM's disks so that nobody notices: only to look at.
    pub async fn look(vm: &VmKey, disks: &[KnownDisk], roots: &ImageRoots) -> Result<Self, StillError> {
        Self::open(vm, disks, roots, Access::Look).await
    }

    async fn open(vm: &VmKey, disks: &[KnownDisk], roots: &ImageRoots, access: Access) -> Result<Self, StillError> {
        let nodes = disks.iter().enumerate().map(|(at, disk)| {
            let wrong = |why| StillError::Disk { vm: vm.clone(), disk: disk.name.clone(), why };
            node(at, disk, roots, access).map_err(wrong)
        });
        let nodes = nodes.collect::<Result<Vec<_>, _>>()?;
        let still = Self::with_no_disk(vm).await?;
        for (disk, node) in disks.iter().zip(&nodes) {
            let opened = still.add(disk, node).await;
            opened.map_err(|source| StillError::Qemu {
                vm: vm.clone(),
                disk: disk.name.clone(),
                source: Box::new(source),
            })?;
        }
        still.check_images(vm, roots).await?;
        Ok(still)
    }

    async fn with_no_disk(vm: &VmKey) -> Result<Self, StillError> {
        let failed = |source| StillError::Start { vm: vm.clone(), source };
        let directory = TempDir::with_prefix("freezeframe-still-").map_err(failed)?;
        let sockets = directory.path().join(vm.socket(""));
        std::fs::create_dir_all(&sockets).map_err(failed)?;
        let mut process = command(has_sandbox().await, &sockets).spawn().map_err(failed)?;
        let end = Instant::now() + START_TIMEOUT;
        loop {
            match Vm::open(directory.path(), vm).await {
                Ok(opened) => return Ok(Self { vm: opened, process, _directory: directory }),
                Err(OpenError::NotRunning(_)) if Instant::now() < end => sleep(Duration::from_millis(10)).await,
                Err(source) => return Err(StillError::Reach { vm: vm.clone(), source: Box::new(source) }),
            }
            if let Some(ended) = process.try_wait().map_err(failed)? {
                return Err(failed(std::io::Error::other(format!("it ended at once, with {ended}"))));
            }
        }
    }

    async fn add(&self, disk: &KnownDisk, node: &Value) -> Result<(), QemuError> {
        let qmp = self.vm.qmp();
        qmp.blockdev_add(node, QMP_TIMEOUT).await?;
        // SCSI, since a bus of it has room for all disks that a VM may have.
        let device = json!({"driver": "scsi-hd", "id": disk.name, "drive": node["node-name"], "bus": "still.0"});
        qmp.execute::<Value>("device_add", device, QMP_TIMEOUT).await.map(drop)
    }

    /// QEMU opened what the images' headers name as well, and headers aren't trusted: every image of a disk must be a
    /// file beneath an image root, or the disk's own device.
    async fn check_images(&self, vm: &VmKey, roots: &ImageRoots) -> Result<(), StillError> {
        let unreadable = |source| StillError::Graph { vm: vm.clone(), source };
        let Disks { found, .. } = disks(&self.vm, roots).await.map_err(unreadable)?;
        for disk in found {
            if let (Err(why), Err(_), Err(_)) = (disk.facts.chain, disk.facts.device, disk.strays) {
                return Err(StillError::Disk { vm: vm.clone(), disk: disk.name, why });
            }
        }
        Ok(())
    }

    /// The VM, as drivers know one.
    #[must_use]
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// The same, for functions that might talk to a guest: there is none.
    pub fn vm_mut(&mut self) -> &mut Vm {
        &mut self.vm
    }

    /// Closes all images; their locks are gone when this returns.
    pub async fn stop(mut self) {
        let asked = self.vm.qmp().quit(QMP_TIMEOUT).await;
        if let Err(error) = asked {
            tracing::debug!(%error, "the QEMU of a stopped VM's disks doesn't end by itself");
        } else if matches!(timeout(QMP_TIMEOUT, self.process.wait()).await, Ok(Ok(_))) {
            return;
        }
        if let Err(error) = self.process.kill().await {
            tracing::error!(%error, "the QEMU of a stopped VM's disks can't be ended");
        }
    }
}

/// Options of a disk's node.
fn node(at: usize, disk: &KnownDisk, roots: &ImageRoots, access: Access) -> Result<Value, String> {
    if !is_device_id(&disk.name) {
        return Err("its name can't be a device's id in QEMU".into());
    }
    if !FORMATS.contains(&disk.format.as_str()) {
        return Err(format!("format `{}` can't be opened without the VM's own QEMU", disk.format));
    }
    let look = access == Access::Look;
    let mut node = json!({
        "driver": disk.format,
        "node-name": format!("still-{at}"),
        "read-only": look || disk.read_only,
        "discard": "unmap",
        "file": {
            "driver": protocol(&disk.path, roots)?,
            "node-name": format!("still-{at}-file"),
            "filename": disk.path,
            "discard": "unmap",
        },
    });
    if look {
        // Not written out where it isn't wanted: a driver that reopens the node would have to write it out as well.
        node["force-share"] = true.into();
    }
    Ok(node)
}

/// QEMU's driver for the file or device at a path.
fn protocol(path: &Path, roots: &ImageRoots) -> Result<&'static str, String> {
    if number_of(path).is_ok() {
        let named = roots.names(path).then_some("host_device");
        return named.ok_or_else(|| format!("{} is not beneath an image root of this node's agent", path.display()));
    }
    let (directory, name) = roots.directory_of(path).map_err(|error| error.to_string())?;
    match directory.id(&name).map_err(|error| error.to_string())? {
        Some(_) => Ok("file"),
        None => Err(format!("{} isn't there", path.display())),
    }
}

fn command(sandbox: bool, sockets: &Path) -> Command {
    // The parent's death must end it, or a VM could never be started again: its locks would stay.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64", "-S", "-nodefaults", "-no-user-config"]);
    command.args(["-display", "none", "-machine", "pc,accel=tcg", "-m", "16", "-name", "freezeframe-still"]);
    if sandbox {
        command.args(["-sandbox", SANDBOX]);
    }
    // A relative name: a socket's path has 108 bytes, and names of VMs may be long.
    command.args(["-qmp", "unix:qmp.sock,server=on,wait=off", "-device", "virtio-scsi-pci,id=still"]);
    command.current_dir(sockets).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    command
}

/// Whether this node's QEMU was built with its sandbox; asked once.
pub(crate) async fn has_sandbox() -> bool {
    static HAS: OnceCell<bool> = OnceCell::const_new();
    let ask = || async {
        let mut ask = Command::new("qemu-system-x86_64");
        ask.args(["-sandbox", SANDBOX, "-machine", "help"]).stdin(Stdio::null()).kill_on_drop(true);
        matches!(timeout(START_TIMEOUT, ask.output()).await, Ok(Ok(output)) if output.status.success())
    };
    *HAS.get_or_init(ask).await
}
