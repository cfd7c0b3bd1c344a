//! The disk's name and the new layer's name change hands.
//!
//! After the cut the VM writes into a new layer, while its command line still names the old one. The exchange gives the
//! new layer the old one's name. Agent and guard may both come to it, one of them late, so it holds a lock on the
//! directory from looking to renaming: swapped twice is not swapped.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, RenameFlags};
use serde::{Deserialize, Serialize};

use crate::record::is_component;

/// How long other exchanges in the directory may take: an fsync each.
const PATIENCE: Duration = Duration::from_millis(400);
const AGAIN: Duration = Duration::from_millis(1);

/// Two names in one directory that change hands at the cut.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exchange {
    /// Absolute path of the directory of both.
    pub directory: PathBuf,
    /// The disk's own name, the one on the VM's command line.
    pub a: String,
    /// The new layer's temporary name.
    pub b: String,
    /// Inode that the name `a` has *before* the exchange; any other means that it was done.
    pub a_inode: u64,
    /// QEMU's node of the new layer: the cut took place if a device writes to it.
    pub when_active: String,
    /// How they change hands.
    pub kind: Kind,
}

/// How two names change hands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// `a` and `b` swap; the old layer lives on under the name `b`.
    Swap,
    /// `b` is renamed over `a`; the old layer loses its name.
    Replace,
}

/// What [`Exchange::apply`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// The names changed hands in this call.
    Now,
    /// `a` had another inode already; nothing was renamed.
    Before,
}

/// Why the names could not change hands.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory could not be opened.
    #[error("open the directory of the exchange")]
    Open(#[source] io::Error),
    /// Someone else is at it; try again.
    #[error("the directory of the exchange is locked by another process")]
    Busy,
    /// The lock could not be taken.
    #[error("lock the directory of the exchange")]
    Lock(#[source] io::Error),
    /// The name `a` could not be looked up.
    #[error("look up the disk's name")]
    LookUp(#[source] io::Error),
    /// The rename failed; both names are as they were.
    #[error("exchange the names")]
    Rename(#[source] io::Error),
    /// The names may have changed hands, but a crash of the host could undo it.
    #[error("sync the directory of the exchange")]
    Sync(#[source] io::Error),
}

impl Exchange {
    /// Exchanges the names unless that was done before, and syncs the directory. Blocks on the file system.
    ///
    /// Whether the cut took place is for the caller to know.
    pub fn apply(&self) -> Result<Applied, Error> {
        let directory = self.open()?;
        lock(&directory)?;
        let applied = self.rename(&directory);
        // Not left to the closing: a program that is being started has a copy of the descriptor, and with it the lock,
        // until it runs.
        rustix::fs::flock(&directory, FlockOperation::Unlock).map_err(|e| Error::Lock(e.into()))?;
        applied
    }

    /// As [`Exchange::apply`], against a holder of the lock that was stopped in the middle of it. When it is woken, it
    /// may swap the names back, but looks once more before it goes on, and swaps them again.
    pub fn apply_over_lock(&self) -> Result<Applied, Error> {
        self.rename(&self.open()?)
    }

    fn open(&self) -> Result<OwnedFd, Error> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(&self.directory, flags, Mode::empty()).map_err(|e| Error::Open(e.into()))
    }

    fn rename(&self, directory: &OwnedFd) -> Result<Applied, Error> {
        let flags = match self.kind {
            Kind::Swap => RenameFlags::EXCHANGE,
            Kind::Replace => RenameFlags::empty(),
        };
        let mut applied = Applied::Before;
        // Until it is seen to be done: what was looked up may be old by the time of the rename.
        while self.is_due(directory)? {
            let renamed = rustix::fs::renameat_with(directory, &self.b, directory, &self.a, flags);
            match renamed {
                Err(_) if !self.is_due(directory)? => {}
                renamed => renamed.map_err(|e| Error::Rename(e.into()))?,
            }
            applied = Applied::Now;
        }
        // Also when it was done before: whoever did it may have died ahead of the sync.
        rustix::fs::fsync(directory).map_err(|e| Error::Sync(e.into()))?;
        Ok(applied)
    }

    fn is_due(&self, directory: &OwnedFd) -> Result<bool, Error> {
        let found = rustix::fs::statat(directory, &self.a, AtFlags::SYMLINK_NOFOLLOW);
        Ok(found.map_err(|e| Error::LookUp(e.into()))?.st_ino == self.a_inode)
    }

    pub(crate) fn is_confined(&self) -> bool {
        let names = is_component(&self.a) && is_component(&self.b) && self.a != self.b;
        self.directory.is_absolute() && names && !self.when_active.is_empty()
    }
}

/// Waits for exchanges of other disks in the same directory, but not for a holder that was stopped.
fn lock(directory: &OwnedFd) -> Result<(), Error> {
    let end = Instant::now() + PATIENCE;
    loop {
        match rustix::fs::flock(directory, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < end => std::thread::sleep(AGAIN),
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(Error::Busy),
            locked => return locked.map_err(|e| Error::Lock(e.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exchange_of(directory: &std::path::Path, a: &str, b: &str) -> Exchange {
        for name in [a, b] {
            std::fs::write(directory.join(name), name).unwrap();
        }
        Exchange {
            directory: directory.to_owned(),
            a: a.into(),
            b: b.into(),
            a_inode: rustix::fs::stat(directory.join(a)).unwrap().st_ino,
            when_active: "node".into(),
            kind: Kind::Swap,
        }
    }

    #[test]
    fn exchanges_in_one_directory_wait_for_each_other_while_programs_are_started() {
        let directory = tempfile::tempdir().unwrap();
        let exchange = |thread: usize| {
            for turn in 0..50 {
                let [a, b] = ["a", "b"].map(|name| format!("{name}-{thread}-{turn}"));
                assert_eq!(exchange_of(directory.path(), &a, &b).apply().unwrap(), Applied::Now);
            }
        };
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let exchange = &exchange;
                scope.spawn(move || exchange(thread));
            }
            scope.spawn(|| {
                (0..50).for_each(|_| assert!(std::process::Command::new("true").status().unwrap().success()));
            });
        });
    }

    #[test]
    fn a_lock_whose_holder_is_stopped_keeps_the_agent_away_but_not_the_guard() {
        let directory = tempfile::tempdir().unwrap();
        let read = |name: &str| std::fs::read_to_string(directory.path().join(name)).unwrap();
        let exchange = exchange_of(directory.path(), "disk", "layer");
        let stopped = exchange.open().unwrap();
        rustix::fs::flock(&stopped, FlockOperation::LockExclusive).unwrap();
        assert!(matches!(exchange.apply(), Err(Error::Busy)));
        assert_eq!(exchange.apply_over_lock().unwrap(), Applied::Now);
        assert_eq!((read("disk").as_str(), read("layer").as_str()), ("layer", "disk"));

        // The holder is woken between its look and its rename.
        rustix::fs::renameat_with(&stopped, "layer", &stopped, "disk", RenameFlags::EXCHANGE).unwrap();
        assert_eq!(exchange.rename(&stopped).unwrap(), Applied::Now);
        assert_eq!((read("disk").as_str(), read("layer").as_str()), ("layer", "disk"));
    }
}
