//! Seeing to it that a VM doesn't run: nothing of it has its images open, and nobody starts it again.

use std::time::Duration;

use freezeframe_api::conditions::reasons;
use freezeframe_qemu::Error as QemuError;
use tokio::time::{Instant, sleep};

use super::Restores;
use super::order::RestoreOrder;
use super::record::DiskRestore;
use super::source::failed;
use crate::causes::chain;
use crate::hypervisor::image::ImageError;
use crate::hypervisor::lock::ImageLock;
use crate::hypervisor::{OpenError, QMP_TIMEOUT, Vm, VmKey};
use crate::session::Progress;
use crate::session::outcome::Failure;

/// How long QEMU may take to end once it was told to.
const QUIT_TIMEOUT: Duration = Duration::from_secs(15);
/// For how long a VM must stay down: a manager that restarts it does so within that time.
const SETTLE: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(200);

/// Returns when the order's VM doesn't run, after shutting it down where the order allows that.
pub async fn see_stopped(
    restores: &Restores,
    order: &RestoreOrder,
    disks: &[DiskRestore],
    progress: &dyn Progress,
) -> Result<(), Failure> {
    let Some(vm) = open(restores, &order.vm).await? else { return hold_images(restores, disks).await.map(drop) };
    if !order.stop_vm {
        let message = format!("VM {} runs; shut it down, or set stopVM", order.vm);
        return Err(Failure::refused(reasons::VM_RUNNING, message));
    }
    match restores.sessions.guard.owed(&order.vm.to_string()).await {
        Ok(false) => {}
        Ok(true) => return Err(Failure::new(reasons::THAW_OWED, format!("the guard owes VM {} a thaw", order.vm))),
        Err(error) => return Err(Failure::new(reasons::GUARD_UNAVAILABLE, chain(&error))),
    }
    tracing::info!(timeout = ?order.stop_timeout, "shutting the VM down");
    shut_down(&vm, order.stop_timeout, progress).await?;
    let process = vm.qmp_identity().peer_pid;
    drop(vm);
    ends(restores, &order.vm, process).await?;
    stays_down(restores, &order.vm).await?;
    hold_images(restores, disks).await.map(drop)
}

/// The VM's monitor, if a process has one.
async fn open(restores: &Restores, vm: &VmKey) -> Result<Option<Vm>, Failure> {
    match Vm::open(&restores.sessions.vm_root, vm).await {
        Ok(vm) => Ok(Some(vm)),
        Err(OpenError::NotRunning(_)) => Ok(None),
        Err(error) => Err(Failure::new(reasons::VM_BUSY, chain(&error))),
    }
}

/// Fails if the VM runs.
pub async fn not_running(restores: &Restores, vm: &VmKey) -> Result<(), Failure> {
    match open(restores, vm).await? {
        None => Ok(()),
        Some(_) => Err(Failure::new(reasons::VM_RUNNING, format!("VM {vm} was started in the meantime"))),
    }
}

async fn shut_down(vm: &Vm, patience: Duration, progress: &dyn Progress) -> Result<(), Failure> {
    vm.qmp().system_powerdown(QMP_TIMEOUT).await.map_err(|error| busy(&error))?;
    let end = Instant::now() + patience;
    while Instant::now() < end {
        match vm.run_state().await {
            Err(_) if vm.qmp().is_closed() => return Ok(()),
            Err(error) => return Err(busy(&error)),
            // Its guest is down, but `-no-shutdown` keeps QEMU.
            Ok(state) if state.status == "shutdown" => break,
            Ok(_) => {}
        }
        if progress.cancelled() {
            return Err(Failure::cancelled());
        }
        sleep(POLL).await;
    }
    match vm.qmp().quit(QMP_TIMEOUT).await {
        Ok(()) | Err(QemuError::Closed | QemuError::Io { .. }) => {}
        Err(error) => return Err(busy(&error)),
    }
    Ok(())
}

/// Waits until QEMU's sockets are gone; its monitor closes before.
async fn ends(restores: &Restores, vm: &VmKey, process: i32) -> Result<(), Failure> {
    let end = Instant::now() + QUIT_TIMEOUT;
    loop {
        match Vm::open(&restores.sessions.vm_root, vm).await {
            Err(OpenError::NotRunning(_)) => return Ok(()),
            Ok(other) if other.qmp_identity().peer_pid != process => return Err(started_again(vm)),
            _ if Instant::now() > end => {
                let message = format!("QEMU of VM {vm} doesn't end, {QUIT_TIMEOUT:?} after it was told to");
                return Err(Failure::new(reasons::VM_RUNNING, message));
            }
            _ => sleep(POLL).await,
        }
    }
}

fn started_again(vm: &VmKey) -> Failure {
    let message = format!("VM {vm} was shut down, and was started again: stop it by what manages it");
    Failure::new(reasons::VM_RUNNING, message)
}

fn busy(error: &QemuError) -> Failure {
    Failure::new(reasons::VM_BUSY, format!("the VM's monitor failed: {}", chain(error)))
}

async fn stays_down(restores: &Restores, vm: &VmKey) -> Result<(), Failure> {
    let end = Instant::now() + SETTLE;
    while Instant::now() < end {
        // A monitor that can't be used is one that is there.
        if !matches!(open(restores, vm).await, Ok(None)) {
            return Err(started_again(vm));
        }
        sleep(POLL).await;
    }
    Ok(())
}

/// Keeps every QEMU out of the disks' present images, for as long as the locks live.
pub async fn hold_images(restores: &Restores, disks: &[DiskRestore]) -> Result<Vec<ImageLock>, Failure> {
    let end = Instant::now() + QUIT_TIMEOUT;
    let mut held = vec![];
    for disk in disks {
        loop {
            // A QEMU whose monitor is closed may still be closing its images.
            match lock(restores, disk).map_err(|error| failed(&error))? {
                Some(lock) => break held.push(lock),
                None if Instant::now() > end => {
                    let message = format!("{} is open in another process, so the VM runs", disk.path.display());
                    return Err(Failure::new(reasons::VM_RUNNING, message));
                }
                None => sleep(POLL).await,
            }
        }
    }
    Ok(held)
}

fn lock(restores: &Restores, disk: &DiskRestore) -> Result<Option<ImageLock>, ImageError> {
    if disk.is_volume() {
        return ImageLock::take_device(&disk.path);
    }
    let (directory, name) = restores.sessions.roots.directory_of(&disk.path)?;
    ImageLock::take(&directory, &name)
}
