//! The class's parameters for `overlay`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::drivers::lvm::target::{TARGET_GROUPS, groups};
use crate::drivers::naming::Template;
use crate::drivers::{DriverError, Result};

/// The parameter that says whether the VM's owner starts it with what the status names.
pub const FOLLOW: &str = "follow";

/// The parameter that says where layers on block devices go.
pub const DIRECTORY: &str = "directory";

/// The parameter that says where users' own files are.
pub const TARGETS: &str = "targets";

/// The parameter that names the former disks of qcow2 disks, beside them.
pub const OUTPUT_TEMPLATE: &str = "outputTemplate";

/// The parameters, checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// Whether disks are taken whose VM must be started with another image after that.
    pub follow: bool,
    /// Where layers on block devices go; without it none is taken.
    pub directory: Option<PathBuf>,
    /// Below which files are that users made for layers, each namespace's in a directory of its own.
    pub targets: Option<PathBuf>,
    /// Volume groups whose volumes users may name for layers.
    pub target_groups: Vec<String>,
    /// What a snapshot's image is called, beside the disk; as the driver likes where absent.
    pub template: Option<Template>,
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

    /// Whether a layer may go elsewhere than beside the disk, which for a block device it must.
    pub fn has_a_place_for_layers(&self) -> bool {
        self.directory.is_some() || self.targets.is_some() || !self.target_groups.is_empty()
    }

    fn set(&mut self, key: &str, value: &str) -> std::result::Result<(), String> {
        match (key, value) {
            (FOLLOW, "true" | "false") => self.follow = value == "true",
            (FOLLOW, other) => return Err(format!("`{other}` is neither \"true\" nor \"false\"")),
            (DIRECTORY, path) if Path::new(path).is_absolute() => self.directory = Some(path.into()),
            (TARGETS, path) if Path::new(path).is_absolute() => self.targets = Some(path.into()),
            (TARGET_GROUPS, text) => self.target_groups = groups(text)?,
            (OUTPUT_TEMPLATE, text) => self.template = Some(one_name(text)?),
            (DIRECTORY | TARGETS, other) => return Err(format!("`{other}` is not an absolute path")),
            _ => {
                return Err(format!(
                    "overlay doesn't know this one; it knows {FOLLOW}, {DIRECTORY}, {TARGETS}, {TARGET_GROUPS}, {OUTPUT_TEMPLATE}"
                ));
            }
        }
        Ok(())
    }
}

/// Names change hands within one directory: in another one, a crash half way could leave the disk without a name.
fn one_name(text: &str) -> std::result::Result<Template, String> {
    let template = Template::parse(text)?;
    if template.is_one_name() {
        return Ok(template);
    }
    Err(format!("`{text}` leads to another directory, and a snapshot's image stays beside the disk that it was"))
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
        assert_eq!(parse(TARGETS, "/targets").unwrap().targets, Some("/targets".into()));
        assert_eq!(parse(TARGET_GROUPS, "vg0,vg1").unwrap().target_groups, ["vg0", "vg1"]);
        for (key, value) in [
            (TARGET_GROUPS, "vg0/a"),
            (FOLLOW, "yes"),
            (DIRECTORY, "layers"),
            (TARGETS, "targets"),
            (OUTPUT_TEMPLATE, "{vm}/{disk}"),
            (OUTPUT_TEMPLATE, "{vm}"),
            ("colour", "red"),
        ] {
            let refused = parse(key, value).unwrap_err();
            assert!(matches!(&refused, DriverError::Parameter { key: found, .. } if found == key), "{refused}");
        }
    }
}
