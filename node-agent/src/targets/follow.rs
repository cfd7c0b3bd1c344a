//! Whether a VM's command line leads to its disks' newest data, where `overlay` put a layer that its owner has to follow.

use freezeframe_api::conditions::{condition, find, reasons, set, types};
use freezeframe_api::v1alpha1::{TargetDisk, VMTargetStatus};
use k8s_openapi::jiff::Timestamp;

use crate::causes::chain;
use crate::drivers::Layer;
use crate::drivers::overlay::followed;
use crate::hypervisor::VmKey;
use crate::hypervisor::disks::FoundDisk;
use crate::hypervisor::image::ImageRoots;
use crate::session::Sessions;
use crate::session::outcome::start_with;

use super::stopped::known_disk;

/// The disks whose VM was started with another image than it should have been, in words.
#[must_use]
pub fn not_followed(disks: &[FoundDisk]) -> Vec<String> {
    let said =
        disks.iter().filter_map(|disk| Some(format!("disk {}: {}", disk.name, disk.facts.not_followed.as_ref()?)));
    said.collect()
}

/// Takes note of disks that have a layer elsewhere and weren't started with that. Who never had to follow has none, and
/// nobody's records are read for it.
pub fn note_elsewhere(sessions: &Sessions, vm: &VmKey, status: &VMTargetStatus, disks: &mut [FoundDisk]) {
    if find(&status.conditions, types::FOLLOW_NEEDED).is_none() {
        return;
    }
    if let Err(error) = sessions.note_not_followed(vm, disks) {
        tracing::warn!(%vm, error = chain(&error), "it isn't known whether a VM was started as it should be");
    }
}

/// Nothing is said of it until it was needed for the first time.
pub fn report(status: &mut VMTargetStatus, not_followed: &[String]) {
    let new = status.disks.iter().filter_map(|disk| {
        let now = disk.start_with.as_ref()?;
        Some(format!("disk {}: start the VM with {} in format {} next", disk.name.0, now.path, now.format))
    });
    let new: Vec<_> = new.collect();
    let (reason, message) = match (not_followed, new.as_slice()) {
        ([], []) if find(&status.conditions, types::FOLLOW_NEEDED).is_none() => return,
        ([], []) => (reasons::FOLLOWED, String::new()),
        ([], new) => (reasons::NEW_IMAGE, new.join("; ")),
        (left, _) => (reasons::NOT_FOLLOWED, left.join("; ")),
    };
    let needed = reason != reasons::FOLLOWED;
    set(&mut status.conditions, condition(types::FOLLOW_NEEDED, needed, reason, message, None, Timestamp::now()));
}

/// Lets the disks of a stopped VM be what they are by now, where no file says what its command line has: a snapshot, or
/// the removal of one, may have given it another image since it was last seen.
pub fn catch_up(status: &mut VMTargetStatus, roots: &ImageRoots) {
    for disk in &mut status.disks {
        let (seen, now) = (known_disk(disk), followed::now(&known_disk(disk), roots));
        if now != seen {
            follow_to(disk, &Layer { path: now.path, format: now.format });
        }
    }
}

/// A command line that had led elsewhere leads to the disk again: there are only two images that it may be.
fn follow_to(disk: &mut TargetDisk, now: &Layer) {
    let now = start_with(now);
    (disk.source, disk.format) = (now.path.clone(), now.format.clone());
    disk.start_with = if disk.start_with.is_some() { None } else { Some(now) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> TargetDisk {
        let disk = serde_json::json!({"name": "vda", "format": "raw", "source": "/images/a.img", "sizeBytes": 1});
        serde_json::from_value(disk).unwrap()
    }

    #[test]
    fn what_to_start_with_is_told_until_the_vm_is_and_then_that_it_was() {
        let mut status = VMTargetStatus { disks: vec![disk()], ..Default::default() };
        report(&mut status, &[]);
        assert_eq!(status.conditions, []);
        follow_to(&mut status.disks[0], &Layer { path: "/images/b".into(), format: "qcow2".into() });
        report(&mut status, &[]);
        let told = find(&status.conditions, types::FOLLOW_NEEDED).unwrap();
        assert_eq!((told.status.as_str(), told.reason.as_str()), ("True", reasons::NEW_IMAGE));
        assert!(told.message.contains("vda") && told.message.contains("/images/b"), "{}", told.message);
        report(&mut status, &["disk vda: left".into()]);
        assert_eq!(find(&status.conditions, types::FOLLOW_NEEDED).unwrap().reason, reasons::NOT_FOLLOWED);
        follow_to(&mut status.disks[0], &Layer { path: "/images/a.img".into(), format: "raw".into() });
        report(&mut status, &[]);
        let told = find(&status.conditions, types::FOLLOW_NEEDED).unwrap();
        assert_eq!((told.status.as_str(), told.reason.as_str()), ("False", reasons::FOLLOWED));
        assert_eq!(status.disks[0], disk());
    }
}
