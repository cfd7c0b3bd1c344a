//! Image files on this node, opened beneath the roots that the agent's configuration allows.
//!
//! QEMU tells us its images' paths, and QEMU is not trusted: a path outside the roots, a symbolic link, or anything
//! but a regular file is refused before something is created, renamed or handed over.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;

use super::device::number_of;
pub use super::file_id::FileId;
pub use super::image_error::ImageError;
use super::qcow2::HeaderError;

/// Formats whose images are one file, so that a clone of the file is a clone of the image.
pub const ONE_FILE: [&str; 7] = ["raw", "qcow2", "qed", "vdi", "vpc", "vhdx", "luks"];

type Result<T> = std::result::Result<T, ImageError>;

/// Where images may be.
#[derive(Clone, Debug)]
pub struct ImageRoots(Vec<PathBuf>);

impl ImageRoots {
    /// Allows everything beneath `roots`.
    #[must_use]
    pub fn new(roots: Vec<PathBuf>) -> Self {
        Self(roots)
    }

    /// Whether a path is named beneath a root, whatever is there.
    #[must_use]
    pub fn names(&self, path: &Path) -> bool {
        let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        plain && self.0.iter().any(|root| path.starts_with(root))
    }

    /// Opens the directory of the image at `path`, following no symbolic link below the root.
    pub fn directory_of(&self, path: &Path) -> Result<(ImageDirectory, String)> {
        let name = path.file_name().and_then(|name| name.to_str()).filter(|_| path.is_absolute());
        let (Some(name), Some(parent)) = (name, path.parent()) else {
            return Err(ImageError::NotAFilePath(path.to_owned()));
        };
        Ok((self.directory(parent)?, name.to_owned()))
    }

    /// Opens a directory beneath a root, following no symbolic link below the root.
    pub fn directory(&self, path: &Path) -> Result<ImageDirectory> {
        let outside = || ImageError::OutsideRoots(path.to_owned());
        let root = self.0.iter().find(|root| path.starts_with(root)).ok_or_else(outside)?;
        let beneath = path.strip_prefix(root).map_err(|_| outside())?;
        let io = |source: Errno| io_error("open directory", path, source);
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(root, flags | OFlags::PATH, Mode::empty()).map_err(io)?;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let beneath = if beneath.as_os_str().is_empty() { Path::new(".") } else { beneath };
        let fd = rustix::fs::openat2(&root, beneath, flags | OFlags::RDONLY, Mode::empty(), resolve).map_err(io)?;
        Ok(ImageDirectory { path: path.to_owned(), fd, roots: self.clone() })
    }

    /// The same; none where it is gone for good, with all that was in it. A file system that isn't mounted leaves an empty
    /// directory, so it fails where the lowest directory above is one.
    pub fn existing_directory(&self, path: &Path) -> Result<Option<ImageDirectory>> {
        let gone = match self.directory(path) {
            Err(error) if error.is_not_found() => error,
            found => return found.map(Some),
        };
        let above = path.ancestors().skip(1).find_map(|above| self.directory(above).ok()).ok_or(gone)?;
        if above.is_empty()? {
            return Err(ImageError::MaybeUnmounted { missing: path.to_owned(), above: above.path });
        }
        Ok(None)
    }
}

/// An opened directory of images. A name below is a plain file name in it, or an absolute path of a block device or of a
/// file beneath a root, since a layer may lie on an image elsewhere.
pub struct ImageDirectory {
    path: PathBuf,
    fd: OwnedFd,
    roots: ImageRoots,
}

impl ImageDirectory {
    /// Itself, unless it is empty, as one is where a file system isn't mounted.
    pub fn mounted(self) -> Result<Self> {
        if self.is_empty()? { Err(ImageError::Empty(self.path)) } else { Ok(self) }
    }

    fn is_empty(&self) -> Result<bool> {
        Ok(self.names()?.iter().all(|name| name == "." || name == ".."))
    }

    /// The directory's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Path of a file in it, for reports and for QEMU's command lines.
    #[must_use]
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Which file has that name now; none if the name is free.
    pub fn id(&self, name: &str) -> Result<Option<FileId>> {
        if is_elsewhere(name) {
            let (directory, name) = self.roots.directory_of(Path::new(name))?;
            return directory.id(&name);
        }
        if Path::new(name).is_absolute() {
            let number = number_of(Path::new(name)).map_err(|_| ImageError::NotRegular(name.into()))?;
            return Ok(Some(FileId::of_device(number)));
        }
        match rustix::fs::statx(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW, FileId::NEEDS) {
            Ok(found) if FileType::from_raw_mode(found.stx_mode.into()) == FileType::RegularFile => {
                Ok(Some(FileId::of(&found)))
            }
            Ok(_) => Err(ImageError::NotRegular(self.join(name))),
            Err(Errno::NOENT) => Ok(None),
            Err(source) => Err(io_error("examine", &self.join(name), source)),
        }
    }

    /// The number of the block device that a name of it, and no path, is a node of; none if it is no such node.
    pub fn device_number(&self, name: &str) -> Result<Option<u64>> {
        match rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::BlockDevice => Ok(Some(found.st_rdev)),
            Ok(_) | Err(Errno::NOENT) => Ok(None),
            Err(source) => Err(io_error("examine", &self.join(name), source)),
        }
    }

    /// Whether that name is taken by exactly that file.
    pub fn holds(&self, name: &str, id: FileId) -> Result<bool> {
        Ok(self.id(name)? == Some(id))
    }

    /// Opens a file of it.
    pub fn open(&self, name: &str, access: OFlags) -> Result<OwnedFd> {
        if is_elsewhere(name) {
            let (directory, name) = self.roots.directory_of(Path::new(name))?;
            return directory.open(&name, access);
        }
        // A pipe that lies among the images would keep us waiting for ever.
        // A volume's name is a link.
        let links = if Path::new(name).is_absolute() { OFlags::empty() } else { OFlags::NOFOLLOW };
        let flags = access | links | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = rustix::fs::openat(&self.fd, name, flags, Mode::empty())
            .map_err(|source| io_error("open", &self.join(name), source))?;
        self.id(name)?.ok_or_else(|| io_error("open", &self.join(name), Errno::NOENT))?;
        Ok(fd)
    }

    /// What to say of an image of it whose header can't be read.
    #[must_use]
    pub fn unreadable(&self, name: &str, error: HeaderError) -> ImageError {
        let source = std::io::Error::other(error);
        ImageError::Io { doing: "read the header of", path: self.join(name), source }
    }

    /// Makes an empty file that must not be there.
    pub fn create(&self, name: &str, mode: Mode) -> Result<OwnedFd> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&self.fd, name, flags, mode).map_err(|source| io_error("create", &self.join(name), source))
    }

    /// Gives `name` the owner and mode of `like`, so that QEMU may use the one as it may the other.
    pub fn copy_ownership(&self, name: &str, like: &ImageDirectory, like_name: &str) -> Result<()> {
        let io = |source| io_error("give an owner to", &self.join(name), source);
        let found = rustix::fs::statat(&like.fd, like_name, AtFlags::SYMLINK_NOFOLLOW).map_err(io)?;
        let file = self.open(name, OFlags::RDWR)?;
        let (uid, gid) = (rustix::fs::Uid::from_raw(found.st_uid), rustix::fs::Gid::from_raw(found.st_gid));
        rustix::fs::fchown(&file, Some(uid), Some(gid)).map_err(io)?;
        rustix::fs::fchmod(&file, Mode::from_raw_mode(found.st_mode & 0o777)).map_err(io)
    }

    /// Gives a file a new name that must be free, on disk before this returns.
    pub fn rename_new(&self, from: &str, to: &str) -> Result<()> {
        rustix::fs::renameat_with(&self.fd, from, &self.fd, to, RenameFlags::NOREPLACE)
            .map_err(|source| io_error("rename to", &self.join(to), source))?;
        self.sync()
    }

    /// Lets two names change hands at once, on disk before this returns.
    pub fn exchange(&self, a: &str, b: &str) -> Result<()> {
        rustix::fs::renameat_with(&self.fd, a, &self.fd, b, RenameFlags::EXCHANGE)
            .map_err(|source| io_error("exchange names with", &self.join(a), source))?;
        self.sync()
    }

    /// Makes a file without a name, which is gone when it is closed.
    pub fn unnamed(&self) -> Result<OwnedFd> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        rustix::fs::openat(&self.fd, ".", flags, Mode::from_raw_mode(0o600))
            .map_err(|source| io_error("make a file in", &self.path, source))
    }

    /// Removes a name, on disk before this returns; a free name is fine.
    pub fn unlink(&self, name: &str) -> Result<()> {
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => self.sync(),
            Err(source) => Err(io_error("delete", &self.join(name), source)),
        }
    }

    /// Makes renames durable.
    pub fn sync(&self) -> Result<()> {
        rustix::fs::fsync(&self.fd).map_err(|source| io_error("sync directory", &self.path, source))
    }

    /// Writes a file's data to the disk.
    pub fn sync_file(&self, name: &str) -> Result<()> {
        let file = self.open(name, OFlags::RDONLY)?;
        rustix::fs::fsync(&file).map_err(|source| io_error("sync", &self.join(name), source))
    }

    /// Has a file look written to just now.
    pub fn touch(&self, name: &str) -> Result<()> {
        let now = rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
        let times = rustix::fs::Timestamps { last_access: now, last_modification: now };
        rustix::fs::utimensat(&self.fd, name, &times, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|source| io_error("touch", &self.join(name), source))
    }

    /// Whether files can be made in it: a read-only snapshot of a subvolume looks like any directory.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        rustix::fs::accessat(&self.fd, ".", Access::WRITE_OK, AtFlags::empty()).is_ok()
    }

    /// Names of all files in it.
    pub fn names(&self) -> Result<Vec<String>> {
        let io = |source| io_error("list directory", &self.path, source);
        let entries = rustix::fs::Dir::read_from(&self.fd).map_err(io)?;
        let names = entries.filter_map(|entry| match entry {
            Ok(entry) => entry.file_name().to_str().ok().map(|name| Ok(name.to_owned())),
            Err(source) => Some(Err(io(source))),
        });
        names.collect()
    }

    /// Names in it that aren't text.
    pub fn names_that_are_no_text(&self) -> Result<Vec<OsString>> {
        let io = |source| io_error("list directory", &self.path, source);
        let entries = rustix::fs::Dir::read_from(&self.fd).map_err(io)?;
        let mut names = vec![];
        for entry in entries {
            let entry = entry.map_err(io)?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            names.extend(name.to_str().is_none().then(|| name.to_owned()));
        }
        Ok(names)
    }

    /// Opens a regular file of it for reading whose name isn't text.
    pub fn open_named_by_no_text(&self, name: &OsStr) -> Result<OwnedFd> {
        let path = self.path.join(name);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let io = |source| io_error("open", &path, source);
        let fd = rustix::fs::openat(&self.fd, name, flags, Mode::empty()).map_err(io)?;
        let found = rustix::fs::fstat(&fd).map_err(io)?;
        if FileType::from_raw_mode(found.st_mode) == FileType::RegularFile {
            Ok(fd)
        } else {
            Err(ImageError::NotRegular(path))
        }
    }

    /// Bytes that are free for us on its file system.
    pub fn free_bytes(&self) -> Result<u64> {
        let found = rustix::fs::fstatvfs(&self.fd).map_err(|source| io_error("examine", &self.path, source))?;
        Ok(found.f_bavail.saturating_mul(found.f_frsize))
    }

    /// Makes a directory below it if there is none, and opens it.
    pub fn subdirectory(&self, name: &str) -> Result<Self> {
        let path = self.join(name);
        match rustix::fs::mkdirat(&self.fd, name, Mode::from_raw_mode(0o700)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(source) => return Err(io_error("make directory", &path, source)),
        }
        self.existing_subdirectory(name)
    }

    /// Opens a directory below it.
    pub fn existing_subdirectory(&self, name: &str) -> Result<Self> {
        let path = self.join(name);
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, name, flags, Mode::empty())
            .map_err(|source| io_error("open directory", &path, source))?;
        Ok(Self { path, fd, roots: self.roots.clone() })
    }
}

/// Whether a name is the path of a file in another directory.
fn is_elsewhere(name: &str) -> bool {
    name.starts_with('/') && !name.starts_with("/dev/")
}

impl AsFd for ImageDirectory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Opens a directory that the agent's own configuration or an administrator's class names: no root applies.
pub fn trusted_directory(path: &Path) -> Result<ImageDirectory> {
    let fd = rustix::fs::openat(CWD, path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|source| io_error("open directory", path, source))?;
    Ok(ImageDirectory { path: path.to_owned(), fd, roots: ImageRoots::new(vec![]) })
}

fn io_error(doing: &'static str, path: &Path, source: Errno) -> ImageError {
    ImageError::Io { doing, path: path.to_owned(), source: source.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_gone_for_good_only_if_something_is_left_where_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        let roots = ImageRoots::new(vec![root.clone()]);
        let (mount, vm) = (root.join("mount"), root.join("mount/shop/vm"));
        let found = || roots.existing_directory(&vm);
        assert!(found().is_err_and(|error| error.is_not_found()), "not even the root is there");
        std::fs::create_dir_all(&vm).unwrap();
        assert!(matches!(found().unwrap().unwrap().mounted(), Err(ImageError::Empty(path)) if path == vm));
        std::fs::write(vm.join("image"), "").unwrap();
        assert!(found().unwrap().unwrap().mounted().is_ok());
        std::fs::remove_file(vm.join("image")).unwrap();
        std::fs::remove_dir(&vm).unwrap();
        let unmounted = |error| matches!(error, ImageError::MaybeUnmounted { above, .. } if above == mount);
        assert!(!found().is_err_and(unmounted) && found().is_err(), "the namespace's directory is empty");
        std::fs::remove_dir(mount.join("shop")).unwrap();
        assert!(found().is_err_and(unmounted));
        std::fs::create_dir(mount.join("other")).unwrap();
        assert!(found().unwrap().is_none());
    }
}
