//! Which images need a file as it stands, whoever made them.

use std::fs::File;
use std::path::Path;

use rustix::fs::OFlags;

use crate::drivers::{DriverError, Env, Removal, Result};
use crate::hypervisor::backing;
use crate::hypervisor::image::{FileId, ImageDirectory, ImageError};

/// Nothing, if no image but `user` backs onto the file: it may be written to, and get another name. It is kept where a
/// kept file does.
pub fn refuse_others(
    env: &Env<'_>,
    directory: &ImageDirectory,
    name: &str,
    file: FileId,
    user: Option<FileId>,
) -> Result<Option<Removal>> {
    for other in dependents(directory, file)? {
        if user.is_none() || directory.id(&other)? != user {
            // A chain that was shortened left it behind.
            if let Some(kept) = kept_for(env, directory, &other) {
                return Ok(Some(kept));
            }
            let path = directory.join(name);
            return Err(DriverError::NotNow(format!("{other} was made on top of {} and needs it", path.display())));
        }
    }
    Ok(None)
}

/// A kept file of a snapshot that is gone must not move: nobody would learn of it.
pub fn kept_for(env: &Env<'_>, directory: &ImageDirectory, above: &str) -> Option<Removal> {
    let path = directory.join(above);
    let kept = env.siblings.iter().any(|sibling| sibling.retained && sibling.handle == path);
    kept.then(|| Removal::Kept(format!("{} was retained and needs this file", path.display())))
}

/// Files of `directory` that back onto the file `id`, by their headers.
pub fn dependents(directory: &ImageDirectory, id: FileId) -> Result<Vec<String>> {
    let mut found = vec![];
    for name in directory.names()? {
        let Some(backing) = backing_of(directory, &name)? else { continue };
        let Some(below) = beside(directory, &backing).filter(|below| *below != name) else { continue };
        match directory.holds(below, id) {
            Ok(true) => found.push(name),
            // Images of ours are beneath the roots.
            Ok(false) | Err(ImageError::OutsideRoots(_)) => {}
            Err(error) if error.is_no_image() || error.is_no_directory() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(found)
}

/// What a file says that it backs onto. One that isn't an image, or isn't a file, backs onto nothing; one that can't be
/// read may back onto anything.
fn backing_of(directory: &ImageDirectory, name: &str) -> Result<Option<String>> {
    match directory.open(name, OFlags::RDONLY) {
        Ok(file) => backing::backing_of(&mut File::from(file))
            .map_err(|source| DriverError::Header { path: directory.join(name), source }),
        Err(error) if error.is_no_image() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The path of a backing device or of a backing file in another directory, or the name of one in the same, however the
/// header spells its path. One elsewhere by a relative path is nothing that we made.
fn beside<'a>(directory: &ImageDirectory, backing: &'a str) -> Option<&'a str> {
    if backing.starts_with("/dev/") {
        return Some(backing);
    }
    let backing = backing.strip_prefix("file:").unwrap_or(backing);
    let path = Path::new(backing);
    let parent = path.parent()?;
    if parent.as_os_str().is_empty() || parent == Path::new(".") || parent == directory.path() {
        return path.file_name()?.to_str();
    }
    path.is_absolute().then_some(backing)
}

/// Fails if an image beside one that is in another directory than `directory` was made on top of it.
pub fn refuse_those_beside(env: &Env<'_>, directory: &ImageDirectory, image: &str, file: FileId) -> Result<()> {
    let (beside, _) = env.roots.directory_of(Path::new(image))?;
    let other = dependents(&beside, file)?.into_iter().find(|_| beside.path() != directory.path());
    other.map_or(Ok(()), |other| {
        Err(DriverError::NotNow(format!("{} was made on top of {image} and needs it", beside.join(&other).display())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::image::ImageRoots;

    #[test]
    fn an_image_of_any_format_that_backs_onto_a_file_needs_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("base"), vec![0; 1 << 20]).unwrap();
        let roots = ImageRoots::new(vec![directory.path().to_owned()]);
        let opened = roots.directory(directory.path()).unwrap();
        let base = opened.id("base").unwrap().unwrap();
        assert_eq!(dependents(&opened, base).unwrap(), Vec::<String>::new());
        for format in ["qcow2", "qed"] {
            let create = ["create", "-q", "-f", format, "-F", "raw", "-b", "base"];
            let made = std::process::Command::new("qemu-img").args(create).arg(path(format)).status().unwrap();
            assert!(made.success());
            assert_eq!(dependents(&opened, base).unwrap(), [format]);
            std::fs::remove_file(path(format)).unwrap();
        }
        std::fs::write(path("disk.vmdk"), "# Disk DescriptorFile\nparentFileNameHint=\"base\"\n").unwrap();
        assert!(dependents(&opened, base).is_err(), "it can't be told whether that one needs it");
    }
}
