//! What the values of an enumeration mean. The schema of a CRD has no place for it, so it goes to the descriptions, where
//! `kubectl explain` finds it.

use std::collections::BTreeMap;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::JSONSchemaProps;
use schemars::SchemaGenerator;
use serde_json::Value;

use crate::v1alpha1::{
    VMRestoreContentSpec, VMRestoreContentStatus, VMRestoreSpec, VMRestoreStatus, VMSnapshotClassSpec,
    VMSnapshotContentSpec, VMSnapshotContentStatus, VMSnapshotScheduleSpec, VMSnapshotSpec, VMSnapshotStatus,
    VMTargetStatus,
};

/// For each enumeration of the API, known by its values, one line a value.
pub(super) struct Meanings(BTreeMap<Vec<String>, String>);

impl Meanings {
    /// Those of all kinds.
    pub(super) fn collect() -> Self {
        let mut generator = SchemaGenerator::default();
        // Called for the definitions that they leave in the generator.
        generator.subschema_for::<VMTargetStatus>();
        generator.subschema_for::<VMSnapshotSpec>();
        generator.subschema_for::<VMSnapshotStatus>();
        generator.subschema_for::<VMSnapshotScheduleSpec>();
        generator.subschema_for::<VMSnapshotClassSpec>();
        generator.subschema_for::<VMSnapshotContentSpec>();
        generator.subschema_for::<VMSnapshotContentStatus>();
        generator.subschema_for::<VMRestoreSpec>();
        generator.subschema_for::<VMRestoreStatus>();
        generator.subschema_for::<VMRestoreContentSpec>();
        generator.subschema_for::<VMRestoreContentStatus>();
        Self(generator.take_definitions(true).values().filter_map(enumeration).collect())
    }

    /// The lines for `schema`, if it is an enumeration.
    pub(super) fn of(&self, schema: &JSONSchemaProps) -> Option<&str> {
        let values: Option<Vec<String>> =
            schema.enum_.as_ref()?.iter().map(|value| value.0.as_str().map(str::to_owned)).collect();
        self.0.get(&values?).map(String::as_str)
    }
}

fn enumeration(definition: &Value) -> Option<(Vec<String>, String)> {
    let variants = definition.get("oneOf")?.as_array()?;
    let variants: Option<Vec<(&str, &str)>> = variants.iter().map(variant).collect();
    let lines = variants.as_ref()?.iter().map(|(value, text)| format!("`{value}`: {text}"));
    let lines = lines.collect::<Vec<_>>().join("\n");
    Some((variants?.into_iter().map(|(value, _)| value.to_owned()).collect(), lines))
}

fn variant(schema: &Value) -> Option<(&str, &str)> {
    Some((schema.get("const")?.as_str()?, schema.get("description")?.as_str()?))
}
