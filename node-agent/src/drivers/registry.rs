//! Which drivers there are.

use std::sync::Arc;

use super::{SnapshotDriver, btrfs, copy, lvm, overlay, reflink};

/// All drivers, in the default order of preference.
///
/// `lvm` is first for thin volumes; a thick one it takes only where a class sets its `size`, so never by default.
#[must_use]
pub fn registry() -> Vec<Box<dyn SnapshotDriver>> {
    vec![
        Box::new(lvm::Lvm),
        Box::new(reflink::Reflink),
        Box::new(btrfs::Btrfs),
        Box::new(overlay::Overlay),
        Box::new(copy::Copy),
    ]
}

/// The drivers that an agent works with, best first.
#[derive(Clone)]
pub struct Drivers(Vec<Arc<dyn SnapshotDriver>>);

impl Default for Drivers {
    /// All of [`registry`].
    fn default() -> Self {
        Self::new(registry())
    }
}

impl Drivers {
    /// These drivers and no others.
    #[must_use]
    pub fn new(drivers: Vec<Box<dyn SnapshotDriver>>) -> Self {
        Self(drivers.into_iter().map(Arc::from).collect())
    }

    /// The driver of that name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&Arc<dyn SnapshotDriver>> {
        self.iter().find(|driver| driver.name() == name)
    }

    /// All of them, best first.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<dyn SnapshotDriver>> {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::registry;

    #[test]
    fn the_guide_to_drivers_has_a_row_for_each() {
        let guide = include_str!("../../../docs/drivers.md");
        for driver in registry() {
            assert!(
                guide.contains(&format!("\n| `{}` |", driver.name())),
                "docs/drivers.md has no row `{}`",
                driver.name()
            );
        }
    }
}
