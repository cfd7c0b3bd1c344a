//! Which images need a file as it stands, whoever made them.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, OFlags};

use crate::drivers::{DriverError, Env, Removal, Result};
use crate::hypervisor::backing::backing_of;
use crate::hypervisor::backing_path::paths_of;
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
        if lies_on(directory, &name, directory.open(&name, OFlags::RDONLY), id)? {
            found.push(name);
        }
    }
    for name in directory.names_that_are_no_text()? {
        let said = name.to_string_lossy().into_owned();
        if lies_on(directory, &said, directory.open_named_by_no_text(&name), id)? {
            found.push(said);
        }
    }
    Ok(found)
}

/// Whether a file says that it backs onto the file `id`. One that isn't an image, or isn't a file, backs onto nothing; one
/// that can't be read may back onto anything.
fn lies_on(
    directory: &ImageDirectory,
    name: &str,
    file: std::result::Result<OwnedFd, ImageError>,
    id: FileId,
) -> Result<bool> {
    let file = match file {
        Err(error) if error.is_no_image() => return Ok(false),
        file => file?,
    };
    let unclear = |source| DriverError::Header { path: directory.join(name), source };
    let Some(backing) = backing_of(&mut File::from(file)).map_err(unclear)? else { return Ok(false) };
    for path in paths_of(&backing).map_err(unclear)? {
        let Some(below) = beside(directory, &path).filter(|below| below != name) else { continue };
        match directory.holds(&below, id) {
            Ok(true) => return Ok(true),
            Ok(false) => {}
            Err(error) if is_no_way(&error) && !leads_to(&directory.path().join(&path), id) => {}
            Err(error) if is_no_way(&error) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(false)
}

/// Whether there is no image where a name leads without links and within the roots.
fn is_no_way(error: &ImageError) -> bool {
    matches!(error, ImageError::OutsideRoots(_)) || error.is_no_image() || error.is_no_directory()
}

/// Whether a path ends at the file `id`, however it gets there: QEMU follows every link.
fn leads_to(path: &Path, id: FileId) -> bool {
    let found = rustix::fs::statx(rustix::fs::CWD, path, AtFlags::empty(), FileId::NEEDS);
    found.is_ok_and(|found| FileId::of(&found) == id)
}

/// The path of a backing device or of a backing file in another directory, or the name of one in the same, however the
/// header spells its path; none where it is no file's.
fn beside(directory: &ImageDirectory, backing: &str) -> Option<String> {
    if backing.starts_with("/dev/") {
        return Some(backing.to_owned());
    }
    let path = plain(&directory.path().join(backing));
    let name = path.file_name()?.to_str()?;
    let is_beside = path.parent() == Some(&plain(directory.path()));
    Some(if is_beside { name.to_owned() } else { path.to_str()?.to_owned() })
}

/// A path without detours.
fn plain(path: &Path) -> PathBuf {
    path.components().fold(PathBuf::new(), |mut plain, part| {
        match part {
            Component::ParentDir => drop(plain.pop()),
            Component::CurDir => {}
            part => plain.push(part),
        }
        plain
    })
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

    /// A directory with an image, and what backs onto that one.
    struct Found(tempfile::TempDir, ImageDirectory, FileId);

    impl Found {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            std::fs::write(directory.path().join("base"), vec![0; 1 << 20]).unwrap();
            let opened = ImageRoots::new(vec![directory.path().to_owned()]).directory(directory.path()).unwrap();
            let base = opened.id("base").unwrap().unwrap();
            Self(directory, opened, base)
        }

        fn make(&self, name: impl AsRef<Path>, format: &str, backing: &str) {
            let create = ["create", "-q", "-u", "-f", format, "-F", "raw", "-b", backing];
            let mut command = std::process::Command::new("qemu-img");
            assert!(command.args(create).arg(self.0.path().join(name)).arg("1M").status().unwrap().success());
        }

        fn dependents(&self) -> Result<Vec<String>> {
            dependents(&self.1, self.2)
        }
    }

    #[test]
    fn an_image_of_any_format_that_backs_onto_a_file_needs_it() {
        let found = Found::new();
        assert_eq!(found.dependents().unwrap(), Vec::<String>::new());
        for format in ["qcow2", "qed"] {
            found.make(format, format, "base");
            assert_eq!(found.dependents().unwrap(), [format]);
            std::fs::remove_file(found.0.path().join(format)).unwrap();
        }
        let vmdk = "# Disk DescriptorFile\nparentFileNameHint=\"base\"\n";
        std::fs::write(found.0.path().join("disk.vmdk"), vmdk).unwrap();
        assert!(found.dependents().is_err(), "it can't be told whether that one needs it");
    }

    #[test]
    fn an_image_needs_a_file_however_its_header_spells_the_path() {
        let found = Found::new();
        let here = found.0.path();
        let name = here.file_name().unwrap().to_str().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        for (target, link) in [("base".into(), here.join("current")), (here.into(), here.join("around"))] {
            std::os::unix::fs::symlink::<PathBuf, PathBuf>(target, link).unwrap();
        }
        std::os::unix::fs::symlink(here, elsewhere.path().join("images")).unwrap();
        for backing in [
            "current".to_owned(),
            "around/base".to_owned(),
            elsewhere.path().join("images/base").display().to_string(),
            "./base".to_owned(),
            here.join("base").display().to_string(),
            format!("../{name}/base"),
            format!("file:{}", here.join("base").display()),
            format!(r#"json:{{"driver":"raw","file":{{"driver":"file","filename":"{}/base"}}}}"#, here.display()),
            format!(r#"json:{{"driver":"raw","file.driver":"file","file.filename":"{}/base"}}"#, here.display()),
        ] {
            found.make("disk", "qcow2", &backing);
            assert_eq!(found.dependents().unwrap(), ["disk"], "{backing}");
        }
        for other in ["other".to_owned(), "../base".to_owned(), "/base".to_owned(), "nbd://10.0.0.1/base".to_owned()] {
            found.make("disk", "qcow2", &other);
            assert_eq!(found.dependents().unwrap(), Vec::<String>::new(), "{other}");
        }
        found.make("disk", "qcow2", "nbd:unix:/run/nbd.sock");
        let why = found.dependents().unwrap_err();
        assert!(crate::causes::chain(&why).contains("nbd:unix:/run/nbd.sock"), "{why}");
    }

    #[test]
    fn an_image_whose_name_is_no_text_needs_a_file_as_any_other() {
        use std::os::unix::ffi::OsStrExt;
        let found = Found::new();
        found.make(std::ffi::OsStr::from_bytes(b"disk-\xff"), "qcow2", "base");
        assert_eq!(found.dependents().unwrap().len(), 1);
    }
}
