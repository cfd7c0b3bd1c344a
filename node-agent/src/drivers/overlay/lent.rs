//! A file that the user made for the layer that the VM is to follow to: checked, put on top of the disk, and given back
//! where there was no cut.
//!
//! From the cut on it is the disk, as any layer is, and goes when it is merged. Until then nothing was written to it but
//! the name of the image below, and that is taken away again. What is different for a device is in
//! [`on_device`](super::on_device).

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use rustix::fs::OFlags;
use tokio::sync::Mutex;

use super::follow::is_empty;
use super::on_device;
use super::parameters::{FOLLOW, Parameters, TARGETS};
use super::prepare::header;
use super::state::State;
use crate::causes::chain;
use crate::drivers::naming::is_plain;
use crate::drivers::{DiskFacts, DiskTask, DriverError, Removal, Result, qemu_img};
use crate::hypervisor::image::{ImageDirectory, ImageRoots};
use crate::hypervisor::lock::ImageLock;
use crate::hypervisor::qcow2::{has_external_data, read_header};

/// Where the files are that users of the VM's namespace made.
pub fn directory_for(task: &DiskTask, roots: &ImageRoots) -> Result<ImageDirectory> {
    let refused = |why: String| DriverError::Parameter { key: TARGETS.into(), why };
    let targets = Parameters::parse(&task.parameters)?.targets;
    let targets = targets.ok_or_else(|| refused("is missing, and a disk has a target".into()))?;
    let directory = roots.directory(&targets.join(&task.vm.namespace));
    directory.map_err(|error| refused(chain(&error)))
}

/// Fails, with what the user is to mend, unless the file can be the layer on `image`.
pub fn check(task: &DiskTask, directory: &ImageDirectory, name: &str, image: &str) -> Result<()> {
    let refused = |why: String| Err(DriverError::Target { path: directory.join(name), why });
    if !is_plain(name) {
        return refused("is not a file's name".into());
    }
    match directory.id(name) {
        Ok(Some(_)) => {}
        Ok(None) => return refused("isn't there".into()),
        Err(error) => return refused(chain(&error)),
    }
    if ImageLock::take(directory, name)?.is_none() {
        return refused("is in use".into());
    }
    check_file(task, directory, name, image).or_else(refused)
}

/// It is one file, with one name, qcow2, of the disk's size, and on top of nothing.
fn check_file(task: &DiskTask, directory: &ImageDirectory, name: &str, image: &str) -> std::result::Result<(), String> {
    let mut file = File::from(directory.open(name, OFlags::RDWR).map_err(|error| chain(&error))?);
    if file.metadata().map_err(|error| error.to_string())?.nlink() != 1 {
        return Err("has other names too".into());
    }
    check_image(task, &mut file, image)
}

/// It is qcow2, of the disk's size, and on top of nothing.
pub fn check_image(task: &DiskTask, file: &mut File, image: &str) -> std::result::Result<(), String> {
    let found = read_header(file).map_err(|error| chain(&error))?;
    // An interrupted `prepare` may have put it there.
    if found.backing.as_deref().is_some_and(|backing| backing != image) {
        return Err("needs another file".into());
    }
    if has_external_data(file).map_err(|error| chain(&error))? {
        return Err("has its data in another file".into());
    }
    if found.virtual_size != task.size {
        return Err(format!("has {} bytes, and disk {} {}", found.virtual_size, task.disk, task.size));
    }
    Ok(())
}

/// Puts the file on top of the disk's image, unless that is done.
pub async fn lend(task: &DiskTask, directory: &ImageDirectory, state: &mut State) -> Result<()> {
    // Until its header names the image, a file or a device may be checked for two disks.
    static ONE: Mutex<()> = Mutex::const_new(());
    let _one = ONE.lock().await;
    let id = directory.id(&state.disk_file)?;
    if state.overlay.is_none() || state.overlay != id {
        if state.is_on_device() {
            on_device::check(task, state).await?;
        } else {
            check(task, directory, &state.disk_file, &state.layer)?;
        }
        refuse_unless_empty(directory, state).await?;
        on_device::claim(task, state).await?;
        let path = directory.join(&state.disk_file);
        let arguments = ["rebase", "-u", "-f", "qcow2", "-F", &state.format, "-b", &state.layer];
        qemu_img(&arguments, &path, None).await.map_err(|error| error.or_no_space(directory))?;
        directory.sync_file(&state.disk_file)?;
        state.overlay = id;
    }
    Ok(())
}

/// Fails unless nothing in the file hides what is below it. It is looked at before anything is done to it, and again once
/// QEMU has it open, when nobody else can write to it any more.
pub async fn refuse_unless_empty(directory: &ImageDirectory, state: &State) -> Result<()> {
    if is_empty(directory, &state.disk_file).await? {
        return Ok(());
    }
    let why = "is not empty, or has space set aside, which would hide what is below".into();
    Err(DriverError::Target { path: directory.join(&state.disk_file), why })
}

/// Gives the file back as it was, if the snapshot was never complete: empty, and on top of nothing. QEMU must not have it open.
pub async fn give_back(directory: &ImageDirectory, state: &State) -> Result<Removal> {
    if header(directory, &state.disk_file)?.backing.as_deref() == Some(&state.layer) {
        let path = directory.join(&state.disk_file);
        qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", ""], &path, None).await?;
        directory.sync_file(&state.disk_file)?;
    }
    // Not kept: the record must claim it no more, since its user may lend it to another disk.
    Ok(Removal::Done)
}

/// Why there is no use for a target, where there is none.
pub fn refuse(disk: &DiskFacts, follow: bool) -> Option<String> {
    if disk.format == "qcow2" && disk.path.is_ok() {
        let why = "a layer on a qcow2 disk takes the disk's own name, so it must be made beside it";
        return Some(why.into());
    }
    (!follow).then(|| format!("a target is for layers that the VM's owner follows to (parameter `{FOLLOW}`)"))
}
