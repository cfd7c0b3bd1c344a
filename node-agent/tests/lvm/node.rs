//! The node's volume group, and LVM as its administrator uses it.

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::Once;

use crate::content::SIZE;

/// A hyphen in it, so that device-mapper's name for a volume is not LVM's.
pub const GROUP: &str = "ff-vg";
const POOL: &str = "pool";

/// A volume to be made.
#[derive(Clone, Debug)]
pub struct Lv {
    pub name: String,
    pub pool: Option<String>,
}

impl Lv {
    pub fn path(&self) -> String {
        format!("/dev/{GROUP}/{}", self.name)
    }

    pub fn create(&self) {
        let (name, size) = (&self.name, SIZE);
        match &self.pool {
            Some(pool) => lvm(&format!("lvcreate -qq -y -V {size}b --thinpool {GROUP}/{pool} -n {name}")),
            None => lvm(&format!("lvcreate -qq -y -L {size}b -Wy -n {name} {GROUP}")),
        };
        // What a disk reads before anything is written must be known.
        run(
            "dd",
            &["if=/dev/zero", &format!("of={}", self.path()), "bs=8M", "count=1", "oflag=direct"].map(String::from),
        );
    }
}

pub fn thin(name: &str) -> Lv {
    group();
    Lv { name: name.into(), pool: Some(POOL.into()) }
}

pub fn thick(name: &str) -> Lv {
    group();
    Lv { name: name.into(), pool: None }
}

/// A thin pool of one test's own.
pub struct Pool(&'static str);

impl Pool {
    /// Of so many MiB.
    pub fn new(name: &'static str, mib: u32) -> Self {
        group();
        lvm(&format!("lvcreate -qq -y --type thin-pool -L {mib}m -n {name} {GROUP}"));
        Self(name)
    }

    /// A volume to be made in it.
    pub fn volume(&self, name: &str) -> Lv {
        Lv { name: name.into(), pool: Some(self.0.into()) }
    }

    /// Its name as messages have it.
    pub fn path(&self) -> String {
        format!("/dev/{GROUP}/{}", self.0)
    }

    /// Puts so many MiB into it, in a volume of their own.
    pub fn fill(&self, filler: &str, mib: u32) {
        let filler = self.volume(filler);
        lvm(&format!("lvcreate -qq -y -V {}m --thinpool {GROUP}/{} -n {}", mib + 1, self.0, filler.name));
        let to = format!("of={}", filler.path());
        run("dd", &["if=/dev/urandom", &to, "bs=1M", &format!("count={mib}"), "oflag=direct"].map(String::from));
    }

    /// Has its metadata fill until that many percent of it are in use: each of these volumes, which LVM knows nothing
    /// of, takes a block.
    pub fn fill_metadata(&self, percent: f64) {
        let device = format!("{}-{}-tpool", GROUP.replace('-', "--"), self.0);
        for id in 10_000.. {
            run("dmsetup", &["message", &device, "0", &format!("create_thin {id}")].map(String::from));
            if id % 50 == 0 && self.says("metadata_percent").parse::<f64>().unwrap() >= percent {
                return;
            }
        }
    }

    /// What LVM says of it.
    pub fn says(&self, field: &str) -> String {
        lvm(&format!("lvs --noheadings --units b --nosuffix -o {field} {GROUP}/{}", self.0))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            lvm(&format!("lvremove -qq -f {GROUP}/{}", self.0));
        }
    }
}

/// All volumes of the group.
pub fn names() -> BTreeSet<String> {
    lvm(&format!("lvs --noheadings -o lv_name {GROUP}")).split_whitespace().map(str::to_owned).collect()
}

/// Runs LVM with arguments that have no spaces in them; panics with what it says if it fails.
pub fn lvm(arguments: &str) -> String {
    run("lvm", &arguments.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
}

pub fn run(program: &str, arguments: &[String]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {}: {said}", arguments.join(" "));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn group() {
    static MADE: Once = Once::new();
    MADE.call_once(|| {
        let disk = std::env::var("LVM_TEST_DISK").expect("LVM_TEST_DISK must name an empty disk");
        lvm(&format!("vgcreate -qq -y {GROUP} {disk}"));
        lvm(&format!("lvcreate -qq -y --type thin-pool -L 512m -n {POOL} {GROUP}"));
    });
}
