//! Before the freeze: what is dirty in the guest and on the host is written out, so that the window has little to do.
//!
//! A freeze writes the guest's dirty pages while its writers wait. Written out just before, they are few: under heavy
//! load this is the difference between seconds and a tenth of one. None of it is needed for correctness, so a failure
//! is logged and the session goes on.

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use crate::drivers::DiskTask;
use crate::hypervisor::disks::{Disks, disks};
use crate::hypervisor::image::ImageRoots;
use crate::hypervisor::{AGENT_TIMEOUT, Vm};

/// How long the guest's own `sync`, and the host's, may take.
const FLUSH_BOUND: Duration = Duration::from_secs(10);

/// Flushes the guest, if it is to be frozen, then the images on this node.
pub async fn flush(vm: &mut Vm, tasks: &[DiskTask], guest: bool) {
    if guest {
        flush_guest(vm).await;
    }
    flush_in_time(tasks.iter().filter_map(|task| task.path.clone()).collect()).await;
}

/// Flushes all images of a VM, and one that will be, before its virtual CPUs stop: stopping has QEMU flush them while the
/// guest waits.
pub async fn before_pause(vm: &Vm, roots: &ImageRoots, and: PathBuf) {
    match disks(vm, roots).await {
        Ok(Disks { found, .. }) => {
            let images = found.into_iter().filter_map(|disk| disk.facts.path.ok());
            flush_in_time(images.chain([and]).collect()).await;
        }
        Err(error) => tracing::warn!(%error, "the images to flush before a pause can't be found"),
    }
}

async fn flush_in_time(images: Vec<PathBuf>) {
    let flushed = tokio::task::spawn_blocking(move || flush_images(images));
    match tokio::time::timeout(FLUSH_BOUND, flushed).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "flushing the images was given up"),
        Err(_) => tracing::warn!(bound = ?FLUSH_BOUND, "flushing the images takes too long; going on"),
    }
}

async fn flush_guest(vm: &mut Vm) {
    let Some(agent) = vm.agent() else { return };
    let allowed = match agent.info(AGENT_TIMEOUT).await {
        Ok(info) => info.enabled("guest-exec"),
        Err(error) => return tracing::warn!(%error, "the guest agent doesn't say what it allows"),
    };
    if !allowed {
        return tracing::debug!("the guest agent doesn't allow guest-exec: no sync before the freeze");
    }
    match agent.exec("sync", &[], FLUSH_BOUND).await {
        Ok(0) => {}
        Ok(code) => tracing::warn!(code, "sync failed in the guest"),
        Err(error) => tracing::warn!(%error, "sync in the guest was given up"),
    }
}

fn flush_images(images: Vec<PathBuf>) {
    for image in images {
        let flushed = File::open(&image).and_then(|file| file.sync_data());
        if let Err(error) = flushed {
            tracing::warn!(image = %image.display(), %error, "an image was not flushed");
        }
    }
}
