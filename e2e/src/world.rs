//! Everything at once, for a test to take apart: control plane, CRDs, a namespace, the programs and one guest.

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use kube::Api;
use serde::de::DeserializeOwned;
use tempfile::TempDir;

use crate::{
    Agent, ControlPlane, Controllers, Disk, Filesystem, Format, Guest, GuestConfig, Load, Programs, Site, Style,
    Trouble, await_condition,
};

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
    directory: TempDir,
}

impl World {
    /// Starts it all; the programs last, when the API knows their kinds and the guest is up.
    pub async fn start(config: WorldConfig) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("ff").tempdir()?;
        let root = directory.path();
        let vm_root = root.join("vms");
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
    let images = root.join("images").join(&config.namespace).join(&config.vm);
    std::fs::create_dir_all(&images)?;
    let private = root.join("guests").join(&config.namespace).join(&config.vm);
    let mut guest = GuestConfig::new(&config.namespace, &config.vm, vm_root, &private);
    for (name, spec) in ["vda", "vdb", "vdc", "vdd"].into_iter().zip(&config.disks) {
        guest.disks.push(make_disk(&images, name, *spec)?);
    }
    (guest.load, guest.agent, guest.style) = (config.load, config.agent, config.style);
    guest.trouble = config.trouble;
    Ok(guest)
}

fn make_disk(images: &Path, name: &str, spec: DiskSpec) -> Result<Disk> {
    let path: PathBuf = images.join(format!("{name}.{}", spec.format.name()));
    Disk::create(path, spec.format, spec.filesystem, spec.mib)
}
