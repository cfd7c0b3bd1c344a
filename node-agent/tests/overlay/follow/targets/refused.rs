//! Files that can't be a layer.

use std::collections::BTreeMap;
use std::path::Path;

use freezeframe_api::conditions::reasons;
use freezeframe_node_agent::hypervisor::image::trusted_directory;
use freezeframe_node_agent::hypervisor::lock::ImageLock;

use super::{FILE, Lent, said};
use crate::follow::Base;
use crate::machine::{REGION, REGIONS, path, run};

type Spoil = fn(&Path);

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_cannot_be_the_layer_is_refused_in_words_and_left_as_it_was() {
    let cases: [(&str, Spoil); 7] = [
        ("isn't there", |target| std::fs::remove_file(target).unwrap()),
        ("qcow2", |target| std::fs::write(target, vec![0; 1 << 20]).unwrap()),
        ("has 65536 bytes", |target| run("qemu-img", &["create", "-q", "-f", "qcow2", path(target), "64k"])),
        ("needs another file", |target| {
            run("qemu-img", &["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "/dev/null", path(target)]);
        }),
        ("is not empty", |target| run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 64k", path(target)])),
        ("is not empty", |target| {
            let size = (REGION * REGIONS as u64).to_string();
            run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "preallocation=falloc", path(target), &size]);
        }),
        ("has other names", |target| std::fs::hard_link(target, target.with_extension("other")).unwrap()),
    ];
    let mut lent = Lent::start(Base::Raw).await;
    for (why, spoil) in cases {
        println!("{why}");
        lent.make();
        spoil(&lent.target());
        let before = std::fs::read(lent.target()).ok();
        let (reason, message) = said(&lent.refusal().await);
        assert_eq!(reason, reasons::INVALID_TARGET, "{message}");
        assert!(message.contains(why) && message.contains(FILE), "{message}");
        let after = std::fs::read(lent.target()).ok();
        assert!(view_of(before.as_deref()) == view_of(after.as_deref()), "{why}: the file isn't as it was");
        drop(std::fs::remove_file(lent.target()));
        drop(std::fs::remove_file(lent.target().with_extension("other")));
        lent.check().await;
    }
    lent.make();
    let directory = trusted_directory(lent.target().parent().unwrap()).unwrap();
    let held = ImageLock::take(&directory, FILE).unwrap();
    assert!(said(&lent.refusal().await).1.contains("in use"));
    drop(held);
    for (target, why) in
        [("../shop/db.qcow2", "`targetGroups`"), ("vg0/db", "`targetGroups`"), ("..", "not a file's name")]
    {
        lent.lab.targets = BTreeMap::from([("vda".into(), target.into())]);
        let (_, order) = lent.lab.order();
        assert!(said(&lent.lab.advance(&order).await).1.contains(why), "{target}");
    }
    lent.check().await;
    let taken = lent.take().await;
    lent.delete(taken).await;
}

/// What must not change of a file: all of it but the header's first clusters, where `qemu-img` may write the same anew.
fn view_of(bytes: Option<&[u8]>) -> Option<(usize, &[u8])> {
    bytes.map(|bytes| (bytes.len(), &bytes[bytes.len().min(1 << 16)..]))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_without_a_class_or_a_disk_for_it_is_refused_in_words() {
    let mut lent = Lent::start(Base::Raw).await;
    let targets = lent.lab.parameters.remove("targets").unwrap();
    assert_eq!(said(&lent.refusal().await).0, reasons::INVALID_PARAMETER);
    lent.lab.parameters.insert("targets".into(), "/tmp".into());
    assert_eq!(said(&lent.refusal().await).0, reasons::INVALID_PARAMETER, "not beneath a root");
    lent.lab.parameters.insert("targets".into(), targets);
    lent.lab.parameters.insert("follow".into(), "false".into());
    let (reason, message) = said(&lent.refusal().await);
    assert_eq!(reason, reasons::DISK_NOT_SUPPORTED);
    assert!(message.contains("`follow`"), "{message}");
    lent.lab.parameters.insert("follow".into(), "true".into());
    lent.check().await;
    let taken = lent.take().await;
    // The disk is a qcow2 file now.
    lent.lab.targets = BTreeMap::from([("vda".into(), FILE.into())]);
    let (_, order) = lent.lab.order();
    let (reason, message) = said(&lent.lab.advance(&order).await);
    assert_eq!(reason, reasons::DISK_NOT_SUPPORTED);
    assert!(message.contains("beside it"), "{message}");
    lent.check().await;
    lent.delete(taken).await;
}
