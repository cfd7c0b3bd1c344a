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

/// Makes another thin pool.
pub fn pool(name: &str, size: &str) -> String {
    group();
    lvm(&format!("lvcreate -qq -y --type thin-pool -L {size} -n {name} {GROUP}"));
    name.into()
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
