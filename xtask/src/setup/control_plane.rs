//! etcd and Kubernetes, built as ordinary Go modules.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use freezeframe_e2e::Cache;

use super::stamp::Stamp;
use crate::progress::{capture, root, run, say};

const KUBERNETES: &str = "k8s.io/kubernetes";

/// A binary: its module's directory here, its Go package.
const BINARIES: &[(&str, &str, &str)] = &[
    ("etcd", "etcd", "go.etcd.io/etcd/server/v3"),
    ("kube-apiserver", "k8s", "k8s.io/kubernetes/cmd/kube-apiserver"),
    ("kube-controller-manager", "k8s", "k8s.io/kubernetes/cmd/kube-controller-manager"),
    ("kubectl", "k8s", "k8s.io/kubernetes/cmd/kubectl"),
];

/// Builds what is not there yet from these very versions.
pub fn build(cache: &Cache) -> Result<()> {
    let directory = cache.control_plane();
    std::fs::create_dir_all(&directory)?;
    let stamp = Stamp::new(&directory, &inputs()?);
    if stamp.is_current() {
        say("control plane: up to date");
        return Ok(());
    }
    say("control plane: building (six minutes on two cores when Go has nothing cached)");
    let kubernetes_flags = version_flags(&std::fs::read_to_string(module("k8s").join("go.mod"))?)?;
    for (binary, module_name, package) in BINARIES {
        say(format_args!("control plane: go build {binary}"));
        let flags = if *module_name == "k8s" { &kubernetes_flags } else { "-s -w" };
        let output = directory.join(binary);
        let mut command = go(&module(module_name));
        command.args(["build", "-trimpath", "-ldflags", flags, "-o"]).arg(output).arg(package);
        run(&mut command)?;
    }
    stamp.write()
}

fn module(name: &str) -> PathBuf {
    root().join("e2e/control-plane").join(name)
}

fn go(module: &Path) -> Command {
    let mut command = Command::new("go");
    command.current_dir(module);
    command.envs([("GOTOOLCHAIN", "local"), ("CGO_ENABLED", "0"), ("GOFLAGS", "-mod=readonly")]);
    command
}

fn inputs() -> Result<Vec<String>> {
    let mut inputs = vec![capture(go(root()).arg("version")).context("setup needs Go 1.26 or later")?];
    for module_name in ["etcd", "k8s"] {
        for file in ["go.mod", "go.sum"] {
            inputs.push(std::fs::read_to_string(module(module_name).join(file))?);
        }
    }
    inputs.push(format!("{BINARIES:?}"));
    Ok(inputs)
}

/// Without a stamp binaries call themselves v0.0.0-master, and checks of version skew go wrong.
fn version_flags(go_mod: &str) -> Result<String> {
    let mut words = go_mod.split_whitespace().skip_while(|word| *word != KUBERNETES);
    let version = words.nth(1).with_context(|| format!("go.mod does not require {KUBERNETES}"))?;
    let mut numbers = version.trim_start_matches('v').split('.');
    let (major, minor) = numbers.next().zip(numbers.next()).with_context(|| format!("version {version}"))?;
    let stamps = ["k8s.io/component-base/version", "k8s.io/client-go/pkg/version"].map(|package| {
        format!(
            " -X {package}.gitVersion={version} -X {package}.gitMajor={major} -X {package}.gitMinor={minor} \
             -X {package}.gitTreeState=clean"
        )
    });
    Ok(format!("-s -w{}", stamps.concat()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_comes_from_go_mod() {
        let flags = version_flags("module x\n\nrequire k8s.io/kubernetes v1.36.4\n").unwrap();
        assert!(flags.contains("-X k8s.io/component-base/version.gitVersion=v1.36.4 "));
        assert!(flags.contains("-X k8s.io/client-go/pkg/version.gitMinor=36 "));
        assert!(version_flags("module x\n").is_err());
    }
}
