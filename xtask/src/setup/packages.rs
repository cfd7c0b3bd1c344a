//! Debian packages.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::progress::{capture, run, say};

/// What the tests and the building of the guest call.
const PACKAGES: &[&str] = &[
    "btrfs-progs",
    "ca-certificates",
    "cpio",
    "debootstrap",
    "e2fsprogs",
    "gcc",
    "kmod",
    "libc6-dev",
    "mount",
    "openssl",
    "qemu-system-x86",
    "qemu-utils",
    "util-linux",
    "xfsprogs",
];

/// apt, whose lists are fetched at most once.
#[derive(Default)]
pub struct Apt {
    updated: bool,
}

impl Apt {
    /// Installs those of our packages that are missing.
    pub fn install_missing(&mut self) -> Result<()> {
        let missing: Vec<_> = PACKAGES.iter().filter(|package| !is_installed(package)).collect();
        if missing.is_empty() {
            say("packages: all there");
            return Ok(());
        }
        self.update()?;
        say(format_args!("packages: installing {missing:?}"));
        let options = ["install", "-qq", "-y", "--no-install-recommends"];
        run(apt_get().args(options).args(missing))
    }

    /// Downloads a package into `directory` without installing it.
    pub fn download(&mut self, package: &str, directory: &Path) -> Result<()> {
        self.update()?;
        say(format_args!("packages: downloading {package}"));
        run(apt_get().args(["download", "-qq", package]).current_dir(directory))
    }

    /// The package that `package`, a metapackage, stands for.
    pub fn depends_on(&mut self, package: &str) -> Result<String> {
        self.update()?;
        let depends = capture(Command::new("apt-cache").env("LC_ALL", "C").args(["depends", package]))?;
        let first = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: ").map(str::to_owned));
        first.ok_or_else(|| anyhow::anyhow!("{package} depends on nothing: {depends}"))
    }

    /// Where this system has the packages of a release of Debian from.
    pub fn mirror(&mut self, release: &str) -> Result<String> {
        self.update()?;
        let filter = ["Created-By: Packages", "Origin: Debian", &format!("Codename: {release}")];
        let targets = capture(apt_get().args(["indextargets", "--format", "$(REPO_URI)"]).args(filter))?;
        let mirror = targets.lines().next().map(str::to_owned);
        mirror.ok_or_else(|| anyhow::anyhow!("apt has no source for Debian {release}"))
    }

    fn update(&mut self) -> Result<()> {
        if !self.updated {
            ensure!(is_root()?, "setup installs packages: run it as root");
            say("packages: apt-get update");
            run(apt_get().args(["update", "-qq"]))?;
            self.updated = true;
        }
        Ok(())
    }
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    // Root's directories are closed to apt's own user, and it warns of that at each download.
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["-o", "APT::Sandbox::User=root"]);
    command
}

fn is_root() -> Result<bool> {
    Ok(capture(Command::new("id").arg("-u"))?.trim() == "0")
}

fn is_installed(package: &str) -> bool {
    let query = ["-W", "-f", "${db:Status-Status}", package];
    capture(Command::new("dpkg-query").args(query)).is_ok_and(|status| status == "installed")
}
