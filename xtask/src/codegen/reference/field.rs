//! One row of a table: a field of a schema, and where in the object it is.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    JSON, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};

/// A field and its place.
pub(super) struct Field<'a> {
    path: String,
    required: bool,
    schema: &'a JSONSchemaProps,
}

/// Every field below `schema`, parents first.
pub(super) fn below(schema: &JSONSchemaProps) -> Vec<Field<'_>> {
    let mut fields = vec![];
    collect("", schema, &mut fields);
    fields
}

fn collect<'a>(path: &str, schema: &'a JSONSchemaProps, fields: &mut Vec<Field<'a>>) {
    for (name, property) in schema.properties.iter().flatten() {
        let required = schema.required.iter().flatten().any(|required| required == name);
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        fields.push(Field { path: path.clone(), required, schema: property });
        // Kubernetes' own type, the same in every API.
        if name != "conditions" {
            collect(&path, property, fields);
        }
    }
    if let Some(item) = item(schema) {
        collect(&format!("{path}[]"), item, fields);
    }
    if let Some(value) = value(schema) {
        collect(&format!("{path}{{}}"), value, fields);
    }
}

impl<'a> Field<'a> {
    /// The part of the object that `schema` is, itself.
    pub(super) fn whole(schema: &'a JSONSchemaProps) -> Self {
        Self { path: String::new(), required: true, schema }
    }

    /// The field as a row of a table.
    pub(super) fn row(&self) -> String {
        let mark = if self.required { "\\*" } else { "" };
        let default = self.schema.default.as_ref().map(literal).unwrap_or_default();
        let cells = [format!("`{}`{mark}", self.path), kind(self.schema), default, one_line(self.schema)];
        format!("| {} |", cells.map(|cell| cell.replace('|', "\\|")).join(" | "))
    }

    /// The field's rules in CEL, each as message and expression.
    pub(super) fn rules(&self) -> impl Iterator<Item = String> {
        let place = if self.path.is_empty() { String::new() } else { format!("`{}`: ", self.path) };
        self.schema
            .x_kubernetes_validations
            .iter()
            .flatten()
            .map(move |rule| format!("{place}{}: `{}`", rule.message.as_deref().unwrap_or("refused unless"), rule.rule))
    }
}

/// A schema's description without line breaks.
pub(super) fn one_line(schema: &JSONSchemaProps) -> String {
    let text = schema.description.as_deref().unwrap_or_default();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn item(schema: &JSONSchemaProps) -> Option<&JSONSchemaProps> {
    match &schema.items {
        Some(JSONSchemaPropsOrArray::Schema(item)) => Some(item),
        Some(JSONSchemaPropsOrArray::Schemas(_)) | None => None,
    }
}

fn value(schema: &JSONSchemaProps) -> Option<&JSONSchemaProps> {
    match &schema.additional_properties {
        Some(JSONSchemaPropsOrBool::Schema(value)) => Some(value),
        Some(JSONSchemaPropsOrBool::Bool(_)) | None => None,
    }
}

fn kind(schema: &JSONSchemaProps) -> String {
    if let Some(values) = &schema.enum_ {
        return values.iter().map(literal).collect::<Vec<_>>().join(" or ");
    }
    if let Some(item) = item(schema) {
        let most = schema.max_items.map(|most| format!("at most {most} ")).unwrap_or_default();
        return format!("list of {most}{}", kind(item));
    }
    if let Some(value) = value(schema) {
        return format!("map to {}", kind(value));
    }
    let name = schema.format.as_deref().or(schema.type_.as_deref()).unwrap_or_default();
    let pattern = schema.pattern.as_ref().map(|pattern| format!(" `{pattern}`")).unwrap_or_default();
    let most = schema.max_length.map(|most| format!(", at most {most} characters")).unwrap_or_default();
    format!("{name}{pattern}{most}")
}

fn literal(value: &JSON) -> String {
    match &value.0 {
        serde_json::Value::String(text) => format!("`{text}`"),
        other => format!("`{other}`"),
    }
}
