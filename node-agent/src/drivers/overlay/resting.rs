//! The chain of a disk whose VM is stopped, read from the images' headers: whether it is worth opening.

use std::path::{Path, PathBuf};

use super::prepare::header;
use super::runs::{Image, from_below};
use super::shorten::TooDeep;
use crate::drivers::{Env, Sibling};
use crate::hypervisor::image::FileId;
use crate::hypervisor::target_file::KnownDisk;

/// The chain is never deeper than this; a longer one is a loop.
const DEEPEST: usize = 1024;

/// What can be done about a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resting {
    /// It is no deeper than it may be.
    ShortEnough,
    /// There are images in it that can be left out.
    CanBeShortened,
    /// It is deeper, and all of it is needed.
    Needed(TooDeep),
}

/// Looks at a disk's chain, of which nothing is opened but to read the headers.
pub fn look(env: &Env<'_>, disk: &KnownDisk, deepest: usize) -> Resting {
    let chain = chain(env, &disk.path);
    let depth = chain.len().saturating_sub(1);
    if depth <= deepest || disk.read_only || disk.format != "qcow2" {
        return Resting::ShortEnough;
    }
    let whose: Vec<_> = chain.iter().map(|id| id.and_then(|id| owner(env, id))).collect();
    let needed = |id: Option<FileId>, file: Option<&Sibling>| id.is_none() || file.is_some_and(|file| !file.retained);
    let images: Vec<_> =
        chain.iter().zip(&whose).map(|(id, file)| Image { needed: needed(*id, *file), held: true }).collect();
    if !from_below(&images).is_empty() {
        return Resting::CanBeShortened;
    }
    let files = whose.iter().rev().flatten().filter(|file| !file.retained).map(|file| file.handle.clone());
    Resting::Needed(TooDeep { disk: disk.name.clone(), depth, needed: files.collect(), hindrance: None })
}

/// The images, top first; none for the last one, where it isn't a file beneath an image root.
fn chain(env: &Env<'_>, top: &Path) -> Vec<Option<FileId>> {
    let (mut images, mut next) = (vec![], Some(top.to_owned()));
    while let Some(path) = next.take().filter(|_| images.len() <= DEEPEST) {
        let found = image(env, &path);
        images.push(found.as_ref().map(|(id, _)| *id));
        next = found.and_then(|(_, backing)| backing);
    }
    images
}

fn image(env: &Env<'_>, path: &Path) -> Option<(FileId, Option<PathBuf>)> {
    let (directory, name) = env.roots.directory_of(path).ok()?;
    let id = directory.id(&name).ok()??;
    // What isn't a qcow2 image is the end of a chain.
    let backing = header(&directory, &name).ok().and_then(|header| header.backing);
    Some((id, backing.map(|backing| directory.path().join(backing))))
}

fn owner<'a>(env: &'a Env<'_>, id: FileId) -> Option<&'a Sibling> {
    env.siblings.iter().find(|file| {
        let found = env.roots.directory_of(&file.handle).and_then(|(directory, name)| directory.id(&name));
        matches!(found, Ok(Some(found)) if found == id)
    })
}
