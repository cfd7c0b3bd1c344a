//! Which change of which object has which snapshots looked at again. From the caches alone.

use std::sync::Arc;

use freezeframe_api::v1alpha1::{
    VMRestore, VMRestoreContent, VMSnapshot, VMSnapshotClass, VMSnapshotContent, VMTarget,
};
use freezeframe_api::{RESTORE_NAME_LABEL, RESTORE_NAMESPACE_LABEL, SNAPSHOT_NAME_LABEL, SNAPSHOT_NAMESPACE_LABEL};
use kube::ResourceExt as _;
use kube::runtime::reflector::{ObjectRef, Store};

use crate::caches::Guarded;
use crate::restore;
use crate::vmsnapshot::{is_settled, keeps_nobody_waiting, same_vm};

/// A snapshot to be looked at.
pub type Ref = ObjectRef<Guarded<VMSnapshot>>;

/// A restore to be looked at.
pub type RestoreRef = ObjectRef<Guarded<VMRestore>>;

/// A content's report, or its end, is its snapshot's news. One that can't be read has its labels still.
pub fn by_content(content: &Guarded<VMSnapshotContent>) -> Option<Ref> {
    let (namespace, name) = match &content.0 {
        Ok(content) => (&content.spec.vm_snapshot_ref.namespace, &content.spec.vm_snapshot_ref.name),
        Err(_) => (content.labels().get(SNAPSHOT_NAMESPACE_LABEL)?, content.labels().get(SNAPSHOT_NAME_LABEL)?),
    };
    Some(ObjectRef::new(name).within(namespace))
}

/// A snapshot that needs its VM no more, or can't start, lets the others of that VM pass.
pub fn by_snapshot(cache: &Store<Guarded<VMSnapshot>>, touched: &Guarded<VMSnapshot>) -> Vec<Ref> {
    let Ok(snapshot) = &touched.0 else { return vec![] };
    let gone = cache.get(&ObjectRef::from_obj(touched)).is_none();
    if !gone && !keeps_nobody_waiting(snapshot) {
        return vec![];
    }
    unsettled(cache, |other| same_vm(snapshot, other) && other.uid() != snapshot.uid())
}

/// A VM that comes, goes or changes its state is news to the snapshots that are still to be taken of it.
pub fn by_target(cache: &Store<Guarded<VMSnapshot>>, target: &Guarded<VMTarget>) -> Vec<Ref> {
    let (namespace, name) = (target.namespace(), target.name_any());
    unsettled(cache, |snapshot| snapshot.namespace() == namespace && snapshot.spec.vm_name == name)
}

/// So is a class to those that name it, or would take the default one.
pub fn by_class(cache: &Store<Guarded<VMSnapshot>>, class: &Guarded<VMSnapshotClass>) -> Vec<Ref> {
    let name = class.name_any();
    unsettled(cache, |snapshot| snapshot.spec.class_name.as_ref().is_none_or(|wanted| *wanted == name))
}

/// A restore's content is its restore's news, too.
pub fn by_restore_content(content: &Guarded<VMRestoreContent>) -> Option<RestoreRef> {
    let (namespace, name) = match &content.0 {
        Ok(content) => (&content.spec.vm_restore_ref.namespace, &content.spec.vm_restore_ref.name),
        Err(_) => (content.labels().get(RESTORE_NAMESPACE_LABEL)?, content.labels().get(RESTORE_NAME_LABEL)?),
    };
    Some(ObjectRef::new(name).within(namespace))
}

/// A snapshot is news to the restores that are of it, or that wait for it to keep what they are to replace.
pub fn restores_by_snapshot(cache: &Store<Guarded<VMRestore>>, snapshot: &Guarded<VMSnapshot>) -> Vec<RestoreRef> {
    let (namespace, name) = (snapshot.namespace(), snapshot.name_any());
    let waits = |restore: &VMRestore| {
        let before = restore.status.as_ref().and_then(|status| status.pre_restore_snapshot_name.as_ref());
        restore.namespace() == namespace && (restore.spec.snapshot_name == name || before == Some(&name))
    };
    unsettled_restores(cache, waits)
}

/// So is a restore that came to its end to the others of its namespace, which may have waited for it.
pub fn restores_by_restore(cache: &Store<Guarded<VMRestore>>, touched: &Guarded<VMRestore>) -> Vec<RestoreRef> {
    let ended = touched.0.as_ref().is_ok_and(restore::is_settled) || cache.get(&ObjectRef::from_obj(touched)).is_none();
    let (namespace, uid) = (touched.namespace(), touched.uid());
    unsettled_restores(cache, |other| ended && other.namespace() == namespace && other.uid() != uid)
}

fn unsettled_restores(cache: &Store<Guarded<VMRestore>>, wanted: impl Fn(&VMRestore) -> bool) -> Vec<RestoreRef> {
    let matches = |object: &Arc<Guarded<VMRestore>>| {
        object.0.as_ref().is_ok_and(|restore| !restore::is_settled(restore) && wanted(restore))
    };
    cache.state().iter().filter(|object| matches(object)).map(|object| ObjectRef::from_obj(&**object)).collect()
}

fn unsettled(cache: &Store<Guarded<VMSnapshot>>, wanted: impl Fn(&VMSnapshot) -> bool) -> Vec<Ref> {
    let matches = |object: &Arc<Guarded<VMSnapshot>>| {
        object.0.as_ref().is_ok_and(|snapshot| !is_settled(snapshot) && wanted(snapshot))
    };
    cache.state().iter().filter(|object| matches(object)).map(|object| ObjectRef::from_obj(&**object)).collect()
}

#[cfg(test)]
mod tests {
    use freezeframe_api::conditions::{condition, reasons, types};
    use freezeframe_api::v1alpha1::Phase;
    use kube::core::DeserializeGuard;
    use kube::core::error_boundary::InvalidObject;

    use super::*;
    use crate::caches::Caches;
    use crate::fixtures::{SnapshotExt as _, at, class, content, snapshot, target};

    fn cache(snapshots: &[&VMSnapshot]) -> Store<Guarded<VMSnapshot>> {
        let (caches, mut sources) = Caches::new();
        sources.snapshots.fill(snapshots.iter().copied().cloned());
        caches.snapshots
    }

    fn names(refs: impl IntoIterator<Item = Ref>) -> Vec<String> {
        let mut names: Vec<_> = refs.into_iter().map(|found| found.name).collect();
        names.sort();
        names
    }

    /// Unsettled snapshots `b` of the same VM, `other-vm`, and `other-namespace`.
    fn others() -> [VMSnapshot; 3] {
        let mut others = ["b", "other-vm", "other-namespace"].map(snapshot);
        others[1].spec.vm_name = "db-2".into();
        others[2].metadata.namespace = Some("bank".into());
        others
    }

    #[test]
    fn a_content_wakes_its_snapshot_even_when_it_cannot_be_read() {
        let content = content(&snapshot("a"));
        let metadata = content.metadata.clone();
        for content in [Ok(content), Err(InvalidObject { error: "no field nodeName".into(), metadata })] {
            let woken = by_content(&DeserializeGuard(content)).unwrap();
            assert_eq!((woken.name.as_str(), woken.namespace.as_deref()), ("a", Some("shop")));
        }
    }

    #[test]
    fn a_snapshot_wakes_the_others_of_its_vm_when_it_keeps_them_waiting_no_more() {
        let mut classless = snapshot("a");
        let lacks_class = condition(types::ACCEPTED, false, reasons::CLASS_NOT_FOUND, "", None, at(1));
        classless.status.get_or_insert_default().conditions.push(lacks_class);
        let rows = [
            (snapshot("a"), false),
            (snapshot("a").phase(Phase::Preparing), false),
            (snapshot("a").phase(Phase::Completing), false),
            (snapshot("a").phase(Phase::Ready), true),
            (snapshot("a").phase(Phase::Failed), true),
            (snapshot("a").deleted(), true),
            (classless, true),
        ];
        let [b, other_vm, other_namespace] = others();
        let settled = snapshot("settled").phase(Phase::Ready);
        for (a, wakes) in rows {
            let cache = cache(&[&a, &b, &other_vm, &other_namespace, &settled]);
            let woken = names(by_snapshot(&cache, &DeserializeGuard(Ok(a.clone()))));
            assert_eq!(woken, if wakes { vec!["b"] } else { vec![] }, "{a:?}");
        }
        let gone = DeserializeGuard(Ok(snapshot("a")));
        assert_eq!(names(by_snapshot(&cache(&[&b, &other_vm]), &gone)), ["b"]);
    }

    #[test]
    fn a_vm_wakes_its_own_unsettled_snapshots() {
        let [b, other_vm, other_namespace] = others();
        let settled = snapshot("settled").phase(Phase::Failed);
        let cache = cache(&[&b, &other_vm, &other_namespace, &settled]);
        assert_eq!(names(by_target(&cache, &DeserializeGuard(Ok(target("Running"))))), ["b"]);
    }

    #[test]
    fn a_class_wakes_those_that_name_it_or_none() {
        let [unsaid, mut named, mut of_another] = ["unsaid", "named", "of-another"].map(snapshot);
        named.spec.class_name = Some("standard".into());
        of_another.spec.class_name = Some("gold".into());
        let cache = cache(&[&unsaid, &named, &of_another]);
        assert_eq!(names(by_class(&cache, &DeserializeGuard(Ok(class("standard", false))))), ["named", "unsaid"]);
    }
}
