//! Everything at once, for a test to take apart: control plane, CRDs, a namespace, the programs and one guest.

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use kube::Api;
use serde::de::DeserializeOwned;
use tempfile::TempDir;

use crate::guest::DISK_NAMES;
use crate::{
    Agent, ControlPlane, Controllers, Disk, Filesystem, Format, Guest, GuestConfig, HostFilesystem, Load, LoopMount,
    Programs, Site, Style, Trouble, await_condition, run,
};

/// Size of a place's own file system; sparse. A btrfs wants much room beyond what is in it.
const PLACE_MIB: u64 = 4096;

/// A disk to make for the guest.
#[derive(Clone, Copy, Debug)]
pub struct DiskSpec {
    /// Image format.
    pub format: Format,
    /// What is on it.
    pub filesystem: Filesystem,
    /// Size.
    pub mib: u64,
}

/// What a disk's image lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The temporary directory: a file system whose files share no data, as far as the tests need to know.
    Plain,
    /// An XFS of the world's own, whose files can share data.
    Xfs,
    /// A btrfs of the world's own; the VM's directory is a subvolume.
    Btrfs,
}

/// A world: change what a test is about, keep the rest.
#[derive(Clone, Debug)]
pub struct WorldConfig {
    /// Whether Kubernetes' own controllers run.
    pub controllers: Controllers,
    /// Namespace of the guest, made for it.
    pub namespace: String,
    /// Name of the guest.
    pub vm: String,
    /// The guest's disks.
    pub disks: Vec<DiskSpec>,
    /// Random data that each ext4 of them has from the start, in MiB.
    pub ballast: u64,
    /// What their images lie on, in the same order; those beyond its end lie on [`Place::Plain`].
    pub places: Vec<Place>,
    /// What the guest does.
    pub load: Load,
    /// Whether the guest runs an agent.
    pub agent: Agent,
    /// What goes wrong in the guest.
    pub trouble: Trouble,
    /// How its disks stand on its command line.
    pub style: Style,
}

impl Default for WorldConfig {
    fn default() -> Self {
        let disk = |filesystem| DiskSpec { format: Format::Qcow2, filesystem, mib: 512 };
        Self {
            controllers: Controllers::None,
            namespace: "shop".into(),
            vm: "db-1".into(),
            disks: vec![disk(Filesystem::Ext4), disk(Filesystem::Xfs)],
            ballast: 0,
            places: vec![],
            load: Load::Light,
            agent: Agent::On,
            trouble: Trouble::None,
            style: Style::Blockdev,
        }
    }
}

/// A running world; it ends on drop, and leaves nothing.
pub struct World {
    // In the order in which they must end.
    /// Operator, agent and guard.
    pub programs: Programs,
    /// The guest; `None` while a test has taken it to stop or kill it.
    pub guest: Option<Guest>,
    /// An administrator's client.
    pub client: kube::Client,
    /// The API.
    pub control_plane: ControlPlane,
    /// Where the programs work.
    pub site: Site,
    /// The guest's namespace.
    pub namespace: String,
    _mounts: Vec<LoopMount>,
    directory: TempDir,
}

impl World {
    /// Starts it all; the programs last, when the API knows their kinds and the guest is up.
    pub async fn start(config: WorldConfig) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("ff").tempdir()?;
        let root = directory.path();
        let vm_root = root.join("vms");
        let mounts = mount(&config.places, root)?;
        let guest = guest_config(&config, root, &vm_root)?;
        let plane = root.join("control-plane");
        let (guest, control_plane) =
            tokio::try_join!(Guest::boot(guest), ControlPlane::start(&plane, config.controllers))?;
        control_plane.install_crds()?;
        control_plane.apply_example("rbac-operator.yaml")?;
        control_plane.apply_example("vmsnapshotclass.yaml")?;
        control_plane.kubectl(&["create", "namespace", &config.namespace])?;
        let site = Site {
            node_name: "node-1".into(),
            vm_root,
            image_roots: vec![root.join("images")],
            directory: root.join("node"),
            kubeconfig: control_plane.kubeconfig().to_owned(),
        };
        std::fs::create_dir_all(&site.directory)?;
        Ok(Self {
            programs: Programs::start(&site).await?,
            guest: Some(guest),
            client: control_plane.client().await?,
            control_plane,
            site,
            namespace: config.namespace,
            _mounts: mounts,
            directory,
        })
    }

    /// The directory that all of it is in.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Boots one guest more, with disks of its own, in a namespace that must be there.
    pub async fn boot(&self, config: &WorldConfig) -> Result<Guest> {
        Guest::boot(guest_config(config, self.directory(), &self.site.vm_root)?).await
    }

    /// The guest, which a test has not taken.
    pub fn guest(&self) -> Result<&Guest> {
        self.guest.as_ref().ok_or_else(|| anyhow::anyhow!("the test has taken the guest"))
    }
}

impl ControlPlane {
    /// Applies one of the manifests that users are shown.
    pub fn apply_example(&self, name: &str) -> Result<()> {
        let path = format!(concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/{}"), name);
        self.kubectl(&["apply", "--server-side", "-f", &path]).map(drop)
    }

    /// Applies the generated CRDs and waits until the API serves them.
    pub fn install_crds(&self) -> Result<()> {
        let crds = concat!(env!("CARGO_MANIFEST_DIR"), "/../crds");
        self.kubectl(&["apply", "--server-side", "-f", crds])?;
        self.kubectl(&["wait", "--for=condition=Established", "--timeout=30s", "-f", crds]).map(drop)
    }
}

/// Waits until an object is there and as it should be; the last one seen is in the error when it never is.
pub async fn await_object<K>(
    api: &Api<K>,
    name: &str,
    what: &str,
    bound: Duration,
    as_it_should_be: impl Fn(&K) -> bool,
) -> Result<K>
where
    K: Clone + Debug + DeserializeOwned,
{
    let mut last = None;
    let found = await_condition(what, bound, async || {
        last = api.get_opt(name).await?;
        Ok(last.clone().filter(&as_it_should_be))
    })
    .await;
    found.map_err(|error| error.context(format!("{name} is {last:#?}")))
}

fn guest_config(config: &WorldConfig, root: &Path, vm_root: &Path) -> Result<GuestConfig> {
    let private = root.join("guests").join(&config.namespace).join(&config.vm);
    let mut guest = GuestConfig::new(&config.namespace, &config.vm, vm_root, &private);
    for (index, (name, spec)) in DISK_NAMES.into_iter().zip(&config.disks).enumerate() {
        let place = config.places.get(index).copied().unwrap_or(Place::Plain);
        guest.disks.push(make_disk(&image_directory(config, root, place)?, name, *spec, config.ballast)?);
    }
    (guest.load, guest.agent, guest.style) = (config.load, config.agent, config.style);
    guest.trouble = config.trouble;
    Ok(guest)
}

/// Mounts what the places need beneath the image root.
fn mount(places: &[Place], root: &Path) -> Result<Vec<LoopMount>> {
    let mounted = [(Place::Xfs, HostFilesystem::Xfs), (Place::Btrfs, HostFilesystem::Btrfs)].into_iter();
    let needed = mounted.filter(|(place, _)| places.contains(place));
    needed
        .map(|(place, filesystem)| {
            let image = root.join(place.directory()).with_extension("img");
            LoopMount::new(filesystem, &image, PLACE_MIB, &root.join("images").join(place.directory()))
        })
        .collect()
}

/// Where a VM's images of one place are, made if need be.
fn image_directory(config: &WorldConfig, root: &Path, place: Place) -> Result<PathBuf> {
    let directory = place.image_directory(&root.join("images"), &config.namespace, &config.vm);
    match directory.parent() {
        Some(parent) if place == Place::Btrfs && !directory.exists() => {
            std::fs::create_dir_all(parent)?;
            run("btrfs", ["subvolume".as_ref(), "create".as_ref(), directory.as_os_str()])?;
        }
        _ => std::fs::create_dir_all(&directory)?,
    }
    Ok(directory)
}

impl Place {
    /// Beneath the image root; the temporary directory itself needs none.
    fn directory(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }

    pub(crate) fn image_directory(self, image_root: &Path, namespace: &str, vm: &str) -> PathBuf {
        image_root.join(self.directory()).join(namespace).join(vm)
    }
}

fn make_disk(images: &Path, name: &str, spec: DiskSpec, ballast: u64) -> Result<Disk> {
    let path: PathBuf = images.join(format!("{name}.{}", spec.format.name()));
    if spec.filesystem == Filesystem::Ext4 && ballast > 0 {
        return Disk::create_filled(path, spec.format, spec.mib, ballast);
    }
    Disk::create(path, spec.format, spec.filesystem, spec.mib)
}
