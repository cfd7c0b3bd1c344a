//! From any object of the API to its type.

use freezeframe_api::v1alpha1::{
    VMRestore, VMRestoreContent, VMSnapshot, VMSnapshotClass, VMSnapshotContent, VMSnapshotSchedule, VMTarget,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Error, Value};

/// What is left of `object` after its type has read and written it.
pub fn round_trip(object: &Value) -> Result<Value, Error> {
    match object["kind"].as_str() {
        Some("VMTarget") => through::<VMTarget>(object),
        Some("VMSnapshot") => through::<VMSnapshot>(object),
        Some("VMSnapshotSchedule") => through::<VMSnapshotSchedule>(object),
        Some("VMSnapshotClass") => through::<VMSnapshotClass>(object),
        Some("VMRestore") => through::<VMRestore>(object),
        Some("VMRestoreContent") => through::<VMRestoreContent>(object),
        Some("VMSnapshotContent") => through::<VMSnapshotContent>(object),
        other => panic!("no type for kind {other:?}"),
    }
}

/// As [`round_trip`], for one type.
pub fn through<T: Serialize + DeserializeOwned>(object: &Value) -> Result<Value, Error> {
    serde_json::to_value(T::deserialize(object)?)
}
