//! One disk's part of a snapshot, as the journal keeps it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{DriverError, Result};
use crate::hypervisor::VmKey;

/// A file with a disk's data, or a part of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Its path on this node.
    pub path: PathBuf,
    /// Its format.
    pub format: String,
}

/// One disk on its way through a snapshot. Everything a driver must remember is in `state`, in its own form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskTask {
    /// The disk's name, as the VMTarget lists it.
    pub disk: String,
    /// The driver that takes it.
    pub driver: String,
    /// Why this one.
    pub reason: String,
    /// The class's parameters for it.
    pub parameters: BTreeMap<String, String>,
    /// The snapshot's id: short, unique, fit for file and node names.
    pub id: String,
    /// The disk's number in the snapshot: `id` and `index` name what is made.
    pub index: usize,
    /// The node that a cut acts on.
    pub node: String,
    /// Format of the image.
    pub format: String,
    /// Virtual size, in bytes.
    pub size: u64,
    /// Path of the image on this node, if it has one.
    pub path: Option<PathBuf>,
    /// The images of its chain, top first; none where they aren't all files on this node.
    #[serde(default)]
    pub chain: Vec<Layer>,
    /// The VM, as part of the names of files outside its own directory.
    pub vm: VmKey,
    /// Name of the VMSnapshot.
    #[serde(default)]
    pub snapshot: String,
    /// The file that the user made for the data.
    #[serde(default)]
    pub target: Option<String>,
    /// What the disk is after the cut, where the VM's command line leads elsewhere.
    #[serde(default)]
    pub start_with: Option<Layer>,
    /// The driver's own record.
    pub state: Value,
    /// What came of it, once complete.
    pub artifact: Option<Artifact>,
}

/// A complete disk of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    /// Where it is on this node.
    pub handle: PathBuf,
    /// Its format.
    pub format: String,
}

impl DiskTask {
    /// The driver's own record.
    pub fn state<T: serde::de::DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_value(self.state.clone())
            .map_err(|source| DriverError::State { disk: self.disk.clone(), source })
    }

    /// Replaces the driver's own record.
    pub fn set_state(&mut self, state: &impl Serialize) -> Result<()> {
        self.state =
            serde_json::to_value(state).map_err(|source| DriverError::State { disk: self.disk.clone(), source })?;
        Ok(())
    }
}
