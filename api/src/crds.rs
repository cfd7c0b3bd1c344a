//! The custom resource definitions as a cluster gets them.

mod meanings;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use kube::CustomResourceExt;

use crate::v1alpha1::{
    VMRestore, VMRestoreContent, VMSnapshot, VMSnapshotClass, VMSnapshotContent, VMSnapshotSchedule, VMTarget,
};
use meanings::Meanings;

/// The definition of every kind, in the order in which a reader meets them.
#[must_use]
pub fn all() -> Vec<CustomResourceDefinition> {
    let meanings = Meanings::collect();
    let mut crds = vec![
        VMTarget::crd(),
        VMSnapshot::crd(),
        VMSnapshotSchedule::crd(),
        VMSnapshotClass::crd(),
        VMSnapshotContent::crd(),
        VMRestore::crd(),
        VMRestoreContent::crd(),
    ];
    let validations = crds.iter_mut().flat_map(|crd| &mut crd.spec.versions).flat_map(|version| &mut version.schema);
    for schema in validations.flat_map(|validation| &mut validation.open_api_v3_schema) {
        polish(schema, &meanings);
    }
    crds
}

fn polish(schema: &mut JSONSchemaProps, meanings: &Meanings) {
    // An `Option` becomes nullable, but nobody writes `null`, and a rule's `has()` would be true of it.
    schema.nullable = None;
    if let Some(meaning) = meanings.of(schema) {
        let description = schema.description.get_or_insert_default();
        *description = format!("{description}\n{meaning}");
    }
    schema.properties.iter_mut().flatten().for_each(|(_, property)| polish(property, meanings));
    if let Some(JSONSchemaPropsOrArray::Schema(item)) = &mut schema.items {
        polish(item, meanings);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(value)) = &mut schema.additional_properties {
        polish(value, meanings);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec_field(kind: &str, field: &str) -> JSONSchemaProps {
        let crd = all().into_iter().find(|crd| crd.spec.names.kind == kind).unwrap();
        let schema = crd.spec.versions[0].schema.clone().unwrap().open_api_v3_schema.unwrap();
        schema.properties.unwrap()["spec"].properties.clone().unwrap()[field].clone()
    }

    #[test]
    fn an_optional_field_does_not_take_null() {
        assert_eq!(spec_field("VMSnapshot", "className").nullable, None);
    }

    #[test]
    fn an_optional_enumeration_keeps_its_own_description_and_says_what_its_values_mean() {
        let description = spec_field("VMSnapshot", "deletionPolicy").description.unwrap();
        assert!(description.starts_with("What happens to the data when this object is deleted. Set by the user"));
        assert!(description.contains("\n`Retain`: The data stays on the node"), "{description}");
    }
}
