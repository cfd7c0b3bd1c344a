//! What is measured: each storage layer alone, and all of them in one VM.

use freezeframe_e2e::{Format, Place};
use serde_json::{Value, json};

/// How one disk is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    Overlay,
    Reflink,
    Btrfs,
    Copy,
}

/// How the disks of one VM are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Layers {
    Overlay,
    Reflink,
    Btrfs,
    Copy,
    /// One disk each in turn.
    Mixed,
}

impl Layers {
    /// The layer of a disk by its number.
    pub fn of(self, index: usize) -> Layer {
        match self {
            Self::Overlay => Layer::Overlay,
            Self::Reflink => Layer::Reflink,
            Self::Btrfs => Layer::Btrfs,
            Self::Copy => Layer::Copy,
            Self::Mixed => [Layer::Overlay, Layer::Reflink, Layer::Btrfs, Layer::Copy][index % 4],
        }
    }

    pub fn name(self) -> String {
        format!("{self:?}").to_lowercase()
    }

    /// The drivers of a class that has a disk of each layer cut by it.
    pub fn drivers(self, copies: &std::path::Path) -> Value {
        let copy = json!({"name": "copy", "parameters": {"directory": copies}});
        match self {
            Self::Copy => json!([copy]),
            // `reflink` could take what lies on btrfs too, and `copy` all of it.
            Self::Mixed => json!([{"name": "btrfs"}, {"name": "reflink"}, {"name": "overlay"}, copy]),
            one => json!([{"name": one.name()}]),
        }
    }
}

impl Layer {
    /// What a disk of this layer lies on.
    pub fn place(self) -> Place {
        match self {
            Self::Overlay | Self::Copy => Place::Plain,
            Self::Reflink => Place::Xfs,
            Self::Btrfs => Place::Btrfs,
        }
    }

    /// The format in which the layer takes it, and no better one of a mixed VM does.
    pub fn format(self) -> Format {
        if self == Self::Overlay { Format::Qcow2 } else { Format::Raw }
    }
}
