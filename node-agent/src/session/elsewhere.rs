//! Layers that are in another directory than the image that they were made on: a device's, and those in files that users
//! made. No name tells of them, only the records of their snapshots.

use std::path::{Path, PathBuf};

use super::Sessions;
use super::journal::{JournalError, Stage};
use crate::drivers::overlay::{follow, followed};
use crate::hypervisor::VmKey;
use crate::hypervisor::disks::FoundDisk;

impl Sessions {
    /// The images of a VM that have a layer elsewhere, each with that. None is looked for where no disk's `formats` is one
    /// that such an image has.
    pub(super) fn layers_elsewhere<'a>(
        &self,
        vm: &VmKey,
        mut formats: impl Iterator<Item = &'a str>,
    ) -> Result<Vec<(PathBuf, PathBuf)>, JournalError> {
        if !formats.any(|format| follow::FORMATS.contains(&format)) {
            return Ok(vec![]);
        }
        let records = self.journal.all()?;
        let of_vm = records.iter().filter(|record| record.order.vm == *vm && record.stage != Stage::Removed);
        let layers = of_vm.flat_map(|record| &record.tasks).filter_map(followed::image_and_layer);
        Ok(layers.filter(|(image, layer)| followed::is_layer(image, layer, &self.roots)).collect())
    }

    /// The image that has a layer elsewhere, where a disk of a VM is or was at that image or that layer.
    pub(crate) fn image_below_elsewhere(&self, vm: &VmKey, disk: &Path) -> Result<Option<PathBuf>, JournalError> {
        let layers = self.layers_elsewhere(vm, follow::FORMATS.into_iter())?;
        Ok(layers.into_iter().find(|(image, layer)| image == disk || layer == disk).map(|(image, _)| image))
    }

    /// Says of disks that they are images which a layer elsewhere was made on: the VM was not started with that.
    ///
    /// # Errors
    ///
    /// If the journal can't be read.
    pub fn note_not_followed(&self, vm: &VmKey, disks: &mut [FoundDisk]) -> Result<(), JournalError> {
        let layers = self.layers_elsewhere(vm, disks.iter().map(|disk| disk.facts.format.as_str()))?;
        for disk in disks {
            let device = disk.facts.device.as_ref().map(|device| &device.path);
            let is_on = |image: &Path| {
                [disk.facts.path.as_deref().ok(), device.ok().map(PathBuf::as_path)].contains(&Some(image))
            };
            if let Some((image, layer)) = layers.iter().find(|(image, _)| is_on(image)) {
                disk.facts.not_followed = Some(followed::has_layer(image, layer));
            }
        }
        Ok(())
    }
}
