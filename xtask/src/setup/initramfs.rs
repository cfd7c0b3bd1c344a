//! A directory that becomes an initramfs.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::progress::{capture, run};

/// The tree, before it is packed.
pub struct Initramfs {
    root: PathBuf,
}

impl Initramfs {
    /// An empty tree with the directories that a system has.
    pub fn create(root: PathBuf) -> Result<Self> {
        for directory in ["bin", "sbin", "dev", "proc", "sys", "run", "tmp", "mnt", "etc", "usr/sbin", "var/log"] {
            std::fs::create_dir_all(root.join(directory))?;
        }
        std::os::unix::fs::symlink("../run", root.join("var/run"))?;
        Ok(Self { root })
    }

    /// Where `inside` is now.
    pub fn path(&self, inside: &str) -> PathBuf {
        self.root.join(inside)
    }

    /// Copies one file with its mode, following links.
    pub fn copy(&self, from: &Path, inside: &str) -> Result<()> {
        let to = self.parent_made(inside)?;
        std::fs::copy(from, to).with_context(|| format!("copying {}", from.display())).map(drop)
    }

    /// Copies a program and the libraries it is linked with, which this system has: qemu and the tools of the file systems
    /// are installed, and the guest's packages are of the same release.
    pub fn copy_program(&self, from: &Path, inside: &str) -> Result<()> {
        self.copy(from, inside)?;
        let libraries = capture(Command::new("ldd").arg(from))?;
        ensure!(!libraries.contains("not found"), "{} misses libraries:\n{libraries}", from.display());
        // `name => /path (address)`, and the loader as `/path (address)`.
        for path in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
            self.copy(Path::new(path), path.trim_start_matches('/'))?;
        }
        Ok(())
    }

    /// A symbolic link; one that is there already stays.
    pub fn link(&self, target: &str, inside: &str) -> Result<()> {
        let path = self.parent_made(inside)?;
        if path.exists() || path.is_symlink() {
            return Ok(());
        }
        std::os::unix::fs::symlink(target, path).with_context(|| format!("linking {inside}"))
    }

    /// A text file.
    pub fn write(&self, inside: &str, text: &str) -> Result<()> {
        std::fs::write(self.parent_made(inside)?, text).with_context(|| format!("writing {inside}"))
    }

    /// Lists for the kernel modules that were copied.
    pub fn depmod(&self, release: &str) -> Result<()> {
        run(Command::new("depmod").arg("-b").arg(&self.root).arg(release))
    }

    /// Packs the tree, not compressed: that would save neither time at boot nor a tool here.
    pub fn pack(&self, archive: &Path) -> Result<()> {
        let file = std::fs::File::create(archive).with_context(|| format!("creating {}", archive.display()))?;
        let mut find = Command::new("find").arg(".").current_dir(&self.root).stdout(Stdio::piped()).spawn()?;
        let names = find.stdout.take().context("find has no output")?;
        let mut cpio = Command::new("cpio");
        cpio.args(["--create", "--format=newc", "--quiet", "--owner=0:0"]).current_dir(&self.root);
        run(cpio.stdin(names).stdout(file))?;
        match find.wait()? {
            status if status.success() => Ok(()),
            status => bail!("find in {}: {status}", self.root.display()),
        }
    }

    fn parent_made(&self, inside: &str) -> Result<PathBuf> {
        let path = self.path(inside);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        Ok(path)
    }
}
