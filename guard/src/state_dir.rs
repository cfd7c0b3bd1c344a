//! Records on disk: what survives the guard itself.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::protocol::MAX_LINE;
use crate::record::Record;

const RECORD: &str = ".json";
const UNFINISHED: &str = ".tmp";
const SET_ASIDE: &str = ".corrupt";
/// A record came in a line of at most [`MAX_LINE`]; the file adds a little to it.
const MAX_FILE: u64 = 2 * MAX_LINE as u64;

/// The directory of the records. One guard at a time has it open.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    directory: OwnedFd,
    boot_id: String,
}

/// Why a record could not be kept, removed or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory could not be created, opened or locked.
    #[error("open state directory {path}")]
    Open {
        /// The directory.
        path: PathBuf,
        #[source]
        /// Why.
        source: io::Error,
    },
    /// Another guard has it open.
    #[error("state directory {path} is in use by another guard")]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The records could not be listed.
    #[error("list records")]
    List(#[source] io::Error),
    /// A record is not safely on disk.
    #[error("write record")]
    Write(#[source] io::Error),
    /// A record may still be there.
    #[error("remove record")]
    Remove(#[source] io::Error),
}

/// What a record's file holds.
#[derive(Serialize, Deserialize)]
struct Stored {
    boot_id: String,
    record: Record,
}

impl StateDir {
    /// Opens `path`, made if missing, and locks it for as long as the value lives.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Open { path: path.to_owned(), source };
        std::fs::create_dir_all(path).map_err(failed)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(Error::InUse { path: path.to_owned() }),
            locked => locked.map_err(|e| failed(e.into()))?,
        }
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(failed)?;
        Ok(Self { path: path.to_owned(), directory, boot_id: boot_id.trim().to_owned() })
    }

    /// Writes `record` so that it survives a crash of the host from the moment this returns.
    pub(crate) fn save(&self, record: &Record) -> Result<(), Error> {
        let saved = self.write(record);
        if saved.is_err() {
            // Best effort: a leftover is harmless, since nothing was frozen under it, and the next start settles it.
            for suffix in [UNFINISHED, RECORD] {
                let _ = rustix::fs::unlinkat(&self.directory, record.id.clone() + suffix, AtFlags::empty());
            }
        }
        saved.map_err(Error::Write)
    }

    fn write(&self, record: &Record) -> io::Result<()> {
        let (unfinished, name) = (record.id.clone() + UNFINISHED, record.id.clone() + RECORD);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let mut file = File::from(rustix::fs::openat(&self.directory, &unfinished, flags, Mode::RUSR | Mode::WUSR)?);
        let stored = Stored { boot_id: self.boot_id.clone(), record: record.clone() };
        file.write_all(&serde_json::to_vec(&stored)?)?;
        file.sync_all()?;
        rustix::fs::renameat(&self.directory, &unfinished, &self.directory, &name)?;
        Ok(rustix::fs::fsync(&self.directory)?)
    }

    /// Removes the record `id`; one that is not there counts as removed.
    pub(crate) fn remove(&self, id: &str) -> Result<(), Error> {
        match rustix::fs::unlinkat(&self.directory, id.to_owned() + RECORD, AtFlags::empty()) {
            Err(rustix::io::Errno::NOENT) => {}
            removed => removed.map_err(|e| Error::Remove(e.into()))?,
        }
        rustix::fs::fsync(&self.directory).map_err(|e| Error::Remove(e.into()))
    }

    /// The records a former guard left. What cannot be understood is set aside under another name, loudly: a guest may
    /// be frozen that nobody will thaw, but the other records must still be served.
    pub(crate) fn load(&self) -> Result<Vec<Record>, Error> {
        let mut records = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(Error::List)? {
            let Ok(name) = entry.map_err(Error::List)?.file_name().into_string() else { continue };
            if name.ends_with(UNFINISHED) {
                // Never answered with `armed`, so nothing was frozen under it.
                rustix::fs::unlinkat(&self.directory, &name, AtFlags::empty()).map_err(|e| Error::Remove(e.into()))?;
            } else if name.ends_with(RECORD) {
                records.extend(self.load_one(&name)?);
            }
        }
        Ok(records)
    }

    fn load_one(&self, name: &str) -> Result<Option<Record>, Error> {
        match self.read(name) {
            Ok(stored) if stored.boot_id == self.boot_id => Ok(Some(stored.record)),
            Ok(Stored { record, .. }) => {
                tracing::warn!(vm = record.vm, id = record.id, "record of another boot: its VM is gone");
                self.remove(&record.id).map(|()| None)
            }
            Err(error) => {
                tracing::error!(name, %error, "UNREADABLE RECORD set aside: a guest may be frozen, look for it by hand");
                let aside = name.to_owned() + SET_ASIDE;
                if let Err(error) = rustix::fs::renameat(&self.directory, name, &self.directory, &aside) {
                    tracing::error!(name, %error, "unreadable record cannot be renamed and stays");
                }
                Ok(None)
            }
        }
    }

    fn read(&self, name: &str) -> io::Result<Stored> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = File::from(rustix::fs::openat(&self.directory, name, flags, Mode::empty())?);
        let mut text = Vec::new();
        file.take(MAX_FILE).read_to_end(&mut text)?;
        let stored: Stored = serde_json::from_slice(&text)?;
        stored.record.validate().map_err(|invalid| io::Error::new(io::ErrorKind::InvalidData, invalid))?;
        if stored.record.id.clone() + RECORD != name {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the record's id is not its file's name"));
        }
        Ok(stored)
    }
}
