//! Logical volumes that users made for the data of their VMs: which one a snapshot names, and whether it may be used.

use super::report::Row;
use super::tags::target_tag;
use super::volume::Volume;
use crate::drivers::{DriverError, Result};

/// The parameter that says in which volume groups users' own volumes may be.
pub const TARGET_GROUPS: &str = "targetGroups";

/// Volume groups as a class names them, or what is wrong with them.
pub fn groups(text: &str) -> std::result::Result<Vec<String>, String> {
    let groups: Vec<_> = text.split(',').map(|group| group.trim().to_owned()).collect();
    match groups.iter().find(|group| Volume::new(group, "any").is_err()) {
        Some(bad) => Err(format!("`{bad}` is not a volume group's name")),
        None => Ok(groups),
    }
}

/// The volume that a disk's target names, if it names one: no file's name has a slash in it.
#[must_use]
pub fn named(target: &str, groups: &[String]) -> Option<Result<Volume>> {
    let (group, name) = target.split_once('/')?;
    let refused = |why: String| DriverError::Target { path: target.into(), why };
    if !groups.iter().any(|allowed| allowed == group) {
        let why = format!("its volume group isn't one of the class's `{TARGET_GROUPS}`");
        return Some(Err(refused(why)));
    }
    Some(Volume::new(group, name).map_err(|error| refused(error.to_string())))
}

/// Why a volume can't take data of a namespace's VMs, by what LVM says of it.
#[must_use]
pub fn why_not(row: &Row, namespace: &str) -> Option<String> {
    match () {
        () if !row.is_plain() => Some("is a snapshot, a snapshot's origin, a pool or a part of something".into()),
        () if !row.is_target_of(namespace) => {
            Some(format!("hasn't tag `{}`, which allows its use", target_tag(namespace)))
        }
        () if row.is_claimed() => Some("has the data of another snapshot".into()),
        () if row.is_open() => Some("is in use".into()),
        () => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_volume_of_a_group_that_the_class_names_is_a_target() {
        let allowed = groups("vg0, vg1").unwrap();
        assert!(named("disk.raw", &allowed).is_none());
        assert_eq!(named("vg1/a", &allowed).unwrap().unwrap(), Volume::new("vg1", "a").unwrap());
        for bad in ["vg2/a", "vg1/../a", "/a", "vg1/", "vg1/pool_tdata"] {
            assert!(matches!(named(bad, &allowed), Some(Err(DriverError::Target { .. }))), "{bad}");
        }
    }
}
