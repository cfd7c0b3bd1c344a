//! Which driver takes which disk. Pure: the same answer for the VMTarget's report and for a snapshot.

use std::collections::BTreeMap;
use std::sync::Arc;

use freezeframe_api::conditions::reasons;
use freezeframe_api::v1alpha1::ClassDriver;

use super::{DiskFacts, DriverError, Drivers, SnapshotDriver, Verdict};

/// A driver with its class parameters.
pub struct Candidate {
    /// The driver.
    pub driver: Arc<dyn SnapshotDriver>,
    /// Its parameters.
    pub parameters: BTreeMap<String, String>,
}

/// Why a class can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ClassError {
    /// A driver that this agent doesn't have.
    #[error("the class names driver `{0}`, which this node's agent doesn't have; it has {1}")]
    UnknownDriver(String, String),
    /// A parameter that can't be used.
    #[error("the class's parameters for driver `{driver}` can't be used")]
    Parameters {
        /// The driver.
        driver: String,
        /// What is wrong.
        #[source]
        source: Box<DriverError>,
    },
}

impl ClassError {
    /// The condition reason of this error.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::UnknownDriver(..) => reasons::UNKNOWN_DRIVER,
            Self::Parameters { .. } => reasons::INVALID_PARAMETER,
        }
    }
}

/// The drivers that a class allows, best first; the agent's own order when it names none.
pub fn candidates(class: &[ClassDriver], drivers: &Drivers) -> Result<Vec<Candidate>, ClassError> {
    if class.is_empty() {
        let all = drivers.iter().cloned();
        return Ok(all.map(|driver| Candidate { driver, parameters: BTreeMap::new() }).collect());
    }
    class.iter().map(|entry| candidate(entry, drivers)).collect()
}

fn candidate(entry: &ClassDriver, drivers: &Drivers) -> Result<Candidate, ClassError> {
    let name = entry.name.as_str();
    let known = || drivers.iter().map(|driver| driver.name()).collect::<Vec<_>>().join(", ");
    let driver = drivers.find(name).cloned().ok_or_else(|| ClassError::UnknownDriver(name.to_owned(), known()))?;
    driver
        .check_parameters(&entry.parameters)
        .map_err(|source| ClassError::Parameters { driver: name.to_owned(), source: Box::new(source) })?;
    Ok(Candidate { driver, parameters: entry.parameters.clone() })
}

/// The first candidate that can take the disk, and into the user's own file where there is one, with its reason; else
/// every candidate's refusal in one sentence.
pub fn choose<'a>(
    disk: &DiskFacts,
    target: Option<&str>,
    candidates: &'a [Candidate],
) -> Result<(&'a Candidate, String), String> {
    let mut refusals = vec![];
    for candidate in candidates {
        let in_the_way = target.and_then(|_| candidate.driver.why_no_target(disk, &candidate.parameters));
        let verdict = match in_the_way {
            Some(why) => Verdict::Unusable(why),
            None => candidate.driver.can_take(disk, &candidate.parameters),
        };
        match verdict {
            Verdict::Usable(why) => return Ok((candidate, why)),
            Verdict::Unusable(why) => refusals.push(format!("{}: {why}", candidate.driver.name())),
        }
    }
    Err(refusals.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drivers::Writers;

    fn disk(format: &str) -> DiskFacts {
        DiskFacts {
            format: format.into(),
            source: "/images/a".into(),
            path: Ok("/images/a".into()),
            device: Err("not a device".into()),
            on_device: None,
            filesystem: None,
            chain: Err("not looked at".into()),
            encrypted: false,
            has_bitmaps: false,
            writers: Writers::Guest,
            not_followed: None,
        }
    }

    fn class(names: &[&str]) -> Vec<ClassDriver> {
        let parameters = |name: &str| match name {
            "copy" => BTreeMap::from([("directory".to_owned(), "/copies".to_owned())]),
            _ => BTreeMap::new(),
        };
        names.iter().map(|name| ClassDriver { name: (*name).into(), parameters: parameters(name) }).collect()
    }

    #[test]
    fn the_first_driver_that_can_takes_the_disk() {
        let candidates = candidates(&class(&["overlay", "copy"]), &Drivers::default()).unwrap();
        assert_eq!(choose(&disk("qcow2"), None, &candidates).unwrap().0.driver.name(), "overlay");
        assert_eq!(choose(&disk("qcow2"), Some("file"), &candidates).unwrap().0.driver.name(), "copy");
        assert_eq!(choose(&disk("raw"), None, &candidates).unwrap().0.driver.name(), "copy");
    }

    #[test]
    fn a_disk_that_no_driver_can_take_is_refused_with_each_drivers_reason() {
        let candidates = candidates(&class(&["overlay"]), &Drivers::default()).unwrap();
        let refusal = choose(&disk("raw"), None, &candidates).err().unwrap();
        assert!(refusal.starts_with("overlay: ") && refusal.contains("raw"), "{refusal}");
    }

    #[test]
    fn what_only_a_class_can_say_is_asked_of_a_class_by_the_parameters_name() {
        let refusal = |name: &str| {
            let bare = [ClassDriver { name: name.into(), parameters: BTreeMap::new() }];
            choose(&disk("raw"), None, &candidates(&bare, &Drivers::default()).unwrap()).err().unwrap()
        };
        let copy = refusal("copy");
        assert!(copy.contains("needs a class") && copy.contains("`directory`"), "{copy}");
        let lvm = refusal("lvm");
        assert!(lvm.contains("not a logical volume"), "{lvm}");
    }

    #[test]
    fn an_unknown_driver_and_a_bad_parameter_are_told_apart() {
        assert_eq!(candidates(&class(&["zfs"]), &Drivers::default()).err().unwrap().reason(), reasons::UNKNOWN_DRIVER);
        let mut bad = class(&["copy"]);
        bad[0].parameters.insert("colour".into(), "red".into());
        assert_eq!(candidates(&bad, &Drivers::default()).err().unwrap().reason(), reasons::INVALID_PARAMETER);
    }
}
