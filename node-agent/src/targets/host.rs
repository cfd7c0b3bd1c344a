//! VMs in the host's directories: `<root>/<namespace>/<name>/{qmp.sock,target.yaml}`.

use std::fs;
use std::io;
use std::path::Path;

use crate::hypervisor::{VmKey, target_file};

/// Every VM that has a directory with a monitor's socket or a [`target_file`] in it, running or not.
pub fn find(root: &Path) -> io::Result<Vec<VmKey>> {
    let mut found = vec![];
    for namespace in directories(root)? {
        for name in directories(&root.join(&namespace))? {
            let has = |file| fs::symlink_metadata(root.join(&namespace).join(&name).join(file)).is_ok();
            if has("qmp.sock") || has(target_file::FILE) {
                found.push(VmKey { namespace: namespace.clone(), name });
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Whether a VM's directory is there, with or without sockets in it.
pub fn is_there(root: &Path, vm: &VmKey) -> bool {
    let namespace = root.join(&vm.namespace);
    let is_directory = |path: &Path| fs::symlink_metadata(path).is_ok_and(|found| found.is_dir());
    is_directory(&namespace) && is_directory(&namespace.join(&vm.name))
}

/// Names of the directories in one; others, and names that Kubernetes wouldn't take, are passed over.
fn directories(parent: &Path) -> io::Result<Vec<String>> {
    let mut names = vec![];
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        let name = entry.file_name().to_str().filter(|name| is_dns_label(name)).map(str::to_owned);
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => names.extend(name),
            // Gone since it was listed, or not a directory.
            Ok(_) | Err(_) => {}
        }
    }
    Ok(names)
}

fn is_dns_label(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    name.len() <= 63 && name.bytes().all(inner) && !name.starts_with('-') && !name.ends_with('-') && !name.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_directories_with_a_monitor_or_a_file_and_a_good_name_are_vms() {
        let root = tempfile::tempdir().unwrap();
        for path in ["shop/db-1", "shop/db-2", "shop/no-monitor", "shop/Bad_Name", "..data/x"] {
            fs::create_dir_all(root.path().join(path)).unwrap();
        }
        for path in
            ["shop/db-1/qmp.sock", "shop/db-2/target.yaml", "shop/Bad_Name/qmp.sock", "..data/x/qmp.sock", "shop/file"]
        {
            fs::write(root.path().join(path), "").unwrap();
        }
        let found = find(root.path()).unwrap();
        let vm = |name: &str| VmKey { namespace: "shop".into(), name: name.into() };
        assert_eq!(found, [vm("db-1"), vm("db-2")]);
    }

    #[test]
    fn a_root_that_is_not_there_is_an_error() {
        assert!(find(Path::new("/nonexistent/freezeframe")).is_err());
    }
}
