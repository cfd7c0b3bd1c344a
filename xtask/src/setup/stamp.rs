//! Knowing that something was built from exactly these inputs.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The inputs of a built thing, and the file beside it that says what it was built from.
pub struct Stamp {
    path: PathBuf,
    value: String,
}

impl Stamp {
    /// `inputs` is everything that decides what comes out.
    ///
    /// The hash may change with the Rust release; then things are built once more than needed.
    pub fn new(directory: &Path, inputs: &[impl Hash]) -> Self {
        let mut hasher = DefaultHasher::new();
        inputs.hash(&mut hasher);
        Self { path: directory.join("stamp"), value: format!("{:016x}", hasher.finish()) }
    }

    /// Whether the thing is there, from these inputs.
    pub fn is_current(&self) -> bool {
        std::fs::read_to_string(&self.path).is_ok_and(|found| found == self.value)
    }

    /// Says that it is, to be called when everything is in place.
    pub fn write(&self) -> Result<()> {
        std::fs::write(&self.path, &self.value).with_context(|| format!("writing {}", self.path.display()))
    }
}
