//! The names that change hands, and which image has which: files and logical volumes alike.
//!
//! Everything is looked up by what the images are, so that it may be asked again after a crash.

use super::Restores;
use super::record::{DiskRestore, ImageId};
use crate::drivers::DriverError;
use crate::drivers::lvm::commands;
use crate::drivers::lvm::report::Row;
use crate::drivers::lvm::volume::{NameError, Volume};
use crate::hypervisor::image::{ImageDirectory, ImageError};

/// A name that couldn't be looked up or given.
#[derive(Debug, thiserror::Error)]
pub enum NamesError {
    /// A file's.
    #[error(transparent)]
    File(#[from] ImageError),
    /// A volume's.
    #[error(transparent)]
    Volume(#[from] DriverError),
    /// One that LVM doesn't take.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Neither the old nor the new image has it.
    #[error("{0} is neither the old nor the new image of its disk")]
    Lost(String),
}

type Result<T> = std::result::Result<T, NamesError>;

/// Which image has which of a disk's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "one a name and image; no two exclude each other for sure")]
pub struct Places {
    /// The new image has the name that it was made under.
    pub made_waits: bool,
    /// The new image has the disk's name.
    pub made_is_in: bool,
    /// The old image has the disk's name.
    pub replaced_is_in: bool,
    /// The old image has the name for old ones.
    pub replaced_is_away: bool,
    /// The old image has the name that the new one was made under.
    pub replaced_waits: bool,
    /// Some image has the disk's name.
    pub is_taken: bool,
}

impl Places {
    /// Whether a name has changed hands. Another image of the disk's name says nothing of that: it may be anybody's.
    pub fn has_begun(self) -> bool {
        self.replaced_is_away || self.replaced_waits || (!self.made_waits && !self.replaced_is_in)
    }

    /// Whether the new image got the disk's name. It need not have it any more: the VM may have been cut since. But then
    /// another has.
    pub fn is_finished(self) -> bool {
        !self.made_waits && !self.replaced_is_in && self.is_taken
    }
}

/// One disk's images.
pub enum Names {
    /// Files.
    Files(Files),
    /// Logical volumes.
    Volumes(Volumes),
}

/// One disk's files, and what they are called.
pub struct Files {
    directory: ImageDirectory,
    disk: String,
    unfinished: String,
    away: String,
    made: Option<ImageId>,
    replaced: Option<ImageId>,
}

/// One disk's volumes, and what they are called.
pub struct Volumes {
    disk: Volume,
    unfinished: Volume,
    away: Volume,
    made: Option<ImageId>,
    replaced: Option<ImageId>,
    id: String,
}

impl Names {
    /// The names of a disk of the restore `id`.
    pub fn of(restores: &Restores, disk: &DiskRestore, id: &str) -> Result<Self> {
        let (made, replaced) = (disk.made.clone(), disk.replaced.clone());
        if disk.is_volume() {
            let at = Volume::of_path;
            let (unfinished, away) = (at(&disk.unfinished(id))?, at(&disk.away(id))?);
            return Ok(Self::Volumes(Volumes {
                disk: at(&disk.path)?,
                unfinished,
                away,
                made,
                replaced,
                id: id.into(),
            }));
        }
        let roots = &restores.sessions.roots;
        let (directory, name) = roots.directory_of(&disk.path)?;
        let (_, unfinished) = roots.directory_of(&disk.unfinished(id))?;
        let (_, away) = roots.directory_of(&disk.away(id))?;
        Ok(Self::Files(Files { directory, disk: name, unfinished, away, made, replaced }))
    }

    /// Whether the old image is on record: that it may be replaced was checked.
    pub fn replaces(&self) -> bool {
        match self {
            Self::Files(files) => files.replaced.is_some(),
            Self::Volumes(volumes) => volumes.replaced.is_some(),
        }
    }

    /// Looks which image has which name.
    pub async fn places(&self) -> Result<Places> {
        match self {
            Self::Files(files) => files.places(),
            Self::Volumes(volumes) => Ok(volumes.places(&volumes.rows().await?)),
        }
    }

    /// Takes the disk's name from the old image; true if it had it.
    pub async fn put_away(&self) -> Result<bool> {
        let has_it = self.places().await?.replaced_is_in;
        match self {
            _ if !has_it => {}
            Self::Files(files) => files.directory.rename_new(&files.disk, &files.away)?,
            Self::Volumes(volumes) => commands::rename(&volumes.disk, &volumes.away).await?,
        }
        Ok(has_it)
    }

    /// Gives the old image that is away the disk's name again, which must be free; true if it was.
    pub async fn put_back(&self) -> Result<bool> {
        let is_away = self.places().await?.replaced_is_away;
        match self {
            _ if !is_away => {}
            Self::Files(files) => files.directory.rename_new(&files.away, &files.disk)?,
            Self::Volumes(volumes) => commands::rename(&volumes.away, &volumes.disk).await?,
        }
        Ok(is_away)
    }

    /// Gives the new image the disk's name, which must be free; true if it didn't have it.
    pub async fn bring_in(&self) -> Result<bool> {
        let waits = self.places().await?.made_waits;
        match self {
            _ if !waits => {}
            Self::Files(files) => files.directory.rename_new(&files.unfinished, &files.disk)?,
            Self::Volumes(volumes) => commands::rename(&volumes.unfinished, &volumes.disk).await?,
        }
        Ok(waits)
    }

    /// Lets go of the old image, whose data is kept elsewhere.
    pub async fn let_go(&self) -> Result<()> {
        match self {
            Self::Files(files) => files.let_go(),
            Self::Volumes(volumes) => volumes.let_go().await,
        }
    }

    /// Removes the new image, by the disk's name too if that was free before: an old image is never touched.
    pub async fn take_back(&self, is_new: bool) -> Result<()> {
        let places = self.places().await?;
        let is_ours = is_new && !self.replaces() && places.made_is_in;
        match self {
            Self::Files(files) => {
                if !places.replaced_waits {
                    files.directory.unlink(&files.unfinished)?;
                }
                if is_ours {
                    files.directory.unlink(&files.disk)?;
                }
                Ok(())
            }
            Self::Volumes(volumes) => volumes.take_back(is_ours).await,
        }
    }
}

impl std::fmt::Display for Names {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Files(files) => write!(f, "{}", files.directory.join(&files.disk).display()),
            Self::Volumes(volumes) => write!(f, "{}", volumes.disk),
        }
    }
}

impl Files {
    fn places(&self) -> Result<Places> {
        let at = |name: &str| Ok::<_, ImageError>(self.directory.id(name)?.map(ImageId::File));
        let (disk, unfinished, away) = (at(&self.disk)?, at(&self.unfinished)?, at(&self.away)?);
        let is = |found: &Option<ImageId>, wanted: &Option<ImageId>| wanted.is_some() && found == wanted;
        Ok(Places {
            made_waits: is(&unfinished, &self.made),
            made_is_in: is(&disk, &self.made),
            replaced_is_in: is(&disk, &self.replaced),
            replaced_is_away: is(&away, &self.replaced),
            replaced_waits: is(&unfinished, &self.replaced),
            is_taken: disk.is_some(),
        })
    }

    /// Both names at once, in one step.
    pub fn exchange(&self) -> Result<()> {
        let places = self.places()?;
        if places.replaced_is_in && places.made_waits {
            self.directory.exchange(&self.disk, &self.unfinished)?;
        }
        Ok(())
    }

    fn let_go(&self) -> Result<()> {
        let places = self.places()?;
        for (old, is_old) in [(&self.away, places.replaced_is_away), (&self.unfinished, places.replaced_waits)] {
            if is_old {
                self.directory.unlink(old)?;
            }
        }
        Ok(())
    }
}

impl Volumes {
    async fn rows(&self) -> Result<Vec<Row>> {
        Ok(commands::volumes(self.disk.group()).await?)
    }

    fn places(&self, rows: &[Row]) -> Places {
        let at = |volume: &Volume| rows.iter().find(|row| row.lv_name == volume.name());
        let is = |volume: &Volume, wanted: &Option<ImageId>| {
            let found = at(volume).map(|row| ImageId::Volume(row.lv_uuid.clone()));
            wanted.is_some() && &found == wanted
        };
        Places {
            made_waits: is(&self.unfinished, &self.made),
            made_is_in: is(&self.disk, &self.made),
            replaced_is_in: is(&self.disk, &self.replaced),
            replaced_is_away: is(&self.away, &self.replaced),
            replaced_waits: is(&self.unfinished, &self.replaced),
            is_taken: at(&self.disk).is_some(),
        }
    }

    /// A thick snapshot is nothing without its origin: then that stays, and goes with the last of them.
    async fn let_go(&self) -> Result<()> {
        let rows = self.rows().await?;
        if !self.places(&rows).replaced_is_away {
            return Ok(());
        }
        if rows.iter().any(|row| row.needs(self.away.name())) {
            return Ok(commands::put_away(&self.away).await?);
        }
        Ok(commands::remove(&self.away).await?)
    }

    async fn take_back(&self, by_disks_name: bool) -> Result<()> {
        let rows = self.rows().await?;
        let is_ours = |volume: &Volume| rows.iter().any(|row| row.lv_name == volume.name() && row.is_ours(&self.id));
        if is_ours(&self.unfinished) {
            commands::remove(&self.unfinished).await?;
        }
        if by_disks_name && is_ours(&self.disk) {
            commands::remove(&self.disk).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Places;

    #[test]
    fn a_name_has_changed_hands_from_the_first_rename_on() {
        let before = Places { made_waits: true, replaced_is_in: true, is_taken: true, ..Places::default() };
        let between = Places { made_waits: true, replaced_is_away: true, ..Places::default() };
        let after = Places { made_is_in: true, replaced_is_away: true, is_taken: true, ..Places::default() };
        let over = Places { replaced_is_away: false, ..after };
        assert_eq!([before, between, after, over].map(Places::has_begun), [false, true, true, true]);
        assert_eq!([before, between, after, over].map(Places::is_finished), [false, false, true, true]);
    }

    #[test]
    fn anothers_image_under_the_disks_name_is_not_the_new_one() {
        let strange = Places { made_waits: true, is_taken: true, ..Places::default() };
        assert!(!strange.has_begun() && !strange.is_finished());
    }
}
