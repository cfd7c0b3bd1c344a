//! `cargo xtask codegen`: writes what follows from the API types, `crds/` and `docs/api.md`.

mod reference;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use freezeframe_api::crds;

const NOTE: &str = "Generated from api/src/v1alpha1 by `cargo xtask codegen`; not to be edited.";

/// A file that follows from the types; its path is relative to the repository.
struct Generated {
    path: PathBuf,
    text: String,
}

/// Writes the generated files, or with `check` compares them and fails naming those that are stale.
pub fn run(check: bool) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let files = generate()?;
    if check { compare(&root, &files) } else { write(&root, &files) }
}

fn generate() -> Result<Vec<Generated>> {
    let crds = crds::all();
    let mut files = vec![Generated { path: "docs/api.md".into(), text: reference::render(&crds)? }];
    for crd in &crds {
        let path = Path::new("crds").join(&crd.spec.names.plural).with_extension("yaml");
        files.push(Generated { path, text: format!("# {NOTE}\n{}", serde_yaml::to_string(crd)?) });
    }
    Ok(files)
}

fn write(root: &Path, files: &[Generated]) -> Result<()> {
    for file in files {
        let path = root.join(&file.path);
        std::fs::write(&path, &file.text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

fn compare(root: &Path, files: &[Generated]) -> Result<()> {
    let mut stale = vec![];
    for file in files {
        match std::fs::read_to_string(root.join(&file.path)) {
            Ok(text) if text == file.text => {}
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("reading {}", file.path.display()));
            }
            Ok(_) | Err(_) => stale.push(file.path.display().to_string()),
        }
    }
    ensure!(stale.is_empty(), "stale, run `cargo xtask codegen`: {}", stale.join(", "));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_files_are_up_to_date() {
        run(true).unwrap();
    }

    #[test]
    fn a_changed_or_missing_file_is_named() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let generated = |path: &str, text: &str| Generated { path: path.into(), text: text.into() };
        let files = [
            generated("codegen.rs", include_str!("codegen.rs")),
            generated("main.rs", "somebody's edit"),
            generated("missing.rs", ""),
        ];
        let error = compare(&root, &files).unwrap_err().to_string();
        assert_eq!(error, "stale, run `cargo xtask codegen`: main.rs, missing.rs");
    }
}
