//! Whether the file systems are mounted that a removal looks for files on: what isn't found there is taken for gone.

use std::path::PathBuf;

use crate::hypervisor::image::{ImageError, ImageRoots, trusted_directory};

/// Fails where one of the directories is there and has nothing in it, as is so where a file system isn't mounted. What
/// it means that one isn't there, its driver knows.
pub fn check(directories: &[PathBuf], roots: &ImageRoots) -> Result<(), ImageError> {
    directories.iter().try_for_each(|path| {
        // Where a class says that it is, no root applies.
        let directory = if roots.names(path) { roots.directory(path) } else { trusted_directory(path) };
        match directory {
            Err(error) if error.is_no_directory() => Ok(()),
            found => found?.mounted().map(drop),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_is_empty_is_not_mounted_and_one_that_is_not_there_is_its_drivers_to_judge() {
        let directory = tempfile::tempdir().unwrap();
        let inside = directory.path().join("vm");
        let roots = [ImageRoots::new(vec![directory.path().into()]), ImageRoots::new(vec![])];
        let judged = |path: &PathBuf| roots.each_ref().map(|roots| check(std::slice::from_ref(path), roots).is_ok());
        assert_eq!(judged(&inside), [true, true]);
        std::fs::create_dir(&inside).unwrap();
        assert_eq!(judged(&inside), [false, false]);
        std::fs::write(inside.join("image"), "").unwrap();
        assert_eq!(judged(&inside), [true, true]);
    }
}
