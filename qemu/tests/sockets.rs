//! Reaching a socket under a directory that its owner may rearrange.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use freezeframe_qemu::{Error, connect_beneath};
use tempfile::TempDir;

const SOON: Duration = Duration::from_secs(20);

fn root_with_socket() -> (TempDir, UnixListener) {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(root.path().join("shop/db-1")).unwrap();
    let listener = UnixListener::bind(root.path().join("shop/db-1/qmp.sock")).unwrap();
    (root, listener)
}

async fn refused(root: &Path, relative: &str) -> Error {
    match connect_beneath(root, Path::new(relative), SOON).await {
        Ok(_) => panic!("{relative} was connected"),
        Err(error) => error,
    }
}

#[tokio::test]
async fn a_socket_beneath_the_root_is_connected_and_identified() {
    let (root, _listener) = root_with_socket();
    let (_stream, identity) = connect_beneath(root.path(), Path::new("shop/db-1/qmp.sock"), SOON).await.unwrap();
    let metadata = std::fs::metadata(root.path().join("shop/db-1/qmp.sock")).unwrap();
    assert_eq!((identity.device, identity.inode), (metadata.dev(), metadata.ino()));
    assert_eq!(identity.peer_pid, i32::try_from(std::process::id()).unwrap());
    assert_eq!(identity.peer_uid, metadata.uid());
}

#[tokio::test]
async fn links_dots_and_absolute_paths_do_not_lead_out_of_the_root() {
    let (outside, _listener) = root_with_socket();
    let (root, _other) = root_with_socket();
    symlink(outside.path().join("shop/db-1/qmp.sock"), root.path().join("shop/link.sock")).unwrap();
    symlink("db-1/qmp.sock", root.path().join("shop/inner.sock")).unwrap();
    symlink(outside.path(), root.path().join("dir")).unwrap();
    let outside_name = outside.path().file_name().unwrap().to_str().unwrap();
    let absolute = root.path().join("shop/db-1/qmp.sock");
    for path in [
        "shop/link.sock",
        "shop/inner.sock",
        "dir/shop/db-1/qmp.sock",
        &format!("../{outside_name}/shop/db-1/qmp.sock"),
        absolute.to_str().unwrap(),
        "shop/missing.sock",
        "",
    ] {
        assert!(matches!(refused(root.path(), path).await, Error::Io { .. }), "{path}");
    }
}

#[tokio::test]
async fn what_is_no_socket_is_not_opened() {
    let (root, _listener) = root_with_socket();
    std::fs::write(root.path().join("file"), "x").unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        root.path().join("fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    for path in ["file", "fifo", "shop"] {
        assert!(matches!(refused(root.path(), path).await, Error::NotASocket { .. }), "{path}");
    }
}

#[tokio::test]
async fn a_socket_without_a_listener_is_refused_and_a_full_queue_is_busy() {
    let (root, listener) = root_with_socket();
    let path = Path::new("shop/db-1/qmp.sock");
    rustix::net::listen(&listener, 0).unwrap();
    let mut held = Vec::new();
    let full = loop {
        match connect_beneath(root.path(), path, SOON).await {
            Ok(connected) => held.push(connected),
            Err(error) => break error,
        }
        assert!(held.len() < 1000);
    };
    assert!(matches!(full, Error::Busy), "{full:?}");
    drop(listener);
    assert!(matches!(refused(root.path(), "shop/db-1/qmp.sock").await, Error::Io { .. }));
}
