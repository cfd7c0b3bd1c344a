//! What volumes are tagged with: whose they are, and what for.

/// What every volume of ours is tagged with.
pub const OURS: &str = "freezeframe";
/// What a volume is tagged with that a restore has replaced, and that thick snapshots still need: it goes with the last.
pub const REPLACED: &str = "freezeframe-replaced";
/// Of the ids that snapshots and restores mark volumes with, in characters.
const ID_LENGTH: usize = 12;

/// The tag of what was made for one snapshot or restore.
#[must_use]
pub fn tag(id: &str) -> String {
    format!("{OURS}-{id}")
}

/// What its user tags a volume with that copies of a namespace's VMs may go to.
#[must_use]
pub fn target_tag(namespace: &str) -> String {
    format!("{OURS}-target-{namespace}")
}

/// Whether a tag is that of a snapshot or a restore, whichever it is.
#[must_use]
pub fn is_claim(tag: &str) -> bool {
    tag.strip_prefix(OURS).and_then(|rest| rest.strip_prefix('-')).is_some_and(is_id)
}

fn is_id(text: &str) -> bool {
    text.len() == ID_LENGTH && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}
