//! The witness can tell a frozen cut from one that was not: done by hand, without any of our programs.
//! Needs `cargo xtask setup`.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use freezeframe_e2e::{Disk, Filesystem, Format, Guest, GuestConfig, Load, verify_by_booting, witness};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

const SOON: Duration = Duration::from_secs(60);

/// One command to the guest agent, as a person would type it.
async fn ask_agent(guest: &Guest, command: &str, arguments: Value) -> Result<Value> {
    let mut stream = UnixStream::connect(guest.config().socket_directory().join("qga.sock")).await?;
    let request = json!({"execute": command, "arguments": arguments});
    stream.write_all(format!("{request}\n").as_bytes()).await?;
    let mut line = String::new();
    tokio::time::timeout(SOON, BufReader::new(stream).read_line(&mut line)).await??;
    Ok(serde_json::from_str::<Value>(&line)?["return"].take())
}

/// Puts an overlay on each disk at one instant; the new nodes are `<name>-vda`, ..., the ones they cover `<below>-vda`, ...
async fn cut(guest: &Guest, directory: &Path, below: &str, name: &str) -> Result<Vec<Disk>> {
    let overlay = |disk: &str| directory.join(format!("{name}-{disk}.qcow2"));
    let actions = ["vda", "vdb"].map(|disk| {
        json!({"type": "blockdev-snapshot-sync", "data": {"node-name": format!("{below}-{disk}"), "format": "qcow2",
               "snapshot-node-name": format!("{name}-{disk}"), "snapshot-file": overlay(disk)}})
    });
    guest.monitor().execute("transaction", json!({"actions": actions})).await?;
    Ok(["vda", "vdb"].map(|disk| Disk::existing(overlay(disk), Format::Qcow2)).into())
}

#[tokio::test]
async fn a_cut_while_frozen_is_seen_as_frozen_and_one_without_is_not() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut config = GuestConfig::new("shop", "db-1", &directory.path().join("vms"), &directory.path().join("guest"));
    config.load = Load::Heavy;
    config.disks = vec![
        Disk::create(directory.path().join("a.qcow2"), Format::Qcow2, Filesystem::Ext4, 512)?,
        Disk::create(directory.path().join("b.raw"), Format::Raw, Filesystem::Xfs, 512)?,
    ];
    let guest = Guest::boot(config).await?;
    guest.await_records(100, SOON).await?;
    let sync = ask_agent(&guest, "guest-exec", json!({"path": "/bin/sync"})).await?;
    assert!(sync["pid"].is_i64(), "the agent may run sync: {sync}");

    assert_eq!(ask_agent(&guest, "guest-fsfreeze-freeze", json!({})).await?, 2);
    let durable = guest.records_written();
    let overlays = cut(&guest, directory.path(), "fmt", "first").await?;
    assert_eq!(ask_agent(&guest, "guest-fsfreeze-thaw", json!({})).await?, 2);
    guest.await_records(100, SOON).await?;
    cut(&guest, directory.path(), "first", "second").await?;

    let frozen = witness::check(&guest.config().disks)?;
    frozen.ensure_frozen()?;
    assert!(frozen.disks[1].records.whole >= durable, "acknowledged {durable}: {frozen:?}");
    let running = witness::check(&overlays)?;
    running.ensure_one_instant()?;
    assert!(running.ensure_frozen().is_err(), "{running:?}");
    assert!(running.disks[1].records.whole >= durable + 100, "{running:?}");

    let verified = verify_by_booting(&guest.config().disks, &directory.path().join("verify"))?;
    let records: Vec<_> = verified.iter().map(|disk| (disk.records, disk.clean)).collect();
    assert_eq!(records, [(frozen.disks[0].records.whole, true), (frozen.disks[1].records.whole, true)]);
    Ok(())
}
