//! What a restore would do: decided from what is there, nothing done. A dry run is this and nothing else.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use freezeframe_api::conditions::reasons;
use freezeframe_api::v1alpha1::RestoreMode;

use super::order::RestoreOrder;
use super::record::{DiskRestore, Method};
use super::source::{failed, has_backing, place, select, snapshot};
use super::{Restores, directory, tool, volumes};
use crate::drivers::overlay::dependents;
use crate::drivers::overlay::follow::image_below;
use crate::drivers::{Artifact, DiskTask};
use crate::hypervisor::VmKey;
use crate::hypervisor::image::ImageDirectory;
use crate::hypervisor::share::can_share;
use crate::session::outcome::Failure;

/// Space that a file needs for its metadata, in bytes.
const FILE_METADATA: u64 = 1 << 20;
/// Space that a new layer needs before its first cluster of data, in bytes.
const LAYER_METADATA: u64 = 4 << 20;

/// The disks of an order, and how each comes back.
pub async fn plan(restores: &Restores, order: &RestoreOrder) -> Result<Vec<DiskRestore>, Failure> {
    let record = snapshot(restores, order)?;
    if let Some(new) = &order.new_vm {
        refuse_existing_vm(&restores.sessions.vm_root, new)?;
    }
    let mut disks = vec![];
    for task in select(&record, order)? {
        disks.push(plan_disk(restores, order, task).await?);
    }
    check_space(restores, order, &disks).await?;
    Ok(disks)
}

/// A VM is its directory, whatever is in it.
pub fn refuse_existing_vm(root: &Path, vm: &VmKey) -> Result<(), Failure> {
    let directory = root.join(&vm.namespace).join(&vm.name);
    match std::fs::symlink_metadata(&directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed(&error)),
        Ok(_) => Err(Failure::refused(reasons::VM_EXISTS, format!("there is a VM {vm} already"))),
    }
}

async fn plan_disk(restores: &Restores, order: &RestoreOrder, task: &DiskTask) -> Result<DiskRestore, Failure> {
    let roots = &restores.sessions.roots;
    let unfinished = || Failure::refused(reasons::SNAPSHOT_NOT_READY, format!("disk {} isn't complete", task.disk));
    let artifact = task.artifact.as_ref().ok_or_else(unfinished)?;
    if artifact.handle.starts_with("/dev") {
        return volumes::plan(order, task, artifact).await;
    }
    let like = task.path.clone().ok_or_else(|| not_a_file(task))?;
    let path_for = |format: &str| match &order.new_vm {
        Some(new) => directory::of_image(order, new, &like, &task.disk, format),
        None => like.clone(),
    };
    refuse_followed(restores, order, task, &like)?;
    let facts = facts(restores, order, (task, artifact), &path_for(&task.format))?;
    let (method, format) = match &order.new_vm {
        Some(_) => choose_free(order.mode, facts, &artifact.format),
        None => (choose(order.mode, facts, &artifact.format, &task.format), task.format.clone()),
    };
    let path = path_for(&format);
    check_target(&directory::directory_of(roots, order, &path)?, &path, task, order)?;
    let needed = match method {
        Method::Clone => FILE_METADATA,
        Method::Link => LAYER_METADATA,
        Method::Copy | Method::Volume | Method::VolumeCopy => {
            tool::measure(&artifact.handle, &artifact.format).await.map_err(|error| failed(&error))?
        }
    };
    Ok(DiskRestore {
        disk: task.disk.clone(),
        driver: task.driver.clone(),
        source: artifact.handle.clone(),
        source_format: artifact.format.clone(),
        method,
        path,
        format,
        like,
        size: task.size,
        needed,
        made: None,
        replaced: None,
    })
}

/// A new image would take the place of a layer whose name says what it lies on, and it wouldn't.
fn refuse_followed(restores: &Restores, order: &RestoreOrder, task: &DiskTask, disk: &Path) -> Result<(), Failure> {
    if order.new_vm.is_some() {
        return Ok(());
    }
    let below = match image_below(disk) {
        Some((image, _)) => Some(image),
        None => restores.sessions.image_below_elsewhere(&order.vm, disk).map_err(|error| failed(&error))?,
    };
    match below {
        None => Ok(()),
        Some(image) => {
            let message = format!(
                "disk {} is a layer on {} that the VM's owner follows, and can't be replaced in place: restore it as a new \
                 VM's, or delete the snapshots that need that image first",
                task.disk,
                image.display()
            );
            Err(Failure::refused(reasons::DISK_NOT_SUPPORTED, message))
        }
    }
}

fn not_a_file(task: &DiskTask) -> Failure {
    let message = format!("disk {} is not a file, and only files can be brought back by this version", task.disk);
    Failure::refused(reasons::DISK_NOT_SUPPORTED, message)
}

/// What the choice of a method depends on.
#[derive(Clone, Copy, Debug)]
struct Facts {
    /// Whether the snapshot's image depends on another.
    has_backing: bool,
    /// Whether a file beside the disk can share the image's blocks.
    shares: bool,
    /// Whether another image may name this one in its header.
    nameable: bool,
}

fn facts(
    restores: &Restores,
    order: &RestoreOrder,
    (task, artifact): (&DiskTask, &Artifact),
    image: &Path,
) -> Result<Facts, Failure> {
    let roots = &restores.sessions.roots;
    let has_backing = has_backing(roots, &artifact.handle, &artifact.format)?;
    let directory = directory::directory_of(roots, order, image)?;
    let shares = place(roots, &artifact.handle).is_ok_and(|(from, _)| can_share(&artifact.handle, &from, &directory));
    // QEMU takes what is before a colon for a protocol. And a disk whose chain leaves the image roots can't be worked on
    // any more; one that goes on in a read-only subvolume not by all drivers that took it before.
    let in_place = order.new_vm.is_none();
    let beneath = roots.directory_of(&artifact.handle).is_ok_and(|(below, _)| !in_place || below.is_writable());
    // Who merges snapshots looks for images on top of one beside it, and nowhere else.
    let merges = restores.sessions.drivers.find(&task.driver).is_some_and(|driver| driver.merges());
    let found = !merges || artifact.handle.parent() == image.parent();
    let nameable =
        beneath && found && artifact.handle.to_str().is_some_and(|path| !path.contains(':') && path.len() < 1024);
    Ok(Facts { has_backing, shares, nameable })
}

/// How an image of a format that is given is made.
fn choose(mode: RestoreMode, facts: Facts, from: &str, to: &str) -> Method {
    match mode {
        _ if facts.shares && !facts.has_backing && from == to => Method::Clone,
        RestoreMode::Linked if facts.nameable && to == "qcow2" => Method::Link,
        _ => Method::Copy,
    }
}

/// The same where the format is free: the snapshot's own, unless a link is to be had by another.
fn choose_free(mode: RestoreMode, facts: Facts, from: &str) -> (Method, String) {
    match choose(mode, facts, from, from) {
        Method::Copy if mode == RestoreMode::Linked && facts.nameable => (Method::Link, "qcow2".to_owned()),
        method => (method, from.to_owned()),
    }
}

/// A new image overwrites nothing, and a replaced one is nobody's backing file.
fn check_target(dir: &ImageDirectory, path: &Path, task: &DiskTask, order: &RestoreOrder) -> Result<(), Failure> {
    // Where the namespace has no directory of its own yet, nothing in it is taken.
    let is_there = path.parent() == Some(dir.path());
    let name = path.file_name().filter(|_| is_there).and_then(|name| name.to_str()).unwrap_or_default();
    if order.new_vm.is_some() {
        let taken = dir.names().map_err(|error| failed(&error))?.iter().any(|taken| taken == name);
        let exists = || Failure::refused(reasons::VM_EXISTS, format!("{} is there already", path.display()));
        return if taken { Err(exists()) } else { Ok(()) };
    }
    let found = dir.id(name).map_err(|error| failed(&error))?;
    let gone = || Failure::refused(reasons::DISK_NOT_FOUND, format!("disk {} has no image {name} now", task.disk));
    let needing = dependents(dir, found.ok_or_else(gone)?).map_err(|error| failed(&error))?;
    match needing.first() {
        None => Ok(()),
        Some(other) => {
            let message = format!("{other} was made on top of {}, which can't be replaced under it", path.display());
            Err(Failure::refused(reasons::RESTORE_FAILED, message))
        }
    }
}

/// Whether each file system and volume group has the space for all that is made there.
pub async fn check_space(restores: &Restores, order: &RestoreOrder, disks: &[DiskRestore]) -> Result<(), Failure> {
    volumes::check_space(disks, &order.id()).await?;
    let mut by_device: BTreeMap<u64, (PathBuf, u64, u64)> = BTreeMap::new();
    for disk in disks.iter().filter(|disk| disk.made.is_none() && !disk.is_volume()) {
        let directory = directory::directory_of(&restores.sessions.roots, order, &disk.path)?;
        let device = rustix::fs::fstat(&directory).map_err(|error| failed(&error))?.st_dev;
        let free = directory.free_bytes().map_err(|error| failed(&error))?;
        let entry = by_device.entry(device).or_insert_with(|| (directory.path().to_owned(), 0, free));
        entry.1 = entry.1.saturating_add(disk.needed);
    }
    match by_device.values().find(|(_, needed, free)| needed > free) {
        None => Ok(()),
        Some((path, needed, free)) => {
            let message = format!("{needed} bytes are needed in {}, and {free} are free", path.display());
            Err(Failure::new(reasons::NO_SPACE, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_shared_if_it_can_be_linked_if_it_may_be_and_copied_else() {
        use RestoreMode::{Full, Linked};
        let facts = |has_backing, shares, nameable| Facts { has_backing, shares, nameable };
        for (mode, facts, from, to, wanted) in [
            (Linked, facts(false, true, true), "raw", "raw", Method::Clone),
            (Full, facts(false, true, true), "qcow2", "qcow2", Method::Clone),
            (Linked, facts(false, true, true), "qcow2", "raw", Method::Copy),
            (Linked, facts(true, true, true), "qcow2", "qcow2", Method::Link),
            (Full, facts(true, true, true), "qcow2", "qcow2", Method::Copy),
            (Linked, facts(false, false, true), "raw", "raw", Method::Copy),
            (Linked, facts(false, false, true), "raw", "qcow2", Method::Link),
            (Linked, facts(false, false, false), "qcow2", "qcow2", Method::Copy),
        ] {
            assert_eq!(choose(mode, facts, from, to), wanted, "{mode:?} {facts:?} {from} {to}");
        }
    }

    #[test]
    fn a_new_vm_gets_a_raw_snapshot_as_a_layer_where_it_may_depend_on_it() {
        let facts = Facts { has_backing: false, shares: false, nameable: true };
        assert_eq!(choose_free(RestoreMode::Linked, facts, "raw"), (Method::Link, "qcow2".into()));
        assert_eq!(choose_free(RestoreMode::Full, facts, "raw"), (Method::Copy, "raw".into()));
    }
}
