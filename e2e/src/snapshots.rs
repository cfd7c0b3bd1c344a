//! Snapshots as a user takes and deletes them, and their images as anybody can look at them.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use freezeframe_api::v1alpha1::{Phase, VMSnapshot, VMSnapshotContent};
use kube::api::{DeleteParams, PostParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

use crate::disk::convert;
use crate::{Disk, Format, Place, World, await_condition, await_object};

/// A snapshot of two small disks takes a second; a busy machine takes longer.
const ENDED: Duration = Duration::from_secs(60);
/// Merging copies data, and what can't be merged at once is tried again after some seconds.
const GONE: Duration = Duration::from_secs(90);

/// A `VMSnapshot` as a user writes it; fails the test if `spec` is none.
pub fn snapshot(name: &str, spec: &Value) -> Result<VMSnapshot> {
    let object = json!({
        "apiVersion": "freezeframe.dev/v1alpha1", "kind": "VMSnapshot",
        "metadata": {"name": name}, "spec": spec,
    });
    serde_json::from_value(object).context("a VMSnapshot's spec")
}

/// Whether nothing more will come of a snapshot.
#[must_use]
pub fn has_ended(snapshot: &VMSnapshot) -> bool {
    phase(snapshot).is_some_and(|phase| matches!(phase, Phase::Ready | Phase::Failed))
}

/// Its phase, once it has one.
#[must_use]
pub fn phase(snapshot: &VMSnapshot) -> Option<Phase> {
    snapshot.status.as_ref().map(|status| status.phase)
}

/// The images of a snapshot, in the order of its disks.
pub fn images(snapshot: &VMSnapshot) -> Result<Vec<Disk>> {
    let disks = snapshot.status.iter().flat_map(|status| &status.disks);
    let image = |disk: &freezeframe_api::v1alpha1::DiskSnapshot| {
        let handle = disk.handle.as_ref().with_context(|| format!("disk {} has no handle", disk.name.0))?;
        Disk::detect(Path::new(&handle.0))
    };
    disks.map(image).collect()
}

impl World {
    /// The snapshots of the guest's namespace.
    #[must_use]
    pub fn snapshots(&self) -> Api<VMSnapshot> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// All contents.
    #[must_use]
    pub fn contents(&self) -> Api<VMSnapshotContent> {
        Api::all(self.client.clone())
    }

    /// Applies a class with these drivers.
    pub fn apply_class(&self, name: &str, drivers: &Value) -> Result<()> {
        self.apply_class_spec(name, &json!({"drivers": drivers}))
    }

    /// Applies a class that takes overlays, with these limits.
    pub fn apply_limited_class(&self, name: &str, limits: &Value) -> Result<()> {
        self.apply_class_spec(name, &json!({"drivers": [{"name": "overlay"}], "limits": limits}))
    }

    fn apply_class_spec(&self, name: &str, spec: &Value) -> Result<()> {
        let class = json!({
            "apiVersion": "freezeframe.dev/v1alpha1", "kind": "VMSnapshotClass", "metadata": {"name": name},
            "spec": spec,
        });
        let manifest = self.directory().join(format!("class-{name}.json"));
        std::fs::write(&manifest, class.to_string())?;
        self.control_plane.kubectl(&["apply", "-f", &manifest.display().to_string()]).map(drop)
    }

    /// A directory for the driver `copy`, made.
    pub fn copies(&self) -> Result<PathBuf> {
        let copies = self.directory().join("copies");
        std::fs::create_dir_all(&copies)?;
        Ok(copies)
    }

    /// Applies a snapshot and doesn't wait.
    pub async fn apply_snapshot(&self, name: &str, spec: Value) -> Result<VMSnapshot> {
        let created = self.snapshots().create(&PostParams::default(), &snapshot(name, &spec)?).await;
        created.with_context(|| format!("creating {name}"))
    }

    /// Waits until a snapshot is Ready or Failed.
    pub async fn await_end(&self, name: &str) -> Result<VMSnapshot> {
        let ended = await_object(&self.snapshots(), name, "the snapshot to end", ENDED, has_ended).await;
        ended.map_err(|error| self.with_logs(error))
    }

    /// Takes a snapshot and waits until it is Ready or Failed.
    pub async fn take(&self, name: &str, spec: Value) -> Result<VMSnapshot> {
        self.apply_snapshot(name, spec).await?;
        self.await_end(name).await
    }

    /// Takes a snapshot of a VM, which must become Ready.
    pub async fn take_ready(&self, name: &str, vm: &str) -> Result<VMSnapshot> {
        let taken = self.take(name, json!({"vmName": vm})).await?;
        let ready = phase(&taken) == Some(Phase::Ready);
        ensure!(ready, "{}", self.with_logs(anyhow::anyhow!("{name} is not Ready: {:#?}", taken.status)));
        Ok(taken)
    }

    /// The snapshot as it is now.
    pub async fn read_snapshot(&self, name: &str) -> Result<VMSnapshot> {
        self.snapshots().get(name).await.with_context(|| format!("reading {name}"))
    }

    /// Deletes a snapshot and doesn't wait.
    pub async fn start_deleting(&self, name: &str) -> Result<()> {
        let deleted = self.snapshots().delete(name, &DeleteParams::default()).await;
        deleted.map(drop).with_context(|| format!("deleting {name}"))
    }

    /// Waits until a snapshot and its content are gone.
    pub async fn await_gone(&self, name: &str) -> Result<()> {
        let snapshots = self.snapshots();
        let (mut last, mut content) = (None, None);
        let gone = await_condition(&format!("{name} to be gone"), GONE, async || {
            last = snapshots.get_opt(name).await?;
            let named = last.iter().find_map(|left| left.status.as_ref()?.content_name.clone());
            content = named.or(content.take());
            Ok(last.is_none().then_some(()))
        })
        .await;
        gone.map_err(|error| self.with_logs(error.context(format!("left is {last:#?}"))))?;
        let Some(content) = content else { return Ok(()) };
        let left = self.contents().get_opt(&content).await?;
        ensure!(left.is_none(), "{name} is gone but its content is left: {:?}", left.map(|left| left.name_any()));
        Ok(())
    }

    /// Deletes a snapshot and waits until nothing is left of it in the API.
    pub async fn delete(&self, name: &str) -> Result<()> {
        self.start_deleting(name).await?;
        self.await_gone(name).await
    }

    /// Where the images of a guest of this world's namespace are, those on the temporary directory's file system.
    #[must_use]
    pub fn image_directory(&self, vm: &str) -> PathBuf {
        self.image_directory_on(Place::Plain, vm)
    }

    /// Where the images of a guest of this world's namespace are that lie on `place`.
    #[must_use]
    pub fn image_directory_on(&self, place: Place, vm: &str) -> PathBuf {
        place.image_directory(&self.site.image_roots[0], &self.namespace, vm)
    }

    /// An error with what the programs said.
    #[must_use]
    pub fn with_logs(&self, error: anyhow::Error) -> anyhow::Error {
        let log = |program: &crate::Program| program.log().unwrap_or_else(|error| error.to_string());
        let (agent, guard) = (log(&self.programs.agent), log(&self.programs.guard));
        let operator = log(&self.programs.operator);
        error.context(format!("agent:\n{agent}\nguard:\n{guard}\noperator:\n{operator}\n"))
    }
}

/// Names of the files in a directory, sorted.
pub fn files(directory: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(directory).with_context(|| format!("listing {}", directory.display()))?;
    let mut names = entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<std::io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

/// A number that stands for everything a guest would read from an image, backing files included.
///
/// However the data is spread over the files, the number is the same. Only for images that nobody writes just now.
pub fn checksum(image: &Disk) -> Result<u64> {
    const BLOCK: usize = 1 << 16;
    let scratch = tempfile::Builder::new().prefix("checksum").tempdir()?;
    let raw = scratch.path().join("image.raw");
    convert(&image.path, image.format, &raw, Format::Raw)?;
    let (zeros, mut block) = (vec![0; BLOCK], vec![0; BLOCK]);
    let (mut file, mut hasher) = (std::fs::File::open(&raw)?, DefaultHasher::new());
    file.metadata()?.len().hash(&mut hasher);
    for at in 0_u64.. {
        block.resize(BLOCK, 0);
        let mut filled = 0;
        while filled < BLOCK {
            match file.read(&mut block[filled..])? {
                0 => break,
                more => filled += more,
            }
        }
        if filled == 0 {
            break;
        }
        if block[..filled] != zeros[..filled] {
            at.hash(&mut hasher);
            hasher.write(&block[..filled]);
        }
    }
    Ok(hasher.finish())
}

/// The checksum of each image.
pub fn checksums(images: &[Disk]) -> Result<Vec<u64>> {
    images.iter().map(checksum).collect()
}
