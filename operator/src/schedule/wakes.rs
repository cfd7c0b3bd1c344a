//! Which change of which object has which schedules looked at again. From the caches alone.

use freezeframe_api::SCHEDULE_UID_LABEL;
use freezeframe_api::v1alpha1::{VMSnapshot, VMSnapshotClass, VMSnapshotSchedule, VMTarget};
use kube::ResourceExt as _;
use kube::runtime::reflector::{ObjectRef, Store};

use crate::caches::Guarded;

/// A schedule to be looked at.
pub type Ref = ObjectRef<Guarded<VMSnapshotSchedule>>;

/// A snapshot is news to the schedule that made it.
pub fn by_snapshot(cache: &Store<Guarded<VMSnapshotSchedule>>, snapshot: &Guarded<VMSnapshot>) -> Vec<Ref> {
    let maker = snapshot.labels().get(SCHEDULE_UID_LABEL);
    find(cache, |schedule| maker.is_some() && schedule.uid().as_ref() == maker)
}

/// A VM is news to the schedules of its namespace: one that it was taken out of no longer selects it.
pub fn by_target(cache: &Store<Guarded<VMSnapshotSchedule>>, target: &Guarded<VMTarget>) -> Vec<Ref> {
    find(cache, |schedule| schedule.namespace() == target.namespace())
}

/// A class may have been paused. There are few classes, and they change seldom.
pub fn by_class(cache: &Store<Guarded<VMSnapshotSchedule>>, _class: &Guarded<VMSnapshotClass>) -> Vec<Ref> {
    find(cache, |_| true)
}

fn find(cache: &Store<Guarded<VMSnapshotSchedule>>, wanted: impl Fn(&Guarded<VMSnapshotSchedule>) -> bool) -> Vec<Ref> {
    cache.state().iter().filter(|schedule| wanted(schedule)).map(|schedule| ObjectRef::from_obj(&**schedule)).collect()
}
