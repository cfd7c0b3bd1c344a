//! Making a chain shorter without deleting anything.
//!
//! Between the layers that snapshots need there may be files that none does: those of snapshots that were retained, and
//! images that somebody else put there. They are others', so they are never written, moved or unlinked; only what they
//! hold is copied *up*, into the layer of ours above them, whose header then names the image below them.
//!
//! ```text
//!  before:  disk ─► snapshot 3 ─► retained 2 ─► snapshot 1         run: 2; into: 3; base: 1
//!  after:   disk ─► snapshot 3 ─────────────► snapshot 1           retained 2 ─► snapshot 1, beside the chain
//! ```
//!
//! Every image reads the same at every instant, so it may be cut off anywhere and begun anew. The lowest image of a
//! chain stays what it is: it may be a template of many VMs.

use std::cmp::Reverse;
use std::path::{Path, PathBuf};

use freezeframe_qemu::{BlockGraph, Node};

use super::at_rest;
use super::place::{Place, name_of};
use super::prepare::{forget_node, header};
use super::runs::{self, Run, from_below};
use super::upwards::{Upwards, may_take, room};
use crate::drivers::jobs;
use crate::drivers::{DriverError, Env, Result, Sibling, qemu};
use crate::hypervisor::disks::path_of;
use crate::hypervisor::graph::{NodeFile, NodeFiles, node_files, take_back_unused};
use crate::hypervisor::image::{FileId, ImageDirectory};
use crate::hypervisor::{QMP_TIMEOUT, Vm};

/// A VM has one such job at a time.
pub const JOB: &str = "ff-shorten";
/// Each round leaves out an image at least, or makes one read-only.
const MOST_ROUNDS: usize = 1024;

/// A disk whose chain is deeper than it may be and can't be shortened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TooDeep {
    /// The disk.
    pub disk: String,
    /// Images below its own.
    pub depth: usize,
    /// Files of snapshots in the chain, the oldest first.
    pub needed: Vec<PathBuf>,
    /// What is in the way of shortening it, where that isn't the snapshots.
    pub hindrance: Option<String>,
}

/// Cancels what an earlier life of the agent left unfinished.
pub async fn make_way(vm: &Vm) -> Result<()> {
    jobs::cancel(vm.qmp(), JOB).await
}

/// Shortens the chains of all disks that have more than `deepest` images below their own; what stays too deep is
/// returned. `env.siblings` are the files of all snapshots of the VM.
pub async fn shorten(env: &Env<'_>, vm: &Vm, deepest: usize) -> Result<Vec<TooDeep>> {
    make_way(vm).await?;
    for _ in 0..MOST_ROUNDS {
        let (graph, files) = tidy(env, vm).await?;
        let mut left = vec![];
        let mut next = None;
        for disk in graph.disks() {
            let Some(top) = disk.top.as_deref() else { continue };
            let place = Place::of_chain(&graph, disk, top, &files);
            let depth = place.chain.len().saturating_sub(1);
            if depth <= deepest {
                continue;
            }
            let chain = Chain::of(env, place);
            match chain.next_run() {
                Ok(run) => next = next.or(Some((chain, run))),
                Err(hindrance) => {
                    left.push(TooDeep { disk: disk.name(), depth, needed: chain.needed(), hindrance });
                }
            }
        }
        let Some((chain, run)) = next else { return Ok(left) };
        copy_up(env, vm, &chain, run).await?;
    }
    Err(DriverError::NotNow(format!("the chains are still too deep after {MOST_ROUNDS} rounds")))
}

/// Closes nodes of files that an earlier shortening left beside the chains, and reads the graph.
async fn tidy(env: &Env<'_>, vm: &Vm) -> Result<(BlockGraph, NodeFiles)> {
    let (graph, files) = look(env, vm).await?;
    let retained: Vec<_> =
        env.siblings.iter().filter(|file| file.retained).filter_map(|file| id_of(env, file)).collect();
    let used = used(&graph);
    let is_left = |node: &&Node| {
        let id = files.of(node).and_then(NodeFile::id);
        !node.auto_named && !used.contains(&node.name.as_str()) && id.is_some_and(|id| retained.contains(&id))
    };
    let mut left: Vec<_> = graph.nodes().filter(is_left).collect();
    // A format before its file, and what is above before what is below.
    left.sort_by_key(|node| (node.file_child.is_none(), Reverse(node.backing_depth)));
    let are_left = !left.is_empty();
    for node in left {
        forget_node(vm, Some(&node.name)).await;
    }
    let (graph, files) = if are_left { look(env, vm).await? } else { (graph, files) };
    take_back_unused(vm.qmp(), &graph).await.map_err(qemu("take back descriptors that no node uses"))?;
    Ok((graph, files))
}

async fn look(env: &Env<'_>, vm: &Vm) -> Result<(BlockGraph, NodeFiles)> {
    let graph = vm.graph().await.map_err(qemu("read the block graph"))?;
    let files = node_files(vm.qmp(), &graph, env.roots, vm.qmp_identity().peer_pid).await;
    Ok((graph, files.map_err(qemu("read the descriptors that QEMU holds"))?))
}

/// Names of the nodes that disks read through.
fn used(graph: &BlockGraph) -> Vec<&str> {
    let chains = graph.disks().iter().filter_map(|disk| disk.root.as_deref()).flat_map(|root| graph.chain(root));
    chains.flat_map(|node| std::iter::once(node.name.as_str()).chain(node.file_child.as_deref())).collect()
}

fn id_of(env: &Env<'_>, file: &Sibling) -> Option<FileId> {
    let (directory, name) = env.roots.directory_of(&file.handle).ok()?;
    directory.id(&name).ok()?
}

/// A disk's chain, and whose each image is.
struct Chain<'a> {
    place: Place<'a>,
    images: Vec<runs::Image>,
    /// The snapshots' files, where they are.
    files: Vec<Option<PathBuf>>,
}

impl<'a> Chain<'a> {
    fn of(env: &Env<'_>, place: Place<'a>) -> Self {
        let siblings: Vec<_> = env.siblings.iter().map(|file| (id_of(env, file), file)).collect();
        let directory = path_of(place.file(0), env.roots).ok().and_then(|path| env.roots.directory_of(&path).ok());
        let id = |at: usize| match &directory {
            Some((directory, _)) => place.id(directory, at),
            None => place.file(at).and_then(NodeFile::id),
        };
        let whose = |at: usize| {
            let id = id(at)?;
            siblings.iter().find(|(sibling, _)| *sibling == Some(id)).map(|(_, file)| *file)
        };
        let image = |at: usize| runs::Image {
            // What can't be told isn't touched.
            needed: id(at).is_none() || whose(at).is_some_and(|file| !file.retained),
            held: may_take(&place, at),
        };
        let images = (0..place.chain.len()).map(image).collect();
        let files = (0..place.chain.len()).map(|at| whose(at).filter(|file| !file.retained)).collect::<Vec<_>>();
        let files = files.into_iter().map(|file| file.map(|file| file.handle.clone())).collect();
        Self { place, images, files }
    }

    /// The lowest run of images that nobody needs, or what is in the way.
    fn next_run(&self) -> std::result::Result<Run, Option<String>> {
        let runs = from_below(&self.images);
        let possible = runs.iter().find(|run| self.images[run.top()].held);
        possible.copied().ok_or_else(|| {
            let into = &self.place.chain[runs.first()?.top()].file;
            Some(format!(
                "nothing can be copied into {into} as QEMU has it open now: it can be once the VM is started anew, or while it \
                 is stopped"
            ))
        })
    }

    /// The snapshots' files, the oldest first.
    fn needed(&self) -> Vec<PathBuf> {
        self.files.iter().rev().flatten().cloned().collect()
    }
}

async fn copy_up(env: &Env<'_>, vm: &Vm, chain: &Chain<'_>, run: Run) -> Result<()> {
    let place = &chain.place;
    if at_rest::restore(vm, place, JOB).await? {
        return Ok(());
    }
    nobody_else_works(vm).await?;
    let path = path_of(place.file(run.top()), env.roots).map_err(DriverError::NotNow)?;
    let (directory, name) = env.roots.directory_of(&path)?;
    let backing = name_of_base(env, place, run, &directory)?;
    room(env, place, run.images(), &directory)?;
    tracing::info!(path = %path.display(), images = run.len(), "a chain that is too deep is shortened");
    let base = Some((run.base(), backing.clone()));
    Upwards { job: JOB, place, into: run.top(), base, directory: &directory }.copy(env, vm).await?;
    directory.sync_file(&name)?;
    if header(&directory, &name)?.backing.as_deref() != Some(backing.as_str()) {
        return Err(DriverError::Job { job: JOB.into(), why: "QEMU ended it without saying why".into() });
    }
    Ok(())
}

/// Jobs of others, and merges of ours that were cut off, go first.
async fn nobody_else_works(vm: &Vm) -> Result<()> {
    let jobs = vm.qmp().query_jobs(QMP_TIMEOUT).await.map_err(qemu("list the block jobs"))?;
    match jobs.first() {
        None => Ok(()),
        Some(job) => Err(DriverError::NotNow(format!("job {} goes first", job.id))),
    }
}

/// What the layer's header is to call the image below the run.
fn name_of_base(env: &Env<'_>, place: &Place<'_>, run: Run, directory: &ImageDirectory) -> Result<String> {
    if let Ok(name) = name_of(directory, place.id(directory, run.base())) {
        return Ok(name);
    }
    let lowest = path_of(place.file(run.base() - 1), env.roots).map_err(DriverError::NotNow)?;
    let (beside, name) = env.roots.directory_of(&lowest)?;
    let named = header(&beside, &name)?.backing.filter(|name| Path::new(name).is_absolute());
    named
        .ok_or_else(|| DriverError::NotNow(format!("{} names the image below it by a relative path", lowest.display())))
}
