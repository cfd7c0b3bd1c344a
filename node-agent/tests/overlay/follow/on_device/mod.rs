//! Layers on block devices that the user made.

mod cut_off;
mod further;
mod lost;
mod refused;
mod whole;

use std::path::{Path, PathBuf};
use std::process::Command;

use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::ContentPhase;
use freezeframe_node_agent::hypervisor::image::ImageRoots;
use freezeframe_node_agent::session::journal::Stage;
use freezeframe_node_agent::session::order::Order;

use super::targets::said;
use super::{Base, Loop, drive, lab, lab_on_device};
use crate::lab::{Lab, Snapshot};
use crate::machine::{REGION, REGIONS, path, run, view};

/// Name of the device's node in the namespace's directory of targets.
const NODE: &str = "db";
/// The disk, and what an image of it needs besides.
const SIZE: u64 = 4 << 20;

/// A VM whose snapshot's layer goes to a device.
struct OnDevice {
    lab: Lab,
    base: Base,
    device: Loop,
    _base: Option<Loop>,
    /// The snapshot whose layer is on the device.
    first: Option<u32>,
    /// Orders whose removal left the disk on the device alone.
    moved: Vec<Order>,
}

impl OnDevice {
    async fn start(base: Base) -> Self {
        let (mut lab, base_device) = match base {
            Base::Device => {
                let (lab, device) = lab_on_device().await;
                (lab, Some(device))
            }
            _ => (lab(base).await, None),
        };
        let targets = lab.images().with_file_name("targets");
        std::fs::create_dir_all(targets.join("shop")).unwrap();
        let device = Loop::attach_as(targets.parent().unwrap(), "layer", SIZE);
        // A device's node is copied as one.
        run("cp", &["-a", path(&device.0), path(&targets.join("shop").join(NODE))]);
        lab.sessions.roots = ImageRoots::new(vec![lab.images(), targets.clone(), "/dev".into()]);
        lab.parameters.remove("directory");
        lab.parameters.insert("targets".into(), path(&targets).into());
        lab.targets = [("vda".to_owned(), NODE.to_owned())].into();
        let new = Self { lab, base, device, _base: base_device, first: None, moved: vec![] };
        new.format();
        new
    }

    fn image(&self) -> PathBuf {
        self.base.image(&self.lab)
    }

    /// The user formats the device.
    fn format(&self) {
        let size = (REGION * REGIONS as u64).to_string();
        run("qemu-img", &["create", "-q", "-f", "qcow2", path(&self.device.0), &size]);
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.device.0).unwrap()
    }

    /// The image below the device's, by its header; none if there is none, or no image.
    fn below(&self) -> Option<String> {
        let said = Command::new("qemu-img")
            .args(["info", "-U", "--output=json", "-f", "qcow2", path(&self.device.0)])
            .output()
            .unwrap();
        let said: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap_or_default();
        said["backing-filename"].as_str().map(str::to_owned)
    }

    /// Whether the disk is on the device.
    fn is_on_device(&self) -> bool {
        self.has_first() || !self.moved.is_empty()
    }

    fn has_first(&self) -> bool {
        self.first.is_some_and(|first| self.lab.snapshots.contains_key(&first))
    }

    /// What the VM is to be started with.
    fn disk(&self) -> PathBuf {
        if self.lab.snapshots.len() > usize::from(self.has_first()) {
            return self.lab.images().join("shop.db-vda.vmsnap-over-qcow2.qcow2");
        }
        if self.is_on_device() { self.device.0.clone() } else { self.image() }
    }

    async fn check(&mut self) {
        let on_device = self.is_on_device();
        self.lab.stays_layered = on_device;
        self.lab.disks[0].image = self.disk();
        // The former disk stays, whatever comes of the snapshot.
        let former = on_device && !self.has_first() && self.image().starts_with(self.lab.images());
        let name = self.image().file_name().unwrap().to_str().unwrap().to_owned();
        self.lab.others = if former { vec![name] } else { vec![] };
        self.lab.check().await;
        let below = self.has_first().then(|| path(&self.image()).to_owned());
        assert_eq!(self.below(), below);
    }

    async fn take(&mut self) -> u32 {
        let targets = self.lab.targets.clone();
        if self.is_on_device() {
            self.lab.targets.clear();
        }
        let taken = self.lab.take().await;
        if !self.is_on_device() {
            self.first = Some(taken);
        }
        self.lab.targets = targets;
        self.check().await;
        taken
    }

    /// Deletes until it is over; the former disk must be as it was, and the device hold the disk alone.
    async fn delete(&mut self, number: u32) {
        if self.first != Some(number) {
            self.lab.delete(number).await;
            return self.check().await;
        }
        let former = std::fs::read(self.image()).unwrap();
        let order = self.lab.snapshots[&number].order.clone();
        self.lab.delete(number).await;
        let record = self.lab.sessions.journal.load(&order.uid).unwrap().unwrap();
        assert_eq!(record.stage, Stage::Retained);
        assert!(std::fs::read(self.image()).unwrap() == former, "the former disk was written to");
        self.moved.push(order);
        self.check().await;
    }

    /// The owner starts the VM with an image.
    async fn start_with(&mut self, image: &Path) {
        self.lab.machine.kill();
        self.lab.machine.set_drives(&[drive(image)]);
        self.lab.machine.start().await;
    }

    /// Restarts the VM as its owner is told to.
    async fn follow(&mut self) {
        let now = self.disk();
        self.start_with(&now).await;
        self.check().await;
    }

    fn clear(&self) {
        let of = format!("of={}", path(&self.device.0));
        run("dd", &["if=/dev/zero", &of, "bs=1M", "count=1", "conv=fsync", "status=none"]);
    }

    /// The owner goes back to the former disk, as it is, and makes the device anew.
    async fn start_over(&mut self) {
        self.lab.machine.kill();
        self.clear();
        self.moved.clear();
        self.lab.disks[0].now = view(&self.image());
        let image = self.image();
        self.start_with(&image).await;
        self.format();
        self.check().await;
    }

    /// What comes of an order that must be refused, in words.
    async fn refusal(&mut self) -> (String, String) {
        let (_, order) = self.lab.order();
        let status = self.lab.advance(&order).await;
        assert_eq!(status.phase, Some(ContentPhase::Failed));
        self.lab.delete_order(&order).await;
        said(&status)
    }
}

/// Takes note of a snapshot that became Ready, with what its image says.
fn note(on: &mut OnDevice, number: u32, order: Order) {
    let views = on.lab.handles_of(&order).iter().map(|image| view(image)).collect();
    on.lab.snapshots.insert(number, Snapshot { order, views });
    on.first = Some(number);
}
