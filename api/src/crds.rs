//! The custom resource definitions as a cluster gets them.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use kube::CustomResourceExt;

use crate::v1alpha1::{VMSnapshot, VMSnapshotClass, VMSnapshotContent, VMTarget};

/// The definition of every kind, in the order in which a reader meets them.
#[must_use]
pub fn all() -> Vec<CustomResourceDefinition> {
    let mut crds = vec![VMTarget::crd(), VMSnapshot::crd(), VMSnapshotClass::crd(), VMSnapshotContent::crd()];
    crds.iter_mut().flat_map(|crd| &mut crd.spec.versions).filter_map(|version| version.schema.as_mut()).for_each(
        |validation| {
            if let Some(schema) = &mut validation.open_api_v3_schema {
                forbid_null(schema);
            }
        },
    );
    crds
}

/// `Option` becomes `nullable`, but we never write `null`, and where it is allowed `has()` of a CEL rule is true of it.
fn forbid_null(schema: &mut JSONSchemaProps) {
    schema.nullable = None;
    schema.properties.iter_mut().flatten().for_each(|(_, property)| forbid_null(property));
    if let Some(JSONSchemaPropsOrArray::Schema(item)) = &mut schema.items {
        forbid_null(item);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(value)) = &mut schema.additional_properties {
        forbid_null(value);
    }
}
