//! Reads the corpus of `api/tests/validation/<kind>/`: one rule of the API in one case.
//!
//! - `CASE.yaml` is created. Its status, if any, is written after it, as the API wants it.
//! - `CASE.pre.yaml` is created, then `CASE.post.yaml` is applied over it.
//! - `.err` beside a file makes it one that is refused, with a message that contains the text.
//! - `.stored` beside a file is the spec that is stored, with its defaults.

use std::path::{Path, PathBuf};

use serde_json::Value;

/// One case.
pub struct Case {
    /// `<kind>/<case>`.
    pub name: String,
    /// What is created, or applied over `before`.
    pub object: Value,
    /// What is there already.
    pub before: Option<Value>,
    /// Part of the message with which `object` is refused; accepted when absent.
    pub refusal: Option<String>,
    /// The spec that is stored.
    pub stored: Option<Value>,
}

/// All cases, by name.
pub fn cases() -> Vec<Case> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../api/tests/validation");
    let kinds = list(&corpus).into_iter().filter(|path| path.is_dir());
    let objects = kinds.flat_map(|kind| list(&kind)).filter(|path| is_object(path));
    objects.map(|path| case(&path, &corpus)).collect()
}

fn list(directory: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = directory.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

fn is_object(path: &Path) -> bool {
    let name = path.to_string_lossy();
    name.ends_with(".yaml") && !name.ends_with(".pre.yaml")
}

fn case(path: &Path, corpus: &Path) -> Case {
    let text = path.to_string_lossy();
    let before = text.strip_suffix(".post.yaml").map(|stem| yaml(&format!("{stem}.pre.yaml")));
    let refusal = Path::new(&format!("{text}.err")).exists().then(|| read(&format!("{text}.err")).trim().to_owned());
    let stored = Path::new(&format!("{text}.stored")).exists().then(|| yaml(&format!("{text}.stored")));
    let name = path.strip_prefix(corpus).unwrap().to_string_lossy();
    let name = name.trim_end_matches(".yaml").trim_end_matches(".post").to_owned();
    Case { name, object: yaml(&text), before, refusal, stored }
}

fn yaml(path: &str) -> Value {
    serde_yaml::from_str(&read(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"))
}
