//! What guests that are emulated in the emulated node are made of.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Once;
use std::time::Duration;

use freezeframe_e2e::{Disk, Format, GuestConfig, Load};

use crate::node::{GROUP, Lv, lvm, run};
use crate::world::World;

/// Room for a file system with a journal, in MiB.
pub const MIB: u64 = 24;
/// For its boot, on a busy machine.
pub const BOOT: Duration = Duration::from_secs(900);
/// For some records of its writer.
pub const RECORDS: Duration = Duration::from_secs(300);
/// Without instructions that the kernel would prefer and that are slow to emulate.
const CPU: &str = "max,-erms,-fsrm,-la57,-smap";

/// A guest with the witness over all its disks, slow enough that it has time for other things.
pub fn config(world: &World, disks: Vec<Disk>) -> GuestConfig {
    static READY: Once = Once::new();
    READY.call_once(|| {
        lay_out_cache();
        // For the file systems and the witness: nobody loads it here when a file is mounted.
        run("modprobe", &["loop".to_owned()]);
    });
    let mut config = GuestConfig::new("shop", "db-1", &world.sessions.vm_root, &world.directory().join("guest"));
    (config.disks, config.load, config.boot_bound) = (disks, Load::Row, BOOT);
    config.writer_pause = Duration::from_secs(2);
    config.extra_arguments = ["-cpu", CPU].map(Into::into).into();
    config
}

/// The guest's kernel and initramfs, where the parts of the end-to-end tests look for them.
fn lay_out_cache() {
    let cache = std::env::var("FREEZEFRAME_CACHE").expect("FREEZEFRAME_CACHE must name a directory to be made");
    let guest = Path::new(&cache).join("guest");
    std::fs::create_dir_all(&guest).unwrap();
    for file in ["vmlinuz", "initrd"] {
        symlink(Path::new("/share").join(file), guest.join(file)).unwrap();
    }
}

/// Makes a volume with an empty file system.
pub fn formatted(volume: &Lv) -> Disk {
    let (name, path) = (&volume.name, volume.path());
    match &volume.pool {
        Some(pool) => lvm(&format!("lvcreate -qq -y -V {MIB}m --thinpool {GROUP}/{pool} -n {name}")),
        None => lvm(&format!("lvcreate -qq -y -L {MIB}m -Wy -n {name} {GROUP}")),
    };
    run("mkfs.ext4", &["-q".to_owned(), "-F".to_owned(), path.clone()]);
    Disk::existing(path, Format::Raw)
}

/// Removes volumes of the group that nobody uses any more.
pub fn remove_volumes(names: &[&str]) {
    for name in names {
        lvm(&format!("lvremove -qq -f {GROUP}/{name}"));
    }
}
