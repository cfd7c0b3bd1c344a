//! `docs/api.md`: every field of every kind, from the schemas that the API server enforces.

mod field;

use std::fmt::Write;

use anyhow::{Context, Result};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, CustomResourceDefinitionVersion, JSONSchemaProps,
};

use field::{Field, one_line};

const INTRODUCTION: &str = "\
# The API, field by field

`*` marks what must be given; `[]` is one item of a list, `{}` one value of a map. A field without a default is absent
until it is set. `kubectl explain vmsnapshot.spec` shows the same text.
";

/// The whole page.
pub(super) fn render(crds: &[CustomResourceDefinition]) -> Result<String> {
    let mut page = format!("<!-- {} -->\n\n{INTRODUCTION}", super::NOTE);
    for crd in crds {
        for version in &crd.spec.versions {
            kind(&mut page, crd, version)?;
        }
    }
    Ok(page)
}

fn kind(page: &mut String, crd: &CustomResourceDefinition, version: &CustomResourceDefinitionVersion) -> Result<()> {
    let names = &crd.spec.names;
    let schema = version.schema.as_ref().and_then(|validation| validation.open_api_v3_schema.as_ref());
    let schema = schema.with_context(|| format!("{} has no schema", names.kind))?;
    writeln!(page, "\n## {}\n\n{}\n", names.kind, one_line(schema))?;
    let (group, scope) = (&crd.spec.group, crd.spec.scope.to_lowercase());
    let short_names = quoted(names.short_names.iter().flatten());
    writeln!(page, "`{group}/{}`, {scope}, short name {short_names}.", version.name)?;
    if let Some(fields) = &version.selectable_fields {
        let paths = fields.iter().map(|field| field.json_path.trim_start_matches('.'));
        writeln!(page, "Can be selected by {}.", quoted(paths))?;
    }
    for part in ["spec", "status"] {
        if let Some(found) = schema.properties.as_ref().and_then(|properties| properties.get(part)) {
            section(page, part, found)?;
        }
    }
    Ok(())
}

fn section(page: &mut String, part: &str, schema: &JSONSchemaProps) -> Result<()> {
    writeln!(page, "\n### {part}\n\n{}", one_line(schema))?;
    let fields = field::below(schema);
    if !fields.is_empty() {
        writeln!(page, "\n| field | type | default | meaning |\n|---|---|---|---|")?;
    }
    for field in &fields {
        writeln!(page, "{}", field.row())?;
    }
    let whole = Field::whole(schema);
    let mut rules = whole.rules().chain(fields.iter().flat_map(Field::rules)).peekable();
    if rules.peek().is_some() {
        writeln!(page, "\nRules:\n")?;
    }
    for rule in rules {
        writeln!(page, "- {rule}")?;
    }
    Ok(())
}

fn quoted<T: AsRef<str>>(words: impl IntoIterator<Item = T>) -> String {
    let words: Vec<String> = words.into_iter().map(|word| format!("`{}`", word.as_ref())).collect();
    words.join(", ")
}
