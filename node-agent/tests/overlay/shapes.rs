//! The ways in which a VM's disks stand on its command line.

use tempfile::TempDir;

use crate::lab::{Lab, images};
use crate::machine::{Drive, make_image};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// `-blockdev`, a node for the file and one for the format.
    Blockdev,
    /// `-blockdev` with the file in line: QEMU names that node itself.
    Inline,
    /// Past the host's page cache.
    Direct,
    /// A throttle filter between device and format.
    Throttled,
    /// Every disk on an iothread of its own.
    Iothreads,
    /// On iothreads, with the file in line.
    InlineIothreads,
    /// Over an image that was there before, with a relative name.
    Backed,
    /// `-drive`: QEMU names every node itself.
    Legacy,
}

pub async fn lab(shape: Shape, disks: usize) -> Lab {
    let directory = TempDir::new().unwrap();
    let images = images(&directory);
    let mut extra = vec![];
    let mut drives = vec![];
    for id in ["vda", "vdb"].into_iter().take(disks) {
        let image = images.join(format!("{id}.qcow2"));
        if shape == Shape::Backed {
            let golden = images.join("golden.qcow2");
            if !golden.exists() {
                make_image(&golden, None);
                crate::machine::run(
                    "qemu-io",
                    &["-f", "qcow2", "-c", "write -P 200 0 512k", crate::machine::path(&golden)],
                );
            }
            make_image(&image, Some("golden.qcow2"));
        } else {
            make_image(&image, None);
        }
        if matches!(shape, Shape::Iothreads | Shape::InlineIothreads) {
            extra.extend(["-object".to_owned(), format!("iothread,id=io-{id}")]);
        }
        if shape == Shape::Throttled {
            extra.extend(["-object".to_owned(), format!("throttle-group,id=group-{id},x-bps-total=1000000000")]);
        }
        drives.push(drive(shape, id, image));
    }
    Lab::start(directory, &extra, drives).await
}

fn drive(shape: Shape, id: &str, image: std::path::PathBuf) -> Drive {
    let path = image.display();
    let blockdev = |options: String| ["-blockdev".to_owned(), options];
    let file = blockdev(format!("driver=file,node-name=file-{id},filename={path}"));
    let format = blockdev(format!("driver=qcow2,node-name=fmt-{id},file=file-{id}"));
    let (arguments, device) = match shape {
        Shape::Blockdev | Shape::Backed => ([file, format].concat(), format!("drive=fmt-{id}")),
        Shape::Iothreads => ([file, format].concat(), format!("drive=fmt-{id},iothread=io-{id}")),
        Shape::Inline => {
            let inline = format!("driver=qcow2,node-name=fmt-{id},file.driver=file,file.filename={path}");
            (blockdev(inline).to_vec(), format!("drive=fmt-{id}"))
        }
        Shape::InlineIothreads => {
            let inline = format!("driver=qcow2,node-name=fmt-{id},file.driver=file,file.filename={path}");
            (blockdev(inline).to_vec(), format!("drive=fmt-{id},iothread=io-{id}"))
        }
        Shape::Direct => {
            let file = format!("driver=file,node-name=file-{id},filename={path},cache.direct=on");
            let format = format!("driver=qcow2,node-name=fmt-{id},file=file-{id},cache.direct=on");
            ([blockdev(file), blockdev(format)].concat(), format!("drive=fmt-{id}"))
        }
        Shape::Throttled => {
            let filter = format!("driver=throttle,node-name=slow-{id},throttle-group=group-{id},file=fmt-{id}");
            ([file, format, blockdev(filter)].concat(), format!("drive=slow-{id}"))
        }
        Shape::Legacy => {
            let drive = format!("if=none,id=drive-{id},file={path},format=qcow2");
            (vec!["-drive".into(), drive], format!("drive=drive-{id}"))
        }
    };
    Drive { id: id.to_owned(), image, arguments, device }
}

/// Snapshots, deletions and restarts, mixed; two disks in one directory.
async fn life(shape: Shape) {
    let mut lab = lab(shape, 2).await;
    let (a, b, c) = (lab.take().await, lab.take().await, lab.take().await);
    lab.check().await;
    for number in [b, c, a] {
        lab.delete(number).await;
        lab.check().await;
        lab.write().await;
    }
    let (a, b) = (lab.take().await, lab.take().await);
    lab.restart().await;
    lab.check().await;
    lab.write().await;
    lab.delete(b).await;
    lab.check().await;
    let c = lab.take().await;
    lab.check().await;
    lab.delete(a).await;
    lab.check().await;
    lab.delete(c).await;
    lab.check().await;
    lab.restart().await;
    lab.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_with_a_named_file_node_live_through_snapshots_and_restarts() {
    life(Shape::Blockdev).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_with_an_inline_file_live_through_snapshots_and_restarts() {
    life(Shape::Inline).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_past_the_page_cache_live_through_snapshots_and_restarts() {
    life(Shape::Direct).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_throttled_disk_stays_throttled_through_snapshots_and_restarts() {
    life(Shape::Throttled).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_on_iothreads_live_through_snapshots_and_restarts() {
    life(Shape::Iothreads).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_on_iothreads_with_an_inline_file_live_through_snapshots_and_restarts() {
    life(Shape::InlineIothreads).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_over_a_shared_image_leave_it_alone() {
    life(Shape::Backed).await;
}

/// What can't be merged while QEMU holds a base by a stale name is merged when it doesn't.
#[tokio::test(flavor = "multi_thread")]
async fn a_legacy_drive_is_snapshotted_and_its_snapshots_are_deleted() {
    let mut lab = lab(Shape::Legacy, 2).await;
    let (a, b, c) = (lab.take().await, lab.take().await, lab.take().await);
    lab.check().await;
    for number in [b, c, a] {
        lab.delete(number).await;
        lab.check().await;
        lab.write().await;
    }
    lab.restart().await;
    lab.check().await;
    let a = lab.take().await;
    lab.restart().await;
    let (b, c) = (lab.take().await, lab.take().await);
    for number in [a, c, b] {
        lab.delete(number).await;
        lab.check().await;
        lab.write().await;
    }
    lab.restart().await;
    lab.check().await;
}
