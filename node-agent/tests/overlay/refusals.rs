//! Disks that a layer would harm, in one VM beside a good one.

use std::path::Path;
use std::process::Command;

use freezeframe_api::conditions::{find, reasons, types};
use freezeframe_api::v1alpha1::ContentPhase;
use serde_json::json;
use tempfile::TempDir;

use crate::lab::{Lab, images};
use crate::machine::{Drive, make_image, path};

/// Disk, its format node's options, its device's options, and a word of the refusal.
const DISKS: [(&str, &str, &str, &str); 4] = [
    ("shared", "", ",share-rw=on", "share-rw"),
    ("fixed", ",read-only=on", "", "can't write"),
    ("secret", ",encrypt.format=luks,encrypt.key-secret=key", "", "encrypted"),
    ("tracked", "", "", "dirty bitmaps"),
];

async fn lab_of_odd_disks() -> Lab {
    let directory = TempDir::new().unwrap();
    let images = images(&directory);
    let mut extra = vec!["-object".to_owned(), "secret,id=key,data=opensesame".to_owned()];
    for (name, node, device, _) in DISKS {
        let image = images.join(format!("{name}.qcow2"));
        if name == "secret" {
            make_encrypted_image(&image);
        } else {
            make_image(&image, None);
        }
        let blockdev = format!("driver=qcow2,node-name={name},file.driver=file,file.filename={}{node}", path(&image));
        extra.extend(["-blockdev".into(), blockdev]);
        extra.extend(["-device".into(), format!("virtio-blk-pci,id={name},drive={name}{device}")]);
    }
    // The same image in two devices.
    extra.extend(["-device".into(), "virtio-blk-pci,id=again,drive=shared,share-rw=on".into()]);
    let image = images.join("vda.qcow2");
    make_image(&image, None);
    let node = format!("driver=qcow2,node-name=fmt-vda,file.driver=file,file.filename={}", path(&image));
    let arguments = vec!["-blockdev".into(), node];
    let vda = Drive { id: "vda".into(), image, arguments, device: "drive=fmt-vda".into() };
    Lab::start(directory, &extra, vec![vda]).await
}

/// On a busy machine QEMU can't measure now and then how long a key takes, and refuses.
fn make_encrypted_image(image: &Path) {
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "--object", "secret,id=key,data=opensesame"]);
    create.args(["-o", "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"]).arg(image).arg("1M");
    assert!((0..20).any(|_| create.status().unwrap().success()), "{create:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_a_layer_would_harm_is_refused_by_name_and_the_others_are_taken_without_it() {
    let mut lab = lab_of_odd_disks().await;
    lab.machine.execute("block-dirty-bitmap-add", json!({"node": "tracked", "name": "backup"})).await;
    for (name, words) in DISKS.map(|(name, .., words)| (name, words)).into_iter().chain([("again", "share-rw")]) {
        let (_, mut order) = lab.order();
        order.include = vec![name.into()];
        let status = lab.advance(&order).await;
        let accepted = find(&status.conditions, types::ACCEPTED).unwrap();
        assert_eq!(accepted.reason, reasons::DISK_NOT_SUPPORTED, "{name}: {accepted:?}");
        assert!(accepted.message.contains(words) && accepted.message.contains(name), "{}", accepted.message);
    }
    lab.check().await;
    let (_, mut order) = lab.order();
    // The read-only one is left out though nobody excludes it.
    order.exclude = ["shared", "again", "secret", "tracked"].map(String::from).into();
    let status = lab.advance(&order).await;
    assert_eq!(status.phase, Some(ContentPhase::Ready), "{:?}", status.conditions);
    assert_eq!(status.disks.len(), 1);
    lab.delete_order(&order).await;
    lab.check().await;
}
