//! A file that the user made for a copy: checked, borrowed under another name while it is written, and given back.
//!
//! Under its own name it is the user's: nothing here unlinks it, and no second snapshot can borrow it meanwhile.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Duration;

use rustix::fs::OFlags;
use serde::Deserialize;

use super::State;
use super::parameters::Format;
use super::parameters::Parameters;
use super::target::{needed, reserve};
use crate::causes::chain;
use crate::drivers::tool::look;
use crate::drivers::{DiskTask, DriverError, Removal, Result};
use crate::hypervisor::image::{ImageDirectory, ImageError};
use crate::hypervisor::lock::ImageLock;
use crate::hypervisor::qcow2::{has_external_data, read_header};

/// Most that is read of a file to see that it is empty, in bytes.
const MOST_READ: u64 = 1 << 20;
/// Bound of listing what an image has.
const LOOK_TIMEOUT: Duration = Duration::from_secs(60);

/// Borrows the file for the copy, unless that is done. What is wrong with it is told as the user's to mend, and
/// [`give_back`] follows.
pub async fn lend(task: &DiskTask, state: &mut State, directory: &ImageDirectory) -> Result<()> {
    let borrowed = state.unfinished();
    if state.id.is_some() && state.id == directory.id(&borrowed)? {
        return Ok(());
    }
    let path = directory.join(&state.file);
    let refused = |why: String| DriverError::Target { path: path.clone(), why };
    let Some(id) = directory.id(&state.file).map_err(|error| refused(chain(&error)))? else {
        return Err(refused("isn't there".into()));
    };
    // Held until it has its other name, under which nobody else looks for it. `qemu-img` would be kept out as well.
    let lock = ImageLock::take(directory, &state.file)?.ok_or_else(|| refused("is in use".into()))?;
    check_file(task, state, directory).map_err(&refused)?;
    state.id = Some(id);
    directory.rename_new(&state.file, &borrowed)?;
    drop(lock);
    check_empty(task, state, directory).await?.map_err(&refused)?;
    let (free, needed) = (directory.free_bytes()?, needed(state.format, task.size));
    if free < needed {
        return Err(DriverError::NoSpace { path, needed, free });
    }
    reserve(directory, &borrowed, needed)
}

/// It is one file, with one name, of the right format and size, and stands alone.
fn check_file(task: &DiskTask, state: &State, directory: &ImageDirectory) -> std::result::Result<(), String> {
    let mut file = File::from(directory.open(&state.file, OFlags::RDWR).map_err(|error| chain(&error))?);
    let found = file.metadata().map_err(|error| error.to_string())?;
    if found.nlink() != 1 {
        return Err("has other names too".into());
    }
    let size = match state.format {
        Format::Raw => found.len(),
        Format::Qcow2 => {
            let header = read_header(&mut file).map_err(|error| chain(&error))?;
            if header.backing.is_some() || has_external_data(&mut file).map_err(|error| chain(&error))? {
                return Err("needs another file".into());
            }
            header.virtual_size
        }
    };
    // QEMU copies only between images of one size.
    if size == task.size { Ok(()) } else { Err(format!("has {size} bytes, and disk {} {}", task.disk, task.size)) }
}

#[derive(Deserialize)]
struct Extent {
    zero: bool,
    length: u64,
    offset: Option<u64>,
}

/// It reads as zeroes, by its own map. The little that was written is read: `qemu-img create` itself writes the first
/// sectors of a raw image.
async fn check_empty(
    task: &DiskTask,
    state: &State,
    directory: &ImageDirectory,
) -> Result<std::result::Result<(), String>> {
    let arguments = ["map", "--output=json", "-f", state.format.name()];
    let seen = look(&arguments, &directory.join(&state.unfinished()), &[], LOOK_TIMEOUT).await?;
    if seen.code != Some(0) {
        return Ok(Err(seen.said));
    }
    let extents: Vec<Extent> = serde_json::from_str(&seen.printed)
        .map_err(|error| DriverError::Tool { tool: "qemu-img", output: error.to_string() })?;
    if Parameters::parse(&task.parameters)?.compressed && extents.iter().any(|extent| extent.offset.is_some()) {
        // QEMU can't write compressed data there, and the guest's own writes would fail with the copy's.
        return Ok(Err("has space set aside, which a compressed copy can't use".into()));
    }
    let written: Vec<_> = extents.iter().filter(|extent| !extent.zero).collect();
    let little = written.iter().map(|extent| extent.length).sum::<u64>() <= MOST_READ;
    let file = File::from(directory.open(&state.unfinished(), OFlags::RDONLY)?);
    let empty = little && written.iter().all(|extent| is_zero(&file, extent));
    Ok(if empty { Ok(()) } else { Err("is not empty".into()) })
}

/// What can't be read isn't seen to be empty.
fn is_zero(file: &File, extent: &Extent) -> bool {
    let Some((offset, length)) = extent.offset.zip(usize::try_from(extent.length).ok()) else { return false };
    let mut data = vec![1; length];
    file.read_exact_at(&mut data, offset).is_ok() && data.iter().all(|byte| *byte == 0)
}

/// Gives the file its own name again, and leaves it to the user with whatever is in it.
pub async fn give_back(directory: &ImageDirectory, state: &State) -> Result<Removal> {
    let borrowed = state.unfinished();
    if directory.id(&borrowed)?.is_some() {
        super::target::settle(directory, state).await?;
        match directory.rename_new(&borrowed, &state.file) {
            Ok(()) => {}
            Err(ImageError::Io { source, .. }) if source.kind() == std::io::ErrorKind::AlreadyExists => {
                let why = format!("{} is taken, and was the name of {borrowed}", directory.join(&state.file).display());
                return Err(DriverError::NotNow(why));
            }
            Err(error) => return Err(error.into()),
        }
    }
    match state.id {
        Some(id) if directory.holds(&state.file, id)? => {
            let path = directory.join(&state.file);
            Ok(Removal::Kept(format!("{} was made by its user and is left", path.display())))
        }
        _ => Ok(Removal::Done),
    }
}
