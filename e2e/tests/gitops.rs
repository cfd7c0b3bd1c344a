//! What Argo CD and Flux do with `examples/gitops/`: apply it again and again, look for differences, and wait. Needs
//! `cargo xtask setup`.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use freezeframe_api::v1alpha1::{VMSnapshot, VMSnapshotSchedule};
use freezeframe_e2e::{ControlPlane, Controllers, Program, Site, await_object};
use kube::Api;

const SOON: Duration = Duration::from_secs(60);
const KUSTOMIZATION: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/gitops");

/// A control plane with the CRDs and a namespace, and the operator at work.
async fn plane(directory: &Path) -> Result<(ControlPlane, Program)> {
    let plane = ControlPlane::start(&directory.join("plane"), Controllers::None).await?;
    plane.install_crds()?;
    plane.apply_example("rbac-operator.yaml")?;
    plane.apply_example("namespace.yaml")?;
    let site = Site {
        node_name: "node-1".into(),
        vm_root: directory.join("vms"),
        image_roots: vec![],
        directory: directory.join("operator"),
        kubeconfig: plane.kubeconfig().to_owned(),
    };
    std::fs::create_dir_all(&site.directory)?;
    let mut operator = Program::operator(&site)?;
    operator.await_ready().await?;
    Ok((plane, operator))
}

/// Resource version and generation of each object that is in Git.
fn versions(plane: &ControlPlane) -> Result<String> {
    let columns = "jsonpath={range .items[*]}{.kind} {.metadata.resourceVersion} {.metadata.generation}{\"\\n\"}{end}";
    plane.kubectl(&["get", "-k", KUSTOMIZATION, "--output", columns])
}

/// Waits until the operator has said all that it has to say of what is in Git.
async fn await_rest(plane: &ControlPlane) -> Result<()> {
    let arguments = ["wait", "--for=condition=Ready", "--timeout=60s", "--namespace=shop", "vmss/nightly"];
    plane.kubectl(&arguments)?;
    let client = plane.client().await?;
    let schedules = Api::<VMSnapshotSchedule>::namespaced(client.clone(), "shop");
    await_object(&schedules, "nightly", "to be seen", SOON, |schedule| {
        let seen = schedule.status.as_ref().and_then(|status| status.observed_generation);
        seen.is_some() && seen == schedule.metadata.generation
    })
    .await?;
    let snapshots = Api::<VMSnapshot>::namespaced(client, "shop");
    await_object(&snapshots, "before-release-42", "to be seen", SOON, |snapshot| snapshot.status.is_some()).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_git_can_be_applied_again_and_again_without_a_difference() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (plane, _operator) = plane(directory.path()).await?;
    // As Flux applies, as Argo CD does with ServerSideApply=true, and as it does without.
    let ways: [&[&str]; 3] = [
        &["--server-side", "--field-manager=kustomize-controller", "--force-conflicts"],
        &["--server-side", "--field-manager=argocd-controller"],
        &[],
    ];
    for way in ways {
        let apply: Vec<&str> = ["apply", "-k", KUSTOMIZATION].into_iter().chain(way.iter().copied()).collect();
        // The last way has no use for force, and kubectl's diff no client-side one for a manager.
        let diff: Vec<&str> = ["diff", "-k", KUSTOMIZATION].into_iter().chain(way.iter().copied()).collect();
        plane.kubectl(&apply)?;
        await_rest(&plane).await?;
        let before = versions(&plane)?;
        // kubectl ends with an error if there is a difference, and prints it.
        assert_eq!(plane.kubectl(&diff)?, "", "{way:?}");
        plane.kubectl(&apply)?;
        plane.kubectl(&apply)?;
        assert_eq!(versions(&plane)?, before, "{way:?}");
        // What somebody changes by hand is one, until it is applied again.
        let by_hand = r#"{"spec":{"keep":{"daily":1}}}"#;
        plane.kubectl(&["patch", "vmss/nightly", "-n=shop", "--type=merge", "-p", by_hand])?;
        assert!(plane.kubectl(&diff).is_err(), "{way:?}");
        let forced = if way.contains(&"--server-side") { &["--force-conflicts"][..] } else { &[] };
        plane.kubectl(&[apply.as_slice(), forced].concat())?;
        assert_eq!(plane.kubectl(&diff)?, "", "{way:?}");
        // An emergency is no difference either: nobody reverts it.
        plane.kubectl(&["annotate", "vmsc", "--all", "freezeframe.dev/paused=true"])?;
        assert_eq!(plane.kubectl(&diff)?, "", "{way:?}");
        plane.kubectl(&apply)?;
        let paused = plane.kubectl(&["get", "vmsc", "databases", "--output=jsonpath={.metadata.annotations}"])?;
        assert!(paused.contains("freezeframe.dev/paused"), "{way:?}: {paused}");
        plane.kubectl(&[
            "patch",
            "vmsnap/before-release-42",
            "-n=shop",
            "--type=merge",
            "-p",
            r#"{"spec":{"hold":false}}"#,
        ])?;
        plane.kubectl(&["delete", "-k", KUSTOMIZATION, "--timeout=60s"])?;
    }
    Ok(())
}
