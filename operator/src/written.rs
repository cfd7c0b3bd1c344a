//! Own writes that the cache doesn't show yet.
//!
//! A reconcile that is started by our own first write may still see the object as it was before our second one, and
//! would write that again, with a new time in it. It waits for the cache instead.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use kube::{Resource, ResourceExt};

/// Resource versions of the last own writes, by UID.
#[derive(Debug, Default)]
pub struct Written {
    versions: Mutex<HashMap<String, u64>>,
}

impl Written {
    /// Remembers an object as the server answered a write.
    pub fn remember<K: Resource>(&self, object: &K) {
        if let (Some(uid), Some(version)) = (object.uid(), version(object)) {
            self.versions.lock().unwrap_or_else(PoisonError::into_inner).insert(uid, version);
        }
    }

    /// Whether the cached object is older than our last write to it. Versions of one kind's objects are ordered
    /// numbers (promised since Kubernetes 1.35, true before); one that isn't a number counts as fresh, which costs a
    /// superfluous write at the worst.
    pub fn is_stale<K: Resource>(&self, cached: &K) -> bool {
        let (Some(uid), Some(version)) = (cached.uid(), version(cached)) else { return false };
        let mut versions = self.versions.lock().unwrap_or_else(PoisonError::into_inner);
        let stale = versions.get(&uid).is_some_and(|written| version < *written);
        if !stale {
            versions.remove(&uid);
        }
        stale
    }
}

fn version<K: Resource>(object: &K) -> Option<u64> {
    object.resource_version()?.parse().ok() // Not a number: see `is_stale`.
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::ConfigMap;

    fn object(version: &str) -> ConfigMap {
        let mut object = ConfigMap::default();
        (object.metadata.uid, object.metadata.resource_version) = (Some("u".into()), Some(version.into()));
        object
    }

    #[test]
    fn a_cached_object_is_stale_until_it_is_as_new_as_our_last_write() {
        let written = Written::default();
        assert!(!written.is_stale(&object("7")));
        written.remember(&object("10"));
        assert!(written.is_stale(&object("9")));
        assert!(!written.is_stale(&object("10")));
        assert!(!written.is_stale(&object("9")), "the version is forgotten once the cache has caught up");
    }

    #[test]
    fn a_version_that_is_not_a_number_counts_as_fresh() {
        let written = Written::default();
        written.remember(&object("10"));
        assert!(!written.is_stale(&object("abc")));
    }
}
