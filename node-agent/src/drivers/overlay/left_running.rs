//! Merges that nobody waits for any more, because the agent that began them has ended or gave up on them.

use super::follow::image_below;
use super::shorten;
use crate::drivers::{Result, jobs, qemu};
use crate::hypervisor::disks::disks;
use crate::hypervisor::image::ImageRoots;
use crate::hypervisor::{QMP_TIMEOUT, Vm};

/// Cancels them, so that a snapshot can be taken. Only for who has the VM to itself: then nobody waits for any.
pub async fn make_way(vm: &Vm, roots: &ImageRoots) -> Result<()> {
    let all = vm.qmp().query_jobs(QMP_TIMEOUT).await.map_err(qemu("list the block jobs"))?;
    // One that is over is the proof that a merge is done.
    let ours = all.iter().filter(|job| is_ours(&job.id) && job.status != "concluded").collect::<Vec<_>>();
    if ours.is_empty() {
        return Ok(());
    }
    for job in ours {
        tracing::info!(job = job.id, "a merge that nobody waits for makes way for a snapshot");
        jobs::cancel(vm.qmp(), &job.id).await?;
    }
    let found = disks(vm, roots).await.map_err(qemu("read the disks"))?.found;
    for layer in found.into_iter().filter_map(|disk| disk.facts.path.ok()).filter(|path| image_below(path).is_some()) {
        // It tells that the VM ran on it by being newer than what a merge wrote to the image below.
        let (directory, name) = roots.directory_of(&layer)?;
        directory.touch(&name)?;
    }
    Ok(())
}

fn is_ours(job: &str) -> bool {
    job == shorten::JOB || (job.starts_with("ff-") && job.ends_with("-merge"))
}
