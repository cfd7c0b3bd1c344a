//! The class's parameters for `overlay`.

use std::collections::BTreeMap;

use crate::drivers::{DriverError, Result};

/// The parameter that says whether the VM's owner starts it with what the status names.
pub const FOLLOW: &str = "follow";

/// The parameters, checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// Whether disks are taken whose VM must be started with another image after that.
    pub follow: bool,
}

impl Parameters {
    /// Reads a class's parameters.
    pub fn parse(given: &BTreeMap<String, String>) -> Result<Self> {
        let mut parameters = Self::default();
        for (key, value) in given {
            parameters.set(key, value).map_err(|why| DriverError::Parameter { key: key.clone(), why })?;
        }
        Ok(parameters)
    }

    fn set(&mut self, key: &str, value: &str) -> std::result::Result<(), String> {
        match (key, value) {
            (FOLLOW, "true" | "false") => self.follow = value == "true",
            (FOLLOW, other) => return Err(format!("`{other}` is neither \"true\" nor \"false\"")),
            _ => return Err(format!("overlay doesn't know this one; it knows {FOLLOW}")),
        }
        Ok(())
    }
}
