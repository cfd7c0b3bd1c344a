//! The class's parameters for `copy`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::drivers::lvm::target::{TARGET_GROUPS, groups};
use crate::drivers::naming::Template;
use crate::drivers::quantity::bytes;
use crate::drivers::{DriverError, Result};

/// The parameter that says where copies go.
pub const DIRECTORY: &str = "directory";
const SPEED: &str = "speed";
const FORMAT: &str = "format";
const COMPRESSED: &str = "compressed";
/// The parameter that names copies.
pub const OUTPUT_TEMPLATE: &str = "outputTemplate";
/// The parameter that says where users' own files are.
pub const TARGETS: &str = "targets";

/// Format of a copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Format {
    /// qcow2.
    #[default]
    Qcow2,
    /// Raw.
    Raw,
}

impl Format {
    /// Its name in QEMU, and the end of a copy's file name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// The parameters, checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// Where copies go; without it nothing is taken.
    pub directory: Option<PathBuf>,
    /// Bytes that the copy of one disk may write in a second; 0, as QEMU has it, for no limit.
    pub speed: u64,
    /// Format of the copies.
    pub format: Format,
    /// Whether the data is compressed.
    pub compressed: bool,
    /// What copies are called, beneath the directory; as the driver likes where absent.
    pub template: Option<Template>,
    /// Below which files are that users made for copies, each namespace's in a directory of its own.
    pub targets: Option<PathBuf>,
    /// Volume groups whose volumes users may name.
    pub target_groups: Vec<String>,
}

impl Parameters {
    /// Reads a class's parameters.
    pub fn parse(given: &BTreeMap<String, String>) -> Result<Self> {
        let mut parameters = Self::default();
        for (key, value) in given {
            parameters.set(key, value).map_err(|why| DriverError::Parameter { key: key.clone(), why })?;
        }
        if parameters.compressed && parameters.format != Format::Qcow2 {
            let why = "needs format qcow2: a raw image can't be compressed".into();
            return Err(DriverError::Parameter { key: COMPRESSED.into(), why });
        }
        Ok(parameters)
    }

    fn set(&mut self, key: &str, value: &str) -> std::result::Result<(), String> {
        match (key, value) {
            (DIRECTORY, path) if Path::new(path).is_absolute() => self.directory = Some(path.into()),
            (TARGETS, path) if Path::new(path).is_absolute() => self.targets = Some(path.into()),
            (DIRECTORY | TARGETS, other) => return Err(format!("`{other}` is not an absolute path")),
            (SPEED, speed) => {
                let refused = || format!("`{speed}` is not a number of bytes a second such as 100Mi");
                self.speed = bytes(speed).ok_or_else(refused)?;
            }
            (FORMAT, "qcow2") => self.format = Format::Qcow2,
            (FORMAT, "raw") => self.format = Format::Raw,
            (FORMAT, other) => return Err(format!("`{other}` is neither qcow2 nor raw")),
            (TARGET_GROUPS, text) => self.target_groups = groups(text)?,
            (OUTPUT_TEMPLATE, text) => self.template = Some(Template::parse(text)?),
            (COMPRESSED, "true" | "false") => self.compressed = value == "true",
            (COMPRESSED, other) => return Err(format!("`{other}` is neither \"true\" nor \"false\"")),
            _ => {
                return Err(format!(
                    "copy doesn't know this one; it knows {DIRECTORY}, {SPEED}, {FORMAT}, {COMPRESSED}, {OUTPUT_TEMPLATE}, {TARGETS}, {TARGET_GROUPS}"
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(given: &[(&str, &str)]) -> Result<Parameters> {
        Parameters::parse(&given.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn what_can_be_used_is_read() {
        let all = [(DIRECTORY, "/copies"), (SPEED, "1Mi"), (FORMAT, "qcow2"), (COMPRESSED, "true")];
        let read = parse(&all).unwrap();
        assert_eq!((read.speed, read.format, read.compressed), (1 << 20, Format::Qcow2, true));
        assert_eq!(parse(&[]).unwrap(), Parameters::default());
        assert_eq!(parse(&[(FORMAT, "raw")]).unwrap().format, Format::Raw);
        assert_eq!(parse(&[(TARGET_GROUPS, "vg1, vg-2")]).unwrap().target_groups, ["vg1", "vg-2"]);
    }

    #[test]
    fn what_cannot_be_used_is_refused_by_its_key() {
        let raw_compressed = [(FORMAT, "raw"), (COMPRESSED, "true")];
        let cases: [(&str, &[(&str, &str)]); 10] = [
            (DIRECTORY, &[(DIRECTORY, "copies")]),
            (SPEED, &[(SPEED, "fast")]),
            (FORMAT, &[(FORMAT, "vmdk")]),
            (COMPRESSED, &[(COMPRESSED, "yes")]),
            (COMPRESSED, &raw_compressed),
            (OUTPUT_TEMPLATE, &[(OUTPUT_TEMPLATE, "../{disk}")]),
            (TARGETS, &[(TARGETS, "targets")]),
            (TARGET_GROUPS, &[(TARGET_GROUPS, "")]),
            (TARGET_GROUPS, &[(TARGET_GROUPS, "vg1,../vg2")]),
            ("colour", &[("colour", "red")]),
        ];
        for (key, given) in cases {
            let refused = parse(given).unwrap_err();
            assert!(matches!(&refused, DriverError::Parameter { key: found, .. } if found == key), "{refused}");
        }
    }
}
