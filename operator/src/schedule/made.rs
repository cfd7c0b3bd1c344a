//! The snapshot that a schedule makes of a VM at one of its times. Pure.

use std::collections::BTreeMap;

use freezeframe_api::v1alpha1::{
    ScheduleDeletionPolicy, SnapshotTemplate, VMSnapshot, VMSnapshotSchedule, VMSnapshotSpec,
};
use freezeframe_api::{SCHEDULE_NAME_LABEL, SCHEDULE_UID_LABEL, SCHEDULED_TIME_ANNOTATION};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use k8s_openapi::jiff::Timestamp;
use kube::core::ObjectMeta;
use kube::{Resource as _, ResourceExt as _};

use super::timing::hash;

/// Longest name of an object, in bytes.
const NAME_LENGTH: usize = 253;

/// Longest value of a label, in bytes.
const LABEL_LENGTH: usize = 63;

/// The snapshot of the VM for a time of the schedule. Whoever makes it, and however often, it has the same name.
pub fn snapshot(schedule: &VMSnapshotSchedule, vm: &str, time: Timestamp) -> VMSnapshot {
    // No `..`: a new field of a template doesn't compile until it is carried over.
    let SnapshotTemplate { labels, class_name, consistency, quiesce, disks, failure_deadline, deletion_policy } =
        schedule.spec.template.clone();
    let mut metadata = metadata(schedule, time);
    metadata.name = Some(name(&schedule.name_any(), vm, time));
    metadata.labels.get_or_insert_default().extend(labels);
    let spec = VMSnapshotSpec {
        vm_name: vm.to_owned(),
        class_name,
        consistency,
        quiesce,
        disks,
        failure_deadline,
        deletion_policy,
        hold: false,
    };
    VMSnapshot { metadata, spec, status: None }
}

fn metadata(schedule: &VMSnapshotSchedule, time: Timestamp) -> ObjectMeta {
    let cut: String = schedule.name_any().chars().take(LABEL_LENGTH).collect();
    let owned = schedule.spec.deletion_policy == ScheduleDeletionPolicy::Delete;
    ObjectMeta {
        namespace: schedule.namespace(),
        labels: Some(BTreeMap::from([
            (SCHEDULE_NAME_LABEL.to_owned(), cut.trim_end_matches(['-', '.']).to_owned()),
            (SCHEDULE_UID_LABEL.to_owned(), schedule.uid().unwrap_or_default()),
        ])),
        annotations: Some(BTreeMap::from([(SCHEDULED_TIME_ANNOTATION.to_owned(), time.to_string())])),
        owner_references: owned.then(|| vec![owner(schedule)]),
        ..ObjectMeta::default()
    }
}

/// The mark by which Kubernetes deletes a snapshot after its schedule.
pub fn owner(schedule: &VMSnapshotSchedule) -> OwnerReference {
    OwnerReference {
        api_version: VMSnapshotSchedule::api_version(&()).into_owned(),
        kind: VMSnapshotSchedule::kind(&()).into_owned(),
        name: schedule.name_any(),
        uid: schedule.uid().unwrap_or_default(),
        ..OwnerReference::default()
    }
}

/// Whether the snapshot is one that this schedule made.
pub fn is_of(schedule: &VMSnapshotSchedule, snapshot: &VMSnapshot) -> bool {
    let uid = schedule.metadata.uid.as_ref();
    uid.is_some() && snapshot.labels().get(SCHEDULE_UID_LABEL) == uid && snapshot.namespace() == schedule.namespace()
}

/// The time of the schedule that the snapshot was made for. One that somebody has broken counts as none.
pub fn time_of(snapshot: &VMSnapshot) -> Option<Timestamp> {
    snapshot.annotations().get(SCHEDULED_TIME_ANNOTATION)?.parse().ok()
}

/// `<schedule>-<vm>-<time>`; where that is too long, what is before the time is cut, and a sum of it takes its place.
pub fn name(schedule: &str, vm: &str, time: Timestamp) -> String {
    let name = format!("{schedule}-{vm}-{}", in_name(time));
    if name.len() <= NAME_LENGTH { name } else { summed_name(schedule, vm, time) }
}

/// The name to take where another schedule's snapshot has the usual one: `a-b` of `c` and `a` of `b-c` have the same.
pub fn summed_name(schedule: &str, vm: &str, time: Timestamp) -> String {
    let end = format!("-{:016x}-{}", hash(&format!("{schedule}/{vm}")), in_name(time));
    let cut: String = format!("{schedule}-{vm}").chars().take(NAME_LENGTH - end.len()).collect();
    format!("{}{end}", cut.trim_end_matches(['-', '.']))
}

fn in_name(time: Timestamp) -> String {
    time.strftime("%Y%m%dt%H%M%Sz").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_schedule_vm_and_time_and_fits_however_long_they_are() {
        let time: Timestamp = "2026-01-02T03:04:05Z".parse().unwrap();
        assert_eq!(name("nightly", "db-1", time), "nightly-db-1-20260102t030405z");
        let long = format!("{}.{}", "a".repeat(62), "b".repeat(160));
        let (one, other) = (name(&long, &"c".repeat(253), time), name(&long, &"d".repeat(253), time));
        assert!(one.len() <= 253 && one.ends_with("-20260102t030405z"), "{one}");
        assert_ne!(one, other, "VMs are told apart though their names are cut off");
        assert_ne!(summed_name("a-b", "c", time), summed_name("a", "b-c", time));
    }

    #[test]
    fn a_cut_never_ends_in_what_a_name_must_not_have_there() {
        let time: Timestamp = "2026-01-02T03:04:05Z".parse().unwrap();
        for length in 215..225 {
            for end in [".x", "-x"] {
                let name = name(&format!("{}{end}", "a".repeat(length)), &"c".repeat(100), time);
                assert!(!name.contains(".-") && !name.contains("--"), "{name}");
            }
        }
    }
}
