//! The QEMU command line of a guest.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use anyhow::{Result, ensure};

use super::{Agent, DISK_NAMES, GuestConfig, Style};
use crate::{Cache, Disk, Invocation};

/// KVM is never used: the device may be there and yet boot nothing, and results must not depend on it.
const MACHINE: &str = "-machine pc -accel tcg,thread=multi,tb-size=64 -cpu max -smp 1 \
                       -nodefaults -no-user-config -display none -no-reboot -device virtio-serial-pci";
const KERNEL: &str = "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check random.trust_cpu=on mitigations=off";

/// QEMU's whole command line for this guest.
pub(super) fn build(cache: &Cache, config: &GuestConfig) -> Result<Invocation> {
    let agent = if config.agent == Agent::On { "on" } else { "off" };
    let (load, pause) = (config.load.name(), config.writer_pause.as_micros());
    let trouble = config.trouble.switch();
    let sockets = config.socket_directory();
    let invocation = kernel(cache, config, &format!("load={load} wsleep={pause} agent={agent} {trouble}"))?
        .args(monitor("qmp", &sockets.join("qmp.sock")))
        .args(monitor("test-qmp", &config.file("test-qmp.sock")))
        .args(port("qga", "org.qemu.guest_agent.0", &sockets.join("qga.sock")))
        .args(port("heartbeat", "org.freezeframe.heartbeat", &config.file("heartbeat.sock")))
        .args(port("control", "org.freezeframe.control", &config.file("control.sock")));
    Ok(disks(invocation, config).args(&config.extra_arguments))
}

/// QEMU with the same disks that only looks at them, see `mode=verify` of the guest's init.
pub(super) fn build_verifying(cache: &Cache, config: &GuestConfig) -> Result<Invocation> {
    Ok(disks(kernel(cache, config, "mode=verify")?, config))
}

fn kernel(cache: &Cache, config: &GuestConfig, switches: &str) -> Result<Invocation> {
    let most = DISK_NAMES.len();
    ensure!(config.disks.len() <= most, "a guest has at most {most} disks, not {}", config.disks.len());
    Ok(Invocation::new("qemu-system-x86_64")
        .args(["-name", &config.name, "-m", &config.memory_mib.to_string()])
        .args(MACHINE.split_whitespace())
        .args(["-kernel".as_ref(), cache.guest_file("vmlinuz")?.as_os_str()])
        .args(["-initrd".as_ref(), cache.guest_file("initrd")?.as_os_str()])
        .args(["-append", &format!("{KERNEL} {switches}")])
        .args(["-chardev", &format!("file,id=console,path={}", config.file("console.log").display())])
        .args(["-serial", "chardev:console"]))
}

fn monitor(id: &str, path: &Path) -> [String; 4] {
    let chardev = format!("socket,id={id},path={},server=on,wait=off", path.display());
    ["-chardev".into(), chardev, "-mon".into(), format!("chardev={id},mode=control")]
}

fn port(id: &str, name: &str, path: &Path) -> [String; 4] {
    let chardev = format!("socket,id={id},path={},server=on,wait=off", path.display());
    ["-chardev".into(), chardev, "-device".into(), format!("virtserialport,chardev={id},name={name}")]
}

fn disks(invocation: Invocation, config: &GuestConfig) -> Invocation {
    let named = DISK_NAMES.into_iter().zip(&config.disks);
    named.fold(invocation, |invocation, (name, disk)| match config.style {
        Style::Blockdev => invocation.args(blockdev(name, disk)),
        Style::Drive => invocation.args(drive(name, disk)),
    })
}

fn blockdev(name: &str, disk: &Disk) -> [String; 6] {
    let (path, format) = (disk.path.display(), disk.format.name());
    // A path that isn't there yet is a file's.
    let is_device = std::fs::metadata(&disk.path).is_ok_and(|found| found.file_type().is_block_device());
    let driver = if is_device { "host_device" } else { "file" };
    let file = format!("driver={driver},node-name=file-{name},filename={path}");
    let node = format!("driver={format},node-name=fmt-{name},file=file-{name}");
    let device = format!("virtio-blk-pci,drive=fmt-{name},id={name}");
    ["-blockdev".into(), file, "-blockdev".into(), node, "-device".into(), device]
}

fn drive(name: &str, disk: &Disk) -> [String; 4] {
    let (path, format) = (disk.path.display(), disk.format.name());
    let drive = format!("if=none,id=drive-{name},file={path},format={format}");
    ["-drive".into(), drive, "-device".into(), format!("virtio-blk-pci,drive=drive-{name},id={name}")]
}
