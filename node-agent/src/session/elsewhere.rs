//! Layers that are in another directory than the image that they were made on: a device's, and those in files that users
//! made. No name tells of them, only the records of their snapshots.

use std::path::{Path, PathBuf};

use super::Sessions;
use super::journal::{JournalError, Stage};
use crate::drivers::overlay::followed::{self, may_have_layer_elsewhere};
use crate::hypervisor::VmKey;
use crate::hypervisor::disks::FoundDisk;

impl Sessions {
    /// The images of a VM that have a layer elsewhere, each with that. None is looked for where no disk may have one.
    pub(super) fn layers_elsewhere(
        &self,
        vm: &VmKey,
        mut may_have_one: impl Iterator<Item = bool>,
    ) -> Result<Vec<(PathBuf, PathBuf)>, JournalError> {
        if !may_have_one.any(|may| may) {
            return Ok(vec![]);
        }
        let records = self.journal.all()?;
        let of_vm = records.iter().filter(|record| record.order.vm == *vm && record.stage != Stage::Removed);
        let layers = of_vm.flat_map(|record| record.tasks.iter().map(|task| (record.stage, task)));
        let layers = layers.filter_map(|(stage, task)| Some((stage, followed::image_and_layer(task)?)));
        // Of a snapshot that is gone only its disk would be told.
        let is_layer = |(stage, (image, layer)): &(Stage, (PathBuf, PathBuf))| {
            let unknown = *stage != Stage::Retained && followed::is_missing(layer, &self.roots);
            unknown || followed::is_layer(image, layer, &self.roots)
        };
        Ok(layers.filter(is_layer).map(|(_, found)| found).collect())
    }

    /// The image that has a layer elsewhere, where a disk of a VM is or was at that image or that layer.
    pub(crate) fn image_below_elsewhere(&self, vm: &VmKey, disk: &Path) -> Result<Option<PathBuf>, JournalError> {
        let layers = self.layers_elsewhere(vm, [true].into_iter())?;
        Ok(layers.into_iter().find(|(image, layer)| image == disk || layer == disk).map(|(image, _)| image))
    }

    /// Says of disks that they are images which a layer elsewhere was made on: the VM was not started with that.
    ///
    /// # Errors
    ///
    /// If the journal can't be read.
    pub fn note_not_followed(&self, vm: &VmKey, disks: &mut [FoundDisk]) -> Result<(), JournalError> {
        let may_have_one =
            |disk: &FoundDisk| may_have_layer_elsewhere(&disk.facts.format, Path::new(&disk.facts.source));
        let layers = self.layers_elsewhere(vm, disks.iter().map(may_have_one))?;
        for disk in disks {
            let is_on = |image: &Path| {
                [disk.facts.path.as_deref().ok(), disk.facts.on_device.as_deref()].contains(&Some(image))
            };
            if let Some((image, layer)) = layers.iter().find(|(image, _)| is_on(image)) {
                disk.facts.not_followed = Some(followed::has_layer(image, layer));
            }
        }
        Ok(())
    }
}
