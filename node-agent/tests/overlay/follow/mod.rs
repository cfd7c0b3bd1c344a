//! Disks that aren't qcow2, under a class whose VMs' owners follow: the layer is a new file, and the next command line
//! has it.

mod cut_off;
mod device;
mod on_device;
mod orders;
mod restores;
mod targets;
mod wrong_start;

use std::path::{Path, PathBuf};
use std::process::Command;

use freezeframe_node_agent::hypervisor::image::ImageRoots;
use serde_json::json;
use tempfile::TempDir;

use crate::lab::{Lab, images};
use crate::machine::{Drive, REGION, REGIONS, format_of, path, run};

/// The image that a VM has first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    Raw,
    Qed,
    Device,
}

impl Base {
    fn image(self, lab: &Lab) -> PathBuf {
        match self {
            Self::Raw => lab.images().join("vda.img"),
            Self::Qed => lab.images().join("vda.qed"),
            Self::Device => {
                let link = lab.images().with_file_name("device");
                std::fs::read_link(link).unwrap()
            }
        }
    }
}

/// A file as a block device, with a link to it beside the images' directory.
struct Loop(PathBuf);

impl Loop {
    fn attach(directory: &TempDir, size: u64) -> Self {
        Self::attach_as(directory.path(), "device", size)
    }

    fn attach_as(directory: &Path, link: &str, size: u64) -> Self {
        let file = directory.join(format!("{link}.data"));
        std::fs::File::create(&file).unwrap().set_len(size).unwrap();
        let output = Command::new("losetup").args(["-f", "--show", path(&file)]).output().unwrap();
        assert!(output.status.success(), "this test needs root: {}", String::from_utf8_lossy(&output.stderr));
        let device = Self(String::from_utf8(output.stdout).unwrap().trim().into());
        std::os::unix::fs::symlink(&device.0, directory.join(link)).unwrap();
        device
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // A test that fails must leave no device behind; QEMU, which may still have it, ends with the test.
        drop(Command::new("losetup").args(["-d", path(&self.0)]).status());
    }
}

fn drive(image: &Path) -> Drive {
    let (shown, format) = (image.display(), format_of(image));
    let protocol = if image.starts_with("/dev") { "host_device" } else { "file" };
    let file = format!("driver={protocol},node-name=file-vda,filename={shown}");
    let node = format!("driver={format},node-name=fmt-vda,file=file-vda");
    let arguments = ["-blockdev".into(), file, "-blockdev".into(), node].to_vec();
    Drive { id: "vda".into(), image: image.into(), arguments, device: "drive=fmt-vda".into() }
}

/// A VM with one disk that its owner will follow.
async fn lab(base: Base) -> Lab {
    lab_with(base, TempDir::new().unwrap()).await
}

/// The same with its image in a directory that is there.
async fn lab_with(base: Base, directory: TempDir) -> Lab {
    assert_ne!(base, Base::Device);
    let image = images(&directory).join(if base == Base::Raw { "vda.img" } else { "vda.qed" });
    let size = (REGION * REGIONS as u64).to_string();
    run("qemu-img", &["create", "-q", "-f", format_of(&image), path(&image), &size]);
    let mut lab = Lab::start(directory, &[], vec![drive(&image)]).await;
    lab.parameters.insert("follow".into(), "true".into());
    lab
}

/// The same on a block device.
async fn lab_on_device() -> (Lab, Loop) {
    let directory = TempDir::new().unwrap();
    let device = Loop::attach(&directory, REGION * REGIONS as u64);
    let mut lab = Lab::start(directory, &[], vec![drive(&device.0)]).await;
    lab.sessions.roots = ImageRoots::new(vec![lab.images(), "/dev".into()]);
    lab.parameters.insert("follow".into(), "true".into());
    lab.parameters.insert("directory".into(), path(&lab.images()).to_owned());
    (lab, device)
}

/// What the disk is called while it has a layer.
fn layer(lab: &Lab, base: Base) -> PathBuf {
    let name = match base {
        Base::Raw => "vda.img.vmsnap-over-raw.qcow2",
        Base::Qed => "vda.qed.vmsnap-over-qed.qcow2",
        Base::Device => "shop.db-vda.vmsnap-over-raw.qcow2",
    };
    lab.images().join(name)
}

/// Checks all that there is, where the disk's own image must be the one that the status would name.
async fn check(lab: &mut Lab, base: Base) {
    lab.disks[0].image = if lab.snapshots.is_empty() { base.image(lab) } else { layer(lab, base) };
    lab.check().await;
}

/// Restarts the VM as its owner is told to.
async fn follow(lab: &mut Lab, base: Base) {
    let now = if lab.snapshots.is_empty() { base.image(lab) } else { layer(lab, base) };
    lab.machine.kill();
    lab.machine.set_drives(&[drive(&now)]);
    lab.machine.start().await;
    check(lab, base).await;
}

/// What the status says to start the VM with.
fn current(lab: &Lab, base: Base) -> PathBuf {
    let layer = layer(lab, base);
    let is_image = std::fs::metadata(&layer).is_ok_and(|found| found.len() > 0);
    if is_image { layer } else { base.image(lab) }
}

/// The VM runs on an image that isn't the disk any more, and the guest goes on from what it finds there.
async fn start_with_old_command_line(lab: &mut Lab, base: Base, snapshot: u32) {
    lab.machine.kill();
    lab.machine.set_drives(&[drive(&base.image(lab))]);
    lab.machine.start().await;
    lab.disks[0].now = lab.snapshots[&snapshot].views[0];
    lab.write().await;
}

fn write_target_file(lab: &Lab, image: &Path) {
    let disk = json!({"name": "vda", "path": image, "format": format_of(image)});
    // JSON is YAML.
    let text = json!({"disks": [disk]}).to_string();
    std::fs::write(lab.sessions.vm_root.join("shop/db/target.yaml"), text).unwrap();
}
