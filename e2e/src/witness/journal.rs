//! Whether a file system on a raw image needs recovery, and whether it is sound.

use std::ffi::OsStr;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::Filesystem;
use crate::tool::{ask, run};

/// A freeze leaves one deliberate record in XFS's log, so that a crash while frozen still processes unlinked files.
const FROZEN_XFS_LOG_BLOCKS: u64 = 4;

/// Whether there is nothing to replay.
pub(super) fn is_empty(raw: &Path, filesystem: Filesystem) -> Result<bool> {
    match filesystem {
        Filesystem::Ext4 => Ok(!run("dumpe2fs", [OsStr::new("-h"), raw.as_os_str()])?.contains("needs_recovery")),
        Filesystem::Xfs => {
            let (_, log) = ask("xfs_logprint", [OsStr::new("-t"), raw.as_os_str()])?;
            Ok(XfsLog::parse(&log).with_context(|| format!("xfs_logprint printed {log}"))?.is_empty())
        }
    }
}

/// Runs the file system's own checker without letting it write.
pub(super) fn fsck_is_clean(raw: &Path, filesystem: Filesystem) -> Result<bool> {
    let (code, said) = match filesystem {
        Filesystem::Ext4 => ask("e2fsck", [OsStr::new("-fn"), raw.as_os_str()])?,
        Filesystem::Xfs => ask("xfs_repair", [OsStr::new("-n"), raw.as_os_str()])?,
    };
    // 8 and above: e2fsck could not do its work at all.
    ensure!(code < 8, "the checker failed with {code}: {said}");
    Ok(code == 0)
}

/// The part of `xfs_logprint -t` that tells how much there is to replay.
#[derive(Debug, PartialEq, Eq)]
struct XfsLog {
    tail: u64,
    head: u64,
    length: u64,
    clean: bool,
}

impl XfsLog {
    fn parse(printed: &str) -> Option<Self> {
        let words: Vec<&str> = printed.split_whitespace().collect();
        let after = |name: &str| words.iter().skip_while(|word| **word != name).nth(1).copied();
        let number = |name| after(name)?.parse().ok();
        Some(Self {
            length: number("length:")?,
            tail: number("tail:")?,
            head: number("head:")?,
            clean: after("state:")?.contains("CLEAN"),
        })
    }

    fn is_empty(&self) -> bool {
        // The log is a ring.
        let used = (self.head + self.length - self.tail) % self.length;
        self.clean || used == FROZEN_XFS_LOG_BLOCKS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(tail: u64, head: u64, state: &str) -> bool {
        let printed = format!(
            "    data device: 0xffff\n    log device: 0xffff daddr: 524320 length: 131072\n\n    log tail: {tail} head: {head} state: <{state}>\n"
        );
        XfsLog::parse(&printed).is_some_and(|log| log.is_empty())
    }

    #[test]
    fn only_a_clean_or_frozen_log_is_empty() {
        assert!(log(2, 2, "CLEAN"));
        assert!(log(100, 104, "DIRTY"));
        assert!(log(131_070, 2, "DIRTY"));
        assert!(!log(100, 105, "DIRTY"));
        assert!(!log(100, 6285, "DIRTY"));
    }
}
