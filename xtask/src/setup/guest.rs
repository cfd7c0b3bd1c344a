//! The guest: Debian's cloud kernel, and an initramfs of busybox, Debian's guest agent and our own init and writer.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use freezeframe_e2e::Cache;

use super::initramfs::Initramfs;
use super::packages::Apt;
use super::stamp::Stamp;
use crate::progress::{capture, root, run, say};

/// The metapackage of the kernel that guests and the node VM run.
pub(super) const KERNEL: &str = "linux-image-cloud-amd64";
const AGENT: &str = "qemu-guest-agent";
/// For initramfs.
pub(super) const BUSYBOX: &str = "busybox-static";

/// Loaded at boot, in this order. File systems besides: the kernel asks for these when they are mounted.
const MODULES: &[&str] = &["virtio_pci", "virtio_blk", "virtio_console"];
const FILESYSTEM_MODULES: &[&str] = &["xfs", "btrfs"];

/// Builds `vmlinuz` and `initrd` unless they are there from these sources.
pub fn build(cache: &Cache, apt: &mut Apt) -> Result<()> {
    let directory = cache.guest();
    std::fs::create_dir_all(&directory)?;
    let sources = root().join("e2e/guest");
    let read = |file: &str| std::fs::read_to_string(sources.join(file));
    let recipe = [include_str!("guest.rs"), include_str!("initramfs.rs")].map(str::to_owned);
    let stamp = Stamp::new(&directory, &[recipe.as_slice(), &[read("init")?, read("writer.c")?]].concat());
    if stamp.is_current() {
        say("guest: up to date");
        return Ok(());
    }
    let unpacked = unpack_packages(&directory.join("building"), apt)?;
    say("guest: making the initramfs");
    let release = kernel_release(&unpacked)?;
    std::fs::copy(unpacked.join("boot").join(format!("vmlinuz-{release}")), directory.join("vmlinuz"))?;
    assemble(&unpacked, &sources, &release, &directory.join("initrd"))?;
    std::fs::remove_dir_all(directory.join("building"))?;
    stamp.write()
}

/// Downloads the three packages and unpacks them over one another.
fn unpack_packages(scratch: &Path, apt: &mut Apt) -> Result<PathBuf> {
    if scratch.exists() {
        std::fs::remove_dir_all(scratch)?;
    }
    let (debs, unpacked) = (scratch.join("debs"), scratch.join("unpacked"));
    std::fs::create_dir_all(&debs)?;
    let kernel = apt.depends_on(KERNEL)?;
    for package in [kernel.as_str(), AGENT, BUSYBOX] {
        apt.download(package, &debs)?;
    }
    for deb in std::fs::read_dir(debs)? {
        run(Command::new("dpkg-deb").arg("-x").arg(deb?.path()).arg(&unpacked))?;
    }
    Ok(unpacked)
}

/// The release of the one kernel in a tree, whose lists of modules are made.
pub(super) fn kernel_release(unpacked: &Path) -> Result<String> {
    let modules = unpacked.join("lib/modules");
    let release = std::fs::read_dir(&modules)?.next().context("the kernel package has no modules")??;
    run(Command::new("depmod").arg("-b").arg(unpacked).arg(release.file_name()))?;
    release.file_name().into_string().ok().context("the kernel's release is no text")
}

fn assemble(unpacked: &Path, sources: &Path, release: &str, initrd: &Path) -> Result<()> {
    let tree = Initramfs::create(unpacked.join("initramfs"))?;
    tree.copy(&unpacked.join("bin/busybox"), "bin/busybox")?;
    for applet in capture(Command::new(unpacked.join("bin/busybox")).arg("--list"))?.lines() {
        tree.link("/bin/busybox", &format!("bin/{applet}"))?;
    }
    // The kernel calls this very path when it needs a module.
    tree.link("/bin/busybox", "sbin/modprobe")?;
    tree.copy_program(&unpacked.join("usr/sbin/qemu-ga"), "usr/sbin/qemu-ga")?;
    for checker in ["e2fsck", "xfs_repair"] {
        tree.copy_program(&Path::new("/usr/sbin").join(checker), &format!("usr/sbin/{checker}"))?;
    }
    tree.copy(&sources.join("init"), "init")?;
    tree.write("etc/modules", &MODULES.join("\n"))?;
    tree.write("etc/os-release", "ID=freezeframe-guest\nPRETTY_NAME=\"Freezeframe test guest\"\n")?;
    copy_modules(&tree, unpacked, release, &[MODULES, FILESYSTEM_MODULES].concat())?;
    compile_writer(sources, &tree)?;
    tree.pack(initrd)
}

/// The modules and all they need, from the `modules.dep` that depmod wrote: `path: path path ...`.
pub(super) fn copy_modules(tree: &Initramfs, unpacked: &Path, release: &str, modules: &[&str]) -> Result<()> {
    let base = PathBuf::from("lib/modules").join(release);
    let dependencies = std::fs::read_to_string(unpacked.join(&base).join("modules.dep"))?;
    for module in modules {
        let ending = format!("/{module}.ko:");
        let line = dependencies.lines().find(|line| line.split(' ').next().is_some_and(|own| own.ends_with(&ending)));
        let line = line.with_context(|| format!("the kernel package has no module {module}"))?;
        for path in line.split_whitespace().map(|path| path.trim_end_matches(':')) {
            tree.copy(&unpacked.join(&base).join(path), &base.join(path).to_string_lossy())?;
        }
    }
    for list in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
        tree.copy(&unpacked.join(&base).join(list), &base.join(list).to_string_lossy())?;
    }
    tree.depmod(release)
}

fn compile_writer(sources: &Path, tree: &Initramfs) -> Result<()> {
    let writer = tree.path("bin/writer");
    run(Command::new("gcc").args(["-O2", "-Wall", "-static", "-o"]).arg(&writer).arg(sources.join("writer.c")))?;
    ensure!(writer.exists(), "gcc made no writer");
    Ok(())
}
