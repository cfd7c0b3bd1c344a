//! Disks that aren't qcow2, under a class whose VMs' owners follow: the layer is a new file, and the next command line
//! has it.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::lab::{Lab, images};
use crate::machine::{Drive, REGION, REGIONS, format_of, path, run};
use crate::orders::orders;

/// The image that a VM has first, and the format of it.
#[derive(Clone, Copy, Debug)]
enum Base {
    Raw,
    Qed,
}

impl Base {
    fn name(self) -> &'static str {
        match self {
            Self::Raw => "vda.img",
            Self::Qed => "vda.qed",
        }
    }
}

fn drive(image: &Path) -> Drive {
    let (shown, format) = (image.display(), format_of(image));
    let file = format!("driver=file,node-name=file-vda,filename={shown}");
    let node = format!("driver={format},node-name=fmt-vda,file=file-vda");
    let arguments = ["-blockdev".into(), file, "-blockdev".into(), node].to_vec();
    Drive { id: "vda".into(), image: image.into(), arguments, device: "drive=fmt-vda".into() }
}

/// A VM with one disk that its owner will follow.
async fn lab(base: Base) -> Lab {
    let directory = TempDir::new().unwrap();
    let image = images(&directory).join(base.name());
    let size = (REGION * REGIONS as u64).to_string();
    run("qemu-img", &["create", "-q", "-f", format_of(&image), path(&image), &size]);
    let mut lab = Lab::start(directory, &[], vec![drive(&image)]).await;
    lab.parameters.insert("follow".into(), "true".into());
    lab
}

/// What the disk is called while it has a layer.
fn layer(lab: &Lab, base: Base) -> PathBuf {
    let format = format_of(Path::new(base.name()));
    lab.images().join(format!("{}.vmsnap-over-{format}.qcow2", base.name()))
}

/// Checks all that there is, where the disk's own image must be the one that the status would name.
async fn check(lab: &mut Lab, base: Base) {
    lab.disks[0].image = if lab.snapshots.is_empty() { lab.images().join(base.name()) } else { layer(lab, base) };
    lab.check().await;
}

/// Restarts the VM as its owner is told to.
async fn follow(lab: &mut Lab, base: Base) {
    let now = if lab.snapshots.is_empty() { lab.images().join(base.name()) } else { layer(lab, base) };
    lab.machine.kill();
    lab.machine.set_drives(&[drive(&now)]);
    lab.machine.start().await;
    check(lab, base).await;
}

async fn take_three(lab: &mut Lab, base: Base) -> Vec<u32> {
    let mut taken = vec![];
    for _ in 0..3 {
        taken.push(lab.take().await);
        check(lab, base).await;
    }
    taken
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_of_a_disk_that_is_not_qcow2_are_deleted_in_every_order_and_leave_it_as_it_was() {
    for base in [Base::Raw, Base::Qed] {
        let mut lab = lab(base).await;
        for order in orders(&[0, 1, 2]) {
            println!("{base:?} {order:?}");
            let taken = take_three(&mut lab, base).await;
            for at in order {
                lab.delete(taken[at]).await;
                check(&mut lab, base).await;
                lab.write().await;
            }
        }
        // Nothing but the old command line.
        lab.restart().await;
        check(&mut lab, base).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_are_deleted_in_every_order_while_the_vm_is_stopped() {
    for base in [Base::Raw, Base::Qed] {
        let mut lab = lab(base).await;
        for order in orders(&[0, 1, 2]) {
            println!("{base:?} {order:?}");
            let taken = take_three(&mut lab, base).await;
            lab.machine.kill();
            for at in order {
                lab.delete(taken[at]).await;
                check(&mut lab, base).await;
            }
            lab.machine.start().await;
            check(&mut lab, base).await;
            lab.write().await;
        }
    }
}

/// Which of the restarts come before which snapshot and deletion differs from order to order.
#[tokio::test(flavor = "multi_thread")]
async fn a_vm_whose_owner_follows_loses_nothing_in_any_order() {
    for base in [Base::Raw, Base::Qed] {
        let mut lab = lab(base).await;
        for (number, order) in orders(&[0, 1, 2]).into_iter().enumerate() {
            println!("{base:?} {order:?}");
            let mut taken = vec![];
            for at in 0..3 {
                if number & (1 << at) != 0 {
                    follow(&mut lab, base).await;
                }
                taken.push(lab.take().await);
                check(&mut lab, base).await;
            }
            for (step, at) in order.into_iter().enumerate() {
                if (number + step) % 3 != 0 {
                    follow(&mut lab, base).await;
                }
                lab.delete(taken[at]).await;
                check(&mut lab, base).await;
                lab.write().await;
            }
            // What the command line had may be gone by now.
            follow(&mut lab, base).await;
        }
    }
}
