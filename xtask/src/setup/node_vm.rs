//! The node VM: a small Debian with LVM and QEMU and a kernel of its own, where device-mapper works whatever the host
//! has. A root disk to be booted with `snapshot=on`, and an initramfs that finds it.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use freezeframe_e2e::Cache;

use super::guest::{BUSYBOX, KERNEL, copy_modules, kernel_release};
use super::initramfs::Initramfs;
use super::packages::Apt;
use super::stamp::Stamp;
use crate::progress::{capture, root, run, say};

const RELEASE: &str = "bookworm";

/// What is installed beside the minimal system.
const PACKAGES: &[&str] = &[
    "btrfs-progs",
    "e2fsprogs",
    "iproute2",
    "kmod",
    "lvm2",
    "qemu-guest-agent",
    "qemu-system-x86",
    "qemu-utils",
    "thin-provisioning-tools",
    "udev",
    "xfsprogs",
];

/// What the initramfs loads to reach the root disk, whose ext4 is part of the kernel.
const BOOT_MODULES: &[&str] = &["virtio_pci", "virtio_blk"];

/// Directories that the tests have no use for, a third of the whole.
const NOT_NEEDED: &[&str] =
    &["usr/share/doc", "usr/share/man", "usr/share/locale", "var/cache/apt", "var/lib/apt/lists"];

/// Of the root disk; sparse, with a gigabyte for the tests.
const ROOT_BYTES: u64 = 3 << 30;

/// Builds `vmlinuz`, `initrd` and `root.raw` unless they are there from these sources.
pub fn build(cache: &Cache, apt: &mut Apt) -> Result<()> {
    let directory = cache.node_vm();
    std::fs::create_dir_all(&directory)?;
    let sources = root().join("e2e/node-vm");
    let read = |file: &str| std::fs::read_to_string(sources.join(file));
    let recipe = [include_str!("node_vm.rs"), include_str!("initramfs.rs")].map(str::to_owned);
    let stamp = Stamp::new(&directory, &[recipe.as_slice(), &[read("init")?, read("initrd-init")?]].concat());
    if stamp.is_current() {
        say("node VM: up to date");
        return Ok(());
    }
    let building = directory.join("building");
    if building.exists() {
        std::fs::remove_dir_all(&building)?;
    }
    std::fs::create_dir_all(&building)?;
    let system = building.join("root");
    install_system(&system, apt)?;
    let release = install_kernel(&building, &system, apt)?;
    std::fs::copy(sources.join("init"), system.join("sbin/node-init")).context("copying init")?;
    std::fs::copy(system.join("boot").join(format!("vmlinuz-{release}")), directory.join("vmlinuz"))?;
    assemble_initrd(&building, &system, &sources, &release, &directory.join("initrd"))?;
    pack_root(&system, &directory.join("root.raw"))?;
    std::fs::remove_dir_all(building)?;
    stamp.write()
}

fn install_system(system: &Path, apt: &mut Apt) -> Result<()> {
    say("node VM: debootstrap (a minute)");
    let mirror = apt.mirror(RELEASE)?;
    // Thousands of files, each synced: minutes on a busy disk, and nobody needs them if the machine fails now.
    std::fs::create_dir_all(system.join("etc/dpkg/dpkg.cfg.d"))?;
    std::fs::write(system.join("etc/dpkg/dpkg.cfg.d/no-sync"), "force-unsafe-io\n")?;
    let log = system.with_extension("log");
    let output = std::fs::File::create(&log)?;
    let mut command = Command::new("debootstrap");
    command.args(["--variant=minbase", &format!("--include={}", PACKAGES.join(",")), RELEASE]).arg(system).arg(mirror);
    command.stdout(output.try_clone()?).stderr(output);
    run(&mut command).with_context(|| std::fs::read_to_string(&log).unwrap_or_default())?;
    for directory in NOT_NEEDED {
        let directory = system.join(directory);
        if directory.exists() {
            std::fs::remove_dir_all(directory)?;
        }
    }
    Ok(())
}

/// The kernel's files alone: its package's scripts would build an initramfs that nobody boots.
fn install_kernel(building: &Path, system: &Path, apt: &mut Apt) -> Result<String> {
    let (debs, kernel) = (building.join("debs"), building.join("kernel"));
    std::fs::create_dir_all(&debs)?;
    for package in [apt.depends_on(KERNEL)?.as_str(), BUSYBOX] {
        apt.download(package, &debs)?;
    }
    for deb in std::fs::read_dir(debs)? {
        run(Command::new("dpkg-deb").arg("-x").arg(deb?.path()).arg(&kernel))?;
    }
    let release = kernel_release(&kernel)?;
    // `lib` and `bin` are links in the system: what is copied must go through them.
    for part in ["boot", "lib/modules"] {
        std::fs::create_dir_all(system.join(part))?;
        run(Command::new("cp").arg("-a").arg(kernel.join(part).join(".")).arg(system.join(part)))?;
    }
    Ok(release)
}

fn assemble_initrd(building: &Path, system: &Path, sources: &Path, release: &str, initrd: &Path) -> Result<()> {
    let tree = Initramfs::create(building.join("initramfs"))?;
    let busybox = building.join("kernel/bin/busybox");
    tree.copy(&busybox, "bin/busybox")?;
    for applet in capture(Command::new(&busybox).arg("--list"))?.lines() {
        tree.link("/bin/busybox", &format!("bin/{applet}"))?;
    }
    tree.copy(&sources.join("initrd-init"), "init")?;
    tree.write("etc/modules", &BOOT_MODULES.join("\n"))?;
    std::fs::create_dir_all(tree.path("new"))?;
    copy_modules(&tree, system, release, BOOT_MODULES)?;
    tree.pack(initrd)
}

/// Without a journal: the disk is thrown away with each boot's overlay.
fn pack_root(system: &Path, image: &Path) -> Result<()> {
    say("node VM: making the root disk");
    std::fs::File::create(image)?.set_len(ROOT_BYTES)?;
    let options = ["-q", "-t", "ext4", "-O", "^has_journal", "-d"];
    run(Command::new("mke2fs").args(options).arg(system).arg(image))
}
