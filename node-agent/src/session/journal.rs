//! What a session or a restore must remember over a crash: one file each, written before the effect it speaks of.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use freezeframe_api::v1alpha1::{BootCheck, VMSnapshotContentStatus};
use k8s_openapi::jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::at_rest::AtRest;
use super::order::Order;
use super::window::Measured;
use crate::drivers::DiskTask;

/// How far a session came, for whoever finds its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    /// Nothing is sure to have been cut: whatever is found is taken back.
    Open,
    /// The window has closed after a good cut: what is left is to complete it.
    Cut,
    /// Every disk is complete.
    Complete,
    /// It failed, or was cancelled: what is left is to take everything back.
    Failed,
    /// Its artifacts are gone, or were never made.
    Removed,
    /// Its artifacts were kept on purpose.
    Retained,
}

/// The record of one snapshot on this node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SessionRecord {
    /// The work order.
    pub order: Order,
    /// How far it came.
    pub stage: Stage,
    /// The disks.
    pub tasks: Vec<DiskTask>,
    /// What was measured in the window.
    pub measured: Option<Measured>,
    /// What came of starting from the disks, where that was asked for.
    #[serde(default)]
    pub boot: Option<BootCheck>,
    /// What was, or is to be, reported.
    pub status: Option<VMSnapshotContentStatus>,
    /// Whether removing it was begun: an image may have been written to since.
    #[serde(default)]
    pub removing: bool,
    /// Of which disks, by their places among `tasks`, something may have been removed: their directories may be empty since.
    #[serde(default)]
    pub removed_from: BTreeSet<usize>,
    /// When the record was begun.
    pub begun: Timestamp,
    /// Directories in which restores made images on top of the snapshot's data.
    #[serde(default)]
    pub linked_in: Vec<PathBuf>,
    /// The disks' images when the snapshot was complete, if the VM was stopped all the time.
    #[serde(default)]
    pub at_rest: Vec<AtRest>,
}

/// What a journal keeps: one record for each object's UID.
pub trait Record: Serialize + DeserializeOwned {
    /// UID of the object that the record is of.
    fn uid(&self) -> &str;
}

impl Record for SessionRecord {
    fn uid(&self) -> &str {
        &self.order.uid
    }
}

impl SessionRecord {
    /// The record of an order of which nothing has been made yet.
    #[must_use]
    pub fn nothing(order: &Order) -> Self {
        Self {
            order: order.clone(),
            stage: Stage::Open,
            tasks: vec![],
            measured: None,
            boot: None,
            status: None,
            removing: false,
            removed_from: BTreeSet::new(),
            begun: Timestamp::now(),
            linked_in: vec![],
            at_rest: vec![],
        }
    }
}

/// Why the journal can't be used.
#[derive(Debug, thiserror::Error)]
#[error("failed to {doing} {path}")]
pub struct JournalError {
    doing: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The directory of all records of one kind.
#[derive(Clone, Debug)]
pub struct Journal<R = SessionRecord> {
    directory: PathBuf,
    records: PhantomData<R>,
}

impl<R: Record> Journal<R> {
    /// Opens the journal in `directory`, which is made if it isn't there.
    pub fn open(directory: PathBuf) -> Result<Self, JournalError> {
        fs::create_dir_all(&directory).map_err(failed("make", &directory))?;
        Ok(Self { directory, records: PhantomData })
    }

    /// Writes a record; it is on disk when this returns.
    pub fn save(&self, record: &R) -> Result<(), JournalError> {
        let path = self.path(record.uid());
        let unfinished = path.with_extension("new");
        let text = serde_json::to_vec_pretty(record).map_err(io::Error::other);
        let write = || -> io::Result<()> {
            let mut file = File::create(&unfinished)?;
            file.write_all(&text?)?;
            file.sync_all()?;
            fs::rename(&unfinished, &path)?;
            File::open(&self.directory)?.sync_all()
        };
        write().map_err(failed("write", &path))
    }

    /// The record of an object; none if nothing was ever begun here.
    pub fn load(&self, uid: &str) -> Result<Option<R>, JournalError> {
        let path = self.path(uid);
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(io::Error::from).map_err(failed("read", &path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read", &path)(error)),
        }
    }

    /// All records that can be read; others are left alone and logged.
    pub fn all(&self) -> Result<Vec<R>, JournalError> {
        let mut records = vec![];
        for uid in self.uids()? {
            match self.load(&uid) {
                Ok(record) => records.extend(record),
                Err(error) => tracing::error!(%error, "a record can't be read"),
            }
        }
        Ok(records)
    }

    /// All records; it fails where one can't be read.
    pub fn every(&self) -> Result<Vec<R>, JournalError> {
        let records = self.uids()?.into_iter().filter_map(|uid| self.load(&uid).transpose());
        records.collect()
    }

    fn uids(&self) -> Result<Vec<String>, JournalError> {
        let entries = fs::read_dir(&self.directory).map_err(failed("list", &self.directory))?;
        let mut uids = vec![];
        for entry in entries {
            let name = entry.map_err(failed("list", &self.directory))?.file_name();
            uids.extend(name.to_str().and_then(|name| name.strip_suffix(".json")).map(str::to_owned));
        }
        Ok(uids)
    }

    /// Forgets an object of which nothing is left.
    pub fn forget(&self, uid: &str) -> Result<(), JournalError> {
        let path = self.path(uid);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("delete", &path)(error)),
            _ => Ok(()),
        }
    }

    /// A UID is the API server's: hexadecimal digits and dashes. Anything else has no record.
    fn path(&self, uid: &str) -> PathBuf {
        let safe: String = uid.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
        self.directory.join(safe + ".json")
    }
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> JournalError {
    let path = path.to_owned();
    move |source| JournalError { doing, path, source }
}
