//! Where `cargo xtask setup` puts what the tests need, and where the tests find it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// The directory of built things that outlives a checkout: control-plane binaries and the guest.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// `$FREEZEFRAME_CACHE`, else `$HOME/.cache/freezeframe`. Nothing is created.
    pub fn locate() -> Result<Self> {
        if let Some(root) = std::env::var_os("FREEZEFRAME_CACHE") {
            return Ok(Self { root: root.into() });
        }
        let home = std::env::var_os("HOME").context("neither FREEZEFRAME_CACHE nor HOME is set")?;
        Ok(Self { root: Path::new(&home).join(".cache/freezeframe") })
    }

    /// The cache's own directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// etcd, kube-apiserver, kube-controller-manager and kubectl.
    #[must_use]
    pub fn control_plane(&self) -> PathBuf {
        self.root.join("control-plane")
    }

    /// `vmlinuz` and `initrd` of the guest.
    #[must_use]
    pub fn guest(&self) -> PathBuf {
        self.root.join("guest")
    }

    /// `vmlinuz`, `initrd` and `root.raw` of the node VM.
    #[must_use]
    pub fn node_vm(&self) -> PathBuf {
        self.root.join("node-vm")
    }

    /// A control-plane binary that must be there.
    pub fn binary(&self, name: &str) -> Result<PathBuf> {
        present(self.control_plane().join(name))
    }

    /// A file of the guest that must be there.
    pub fn guest_file(&self, name: &str) -> Result<PathBuf> {
        present(self.guest().join(name))
    }

    /// A file of the node VM that must be there.
    pub fn node_vm_file(&self, name: &str) -> Result<PathBuf> {
        present(self.node_vm().join(name))
    }
}

fn present(path: PathBuf) -> Result<PathBuf> {
    ensure!(path.exists(), "{} is missing: run `cargo xtask setup` first", path.display());
    Ok(path)
}
