//! The class's parameters for `overlay`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::drivers::{DriverError, Result};

/// The parameter that says whether the VM's owner starts it with what the status names.
pub const FOLLOW: &str = "follow";

/// The parameter that says where layers on block devices go.
pub const DIRECTORY: &str = "directory";

/// The parameters, checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// Whether disks are taken whose VM must be started with another image after that.
    pub follow: bool,
    /// Where layers on block devices go; without it none is taken.
    pub directory: Option<PathBuf>,
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
            (DIRECTORY, path) if Path::new(path).is_absolute() => self.directory = Some(path.into()),
            (DIRECTORY, other) => return Err(format!("`{other}` is not an absolute path")),
            _ => return Err(format!("overlay doesn't know this one; it knows {FOLLOW}, {DIRECTORY}")),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_used_is_refused_by_its_key() {
        let parse = |key: &str, value: &str| Parameters::parse(&BTreeMap::from([(key.to_owned(), value.to_owned())]));
        assert!(parse(FOLLOW, "true").unwrap().follow);
        assert_eq!(parse(FOLLOW, "false").unwrap(), Parameters::default());
        assert_eq!(parse(DIRECTORY, "/layers").unwrap().directory, Some("/layers".into()));
        for (key, value) in [(FOLLOW, "yes"), (DIRECTORY, "layers"), ("colour", "red")] {
            let refused = parse(key, value).unwrap_err();
            assert!(matches!(&refused, DriverError::Parameter { key: found, .. } if found == key), "{refused}");
        }
    }
}
