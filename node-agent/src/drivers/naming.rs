//! What a class calls what is made: a template of safe placeholders, filled into a path beneath a directory.
//!
//! The names that are filled in come from the API and from QEMU, so the result is checked again, part by part.

use k8s_openapi::jiff::Timestamp;

use crate::drivers::DiskTask;

/// Longest part of a path. A file system takes 255 bytes, and an unfinished copy's name has a suffix.
const LONGEST_PART: usize = 200;
/// Most parts of a path.
const MOST_PARTS: usize = 8;

/// A template that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(Vec<Vec<Piece>>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Namespace,
    Vm,
    Disk,
    Snapshot,
    Time,
}

impl Piece {
    fn placeholder(name: &str) -> Option<Self> {
        match name {
            "namespace" => Some(Self::Namespace),
            "vm" => Some(Self::Vm),
            "disk" => Some(Self::Disk),
            "snapshot" => Some(Self::Snapshot),
            "time" => Some(Self::Time),
            _ => None,
        }
    }

    fn fill(&self, task: &DiskTask, now: Timestamp) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Namespace => task.vm.namespace.clone(),
            Self::Vm => task.vm.name.clone(),
            Self::Disk => task.disk.clone(),
            Self::Snapshot => task.snapshot.clone(),
            Self::Time => now.strftime("%Y%m%dT%H%M%SZ").to_string(),
        }
    }
}

impl Template {
    /// Reads a template, or says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parts = text.split('/').map(part).collect::<Result<Vec<_>, _>>()?;
        if parts.len() > MOST_PARTS {
            return Err(format!("`{text}` has more than {MOST_PARTS} parts"));
        }
        if !parts.iter().flatten().any(|piece| *piece == Piece::Disk) {
            return Err(format!("`{text}` has no {{disk}}, so that two disks would have one name"));
        }
        Ok(Self(parts))
    }

    /// Whether it is one name, in no directory of its own.
    pub fn is_one_name(&self) -> bool {
        self.0.len() == 1
    }

    /// The directories and the file's name for a disk, or what can't be filled in.
    pub fn fill(&self, task: &DiskTask, now: Timestamp) -> Result<(Vec<String>, String), String> {
        let filled = |pieces: &Vec<Piece>| pieces.iter().map(|piece| piece.fill(task, now)).collect::<String>();
        let mut parts: Vec<_> = self.0.iter().map(filled).collect();
        if let Some(bad) = parts.iter().find(|part| !is_plain(part)) {
            return Err(format!("`{bad}` is not a file's name of at most {LONGEST_PART} bytes"));
        }
        let file = parts.pop().unwrap_or_default();
        Ok((parts, file))
    }
}

/// Whether a text is one plain name, that no other program takes for hidden, for an option, or for another directory.
pub fn is_plain(part: &str) -> bool {
    let fine = |c: char| c.is_ascii_alphanumeric() || "._-+@=:".contains(c);
    !part.is_empty() && part.len() <= LONGEST_PART && !part.starts_with(['.', '-']) && part.chars().all(fine)
}

fn part(text: &str) -> Result<Vec<Piece>, String> {
    let (mut pieces, mut rest) = (vec![], text);
    while let Some((before, after)) = rest.split_once('{') {
        let (name, behind) = after.split_once('}').ok_or_else(|| format!("`{text}` has an open brace"))?;
        let known = "{namespace}, {vm}, {disk}, {snapshot}, {time}";
        let piece = Piece::placeholder(name).ok_or_else(|| format!("`{{{name}}}` is none of {known}"))?;
        pieces.extend([Piece::Text(before.to_owned()), piece]);
        rest = behind;
    }
    pieces.push(Piece::Text(rest.to_owned()));
    let filled = |piece: &Piece| if let Piece::Text(text) = piece { text.clone() } else { "x".to_owned() };
    let sample: String = pieces.iter().map(filled).collect();
    if !is_plain(&sample) {
        return Err(format!("`{text}` is not a file's or a directory's name beneath the directory"));
    }
    pieces.retain(|piece| !filled(piece).is_empty());
    Ok(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::VmKey;

    fn task(disk: &str) -> DiskTask {
        DiskTask {
            disk: disk.into(),
            driver: "copy".into(),
            reason: String::new(),
            parameters: std::collections::BTreeMap::new(),
            id: "0".into(),
            index: 0,
            node: String::new(),
            format: "raw".into(),
            size: 0,
            path: None,
            chain: vec![],
            vm: VmKey { namespace: "shop".into(), name: "db-1".into() },
            snapshot: "before".into(),
            target: None,
            start_with: None,
            state: serde_json::Value::Null,
            artifact: None,
        }
    }

    #[test]
    fn every_placeholder_is_filled_in() {
        let template = Template::parse("{namespace}/{vm}-{snapshot}/at-{time}.{disk}.img").unwrap();
        let (directories, file) = template.fill(&task("vda"), Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!(directories, ["shop", "db-1-before"]);
        assert_eq!(file, "at-19700101T000000Z.vda.img");
    }

    #[test]
    fn a_template_that_leaves_the_directory_or_says_something_unknown_is_refused() {
        let bad = [
            "",
            "/{disk}",
            "{disk}/",
            "a//{disk}",
            "../{disk}",
            "a/../{disk}",
            "./{disk}",
            ".{disk}",
            "-{disk}",
            "{disk",
            "{colour}{disk}",
            "{}{disk}",
            "{disk}}",
            "{ disk }",
            "{vm}",
            "a b{disk}",
            "{disk}\n",
            "a/b/c/d/e/f/g/h/{disk}",
        ];
        for text in bad {
            assert!(Template::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_disk_whose_name_is_a_path_is_not_filled_in() {
        let template = Template::parse("{disk}").unwrap();
        for disk in ["..", "a/b", "", ".a", &"a".repeat(201)] {
            assert!(template.fill(&task(disk), Timestamp::UNIX_EPOCH).is_err(), "{disk}");
        }
    }
}
