//! The API on a real server: what it refuses and stores, what kubectl makes of it, and who may write what. Needs
//! `cargo xtask setup`.
#![allow(clippy::unwrap_used, reason = "a test's helpers may stop it")]

#[path = "../../api/tests/validation/corpus.rs"]
mod corpus;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use corpus::{Case, cases};
use freezeframe_api::crds;
use freezeframe_e2e::{ControlPlane, Controllers, await_condition};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use k8s_openapi::api::core::v1::{Node, ServiceAccount};
use kube::api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(30);

const AGENT: &str = "system:serviceaccount:freezeframe-node:freezeframe-agent";
const OPERATOR: &str = "system:serviceaccount:freezeframe-system:freezeframe-operator";

/// A control plane that knows our kinds and has the namespace `shop`.
async fn plane(directory: &Path) -> Result<ControlPlane> {
    let plane = ControlPlane::start(directory, Controllers::None).await?;
    apply(&plane, "crds")?;
    plane.kubectl(&["wait", "--for=condition=Established", "--all", "customresourcedefinitions"])?;
    apply(&plane, "examples/namespace.yaml")?;
    Ok(plane)
}

fn apply(plane: &ControlPlane, path: &str) -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    plane.kubectl(&["apply", "--server-side", "-f", &path.display().to_string()]).map(drop)
}

fn api(client: &Client, kind: &str) -> Api<DynamicObject> {
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("freezeframe.dev", "v1alpha1", kind));
    let crd = crds::all().into_iter().find(|crd| crd.spec.names.kind == kind).unwrap();
    match crd.spec.scope.as_str() {
        "Namespaced" => Api::namespaced_with(client.clone(), "shop", &resource),
        _ => Api::all_with(client.clone(), &resource),
    }
}

/// Sends `object` as kubectl does, with unknown fields refused.
async fn send(client: &Client, method: &str, path: &str, object: &Value) -> Result<Value, kube::Error> {
    let uri = format!("{path}?fieldValidation=Strict");
    let request = http::Request::builder().method(method).uri(uri).header("content-type", "application/json");
    client.request(request.body(serde_json::to_vec(object).unwrap()).unwrap()).await
}

/// What the server stores of the case in the end.
async fn play(client: &Client, case: &Case) -> Result<Value, kube::Error> {
    let collection = api(client, case.object["kind"].as_str().unwrap()).resource_url().to_owned();
    let name = case.name.replace('/', "-").to_lowercase();
    let path = format!("{collection}/{name}");
    let named = |object: &Value| {
        let mut object = object.clone();
        object["metadata"]["name"] = json!(name);
        object
    };
    let object = named(&case.object);
    let mut stored = match &case.before {
        None => send(client, "POST", &collection, &object).await?,
        Some(before) => {
            let mut update = object.clone();
            let created = send(client, "POST", &collection, &named(before)).await;
            update["metadata"]["resourceVersion"] = created.unwrap()["metadata"]["resourceVersion"].clone();
            send(client, "PUT", &path, &update).await?
        }
    };
    if let Some(status) = object.get("status") {
        stored["status"] = status.clone();
        stored = send(client, "PUT", &format!("{path}/status"), &stored).await?;
    }
    Ok(stored)
}

/// What is wrong with the server's verdict.
async fn complaint(client: &Client, case: &Case) -> Option<String> {
    match (play(client, case).await, &case.refusal) {
        (Err(kube::Error::Api(status)), Some(refusal)) if status.message.contains(refusal) => None,
        (Err(error), _) => Some(format!("{}: {error}", case.name)),
        (Ok(_), Some(refusal)) => Some(format!("{}: accepted, not refused with {refusal:?}", case.name)),
        (Ok(object), None) => match &case.stored {
            Some(stored) if object["spec"] != *stored => Some(format!("{}: stored {}", case.name, object["spec"])),
            _ => None,
        },
    }
}

#[tokio::test]
async fn every_case_of_the_corpus_gets_its_verdict() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let plane = plane(directory.path()).await?;
    let client = plane.client().await?;
    let mut complaints = vec![];
    for case in cases() {
        complaints.extend(complaint(&client, &case).await);
    }
    ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
    Ok(())
}

fn snapshot(name: &str) -> Value {
    let metadata = json!({"name": name, "namespace": "shop"});
    json!({"apiVersion": "freezeframe.dev/v1alpha1", "kind": "VMSnapshot", "metadata": metadata, "spec": {"vmName": "db-1"}})
}

fn content(name: &str, node: &str) -> Value {
    json!({
        "apiVersion": "freezeframe.dev/v1alpha1", "kind": "VMSnapshotContent", "metadata": {"name": name},
        "spec": {
            "nodeName": node, "vmName": "db-1", "consistency": {}, "quiesce": {}, "deadline": "2026-01-01T00:05:00Z",
            "vmSnapshotRef": {"namespace": "shop", "name": "nightly", "uid": "5f0c1e5e-0b5c-4b6e-9d2e-0d5f2b1c7a11"},
        },
    })
}

fn schedule(name: &str) -> Value {
    let metadata = json!({"name": name, "namespace": "shop"});
    json!({"apiVersion": "freezeframe.dev/v1alpha1", "kind": "VMSnapshotSchedule", "metadata": metadata,
        "spec": {"schedule": "@daily"}})
}

fn target(name: &str) -> Value {
    let metadata = json!({"name": name, "namespace": "shop"});
    json!({"apiVersion": "freezeframe.dev/v1alpha1", "kind": "VMTarget", "metadata": metadata, "spec": {}})
}

async fn put(client: &Client, object: &Value) -> Result<DynamicObject, kube::Error> {
    let (kind, name) = (object["kind"].as_str().unwrap(), object["metadata"]["name"].as_str().unwrap());
    api(client, kind).patch(name, &PatchParams::apply("test"), &Patch::Apply(object)).await
}

async fn put_status(client: &Client, object: &Value, status: Value) -> Result<DynamicObject, kube::Error> {
    let (kind, name) = (object["kind"].as_str().unwrap(), object["metadata"]["name"].as_str().unwrap());
    let patch = json!({"apiVersion": object["apiVersion"], "kind": kind, "status": status});
    api(client, kind).patch_status(name, &PatchParams::apply("agent").force(), &Patch::Apply(patch)).await
}

#[tokio::test]
async fn kubectl_finds_and_shows_all_kinds() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let plane = plane(directory.path()).await?;
    let client = plane.client().await?;
    apply(&plane, "examples/vmsnapshotclass.yaml")?;
    let orders = [content("one", "node-1"), content("two", "node-2")];
    for object in [target("db-1"), snapshot("nightly"), schedule("nightly")].iter().chain(&orders) {
        put(&client, object).await?;
    }
    let disk = |name| json!({"name": name, "format": "qcow2", "source": "/vms/disk", "sizeBytes": 1});
    let status = json!({"nodeName": "node-1", "runState": "Running", "disks": [disk("vda"), disk("vdb")]});
    put_status(&client, &target("db-1"), status).await?;

    let all = plane.kubectl(&["get", "freezeframe", "--all-namespaces", "--output=name"])?;
    let plurals = ["vmtarget", "vmsnapshot", "vmsnapshotschedule", "vmsnapshotclass", "vmsnapshotcontent"];
    assert!(plurals.iter().all(|kind| all.contains(&format!("{kind}.freezeframe.dev/"))), "{all}");
    let get = |arguments: &str| {
        let arguments: Vec<&str> = ["get", "--namespace=shop"].into_iter().chain(arguments.split(' ')).collect();
        plane.kubectl(&arguments)
    };
    assert_eq!(
        get("vmsnapc --field-selector=spec.nodeName=node-2 --output=name")?,
        "vmsnapshotcontent.freezeframe.dev/two\n"
    );
    assert_eq!(get("vmsnap --field-selector=spec.vmName=db-2 --output=name")?, "");
    assert_eq!(columns(&get("vmt --no-headers")?)[..5], ["db-1", "node-1", "Running", "Absent", "vda"]);
    assert_eq!(columns(&get("vmss --no-headers")?)[..2], ["nightly", "@daily"]);
    assert_eq!(columns(&get("vmsc --no-headers")?)[..3], ["standard", "overlay", "Delete"]);
    assert_eq!(columns(&get("vmsnapc one --no-headers")?)[..5], ["one", "node-1", "shop", "nightly", "db-1"]);
    Ok(())
}

fn columns(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

#[tokio::test]
async fn kubectl_waits_for_a_snapshot_and_shows_what_was_proved() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let plane = plane(directory.path()).await?;
    let client = plane.client().await?;
    put(&client, &snapshot("nightly")).await?;
    let time = "2026-01-01T00:00:00Z";
    let ready =
        json!({"type": "Ready", "status": "True", "reason": "Completed", "message": "", "lastTransitionTime": time});
    let status = json!({
        "observedGeneration": 1, "phase": "Ready", "readyToUse": true, "creationTime": "2026-01-01T00:00:00.123456Z",
        "consistency": {"level": "Filesystem", "holdMillis": 11}, "conditions": [ready],
    });
    put_status(&client, &snapshot("nightly"), status).await?;
    plane.kubectl(&["wait", "--for=condition=Ready", "--timeout=10s", "--namespace=shop", "vmsnap/nightly"])?;
    let line = plane.kubectl(&["get", "vmsnap", "--namespace=shop", "--no-headers"])?;
    assert_eq!(columns(&line)[..5], ["nightly", "db-1", "Ready", "Filesystem", "11"]);
    Ok(())
}

#[tokio::test]
async fn every_example_can_be_applied() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let plane = plane(directory.path()).await?;
    apply(&plane, "examples")
}

/// A client with a token of the agent's service account, bound to `node` as the token of a pod there is.
async fn agent(plane: &ControlPlane, node: Option<&str>) -> Result<Client> {
    let client = plane.client().await?;
    let bound_object_ref = match node {
        None => None,
        Some(node) => Some(BoundObjectReference {
            kind: Some("Node".into()),
            api_version: Some("v1".into()),
            name: Some(node.to_owned()),
            uid: Api::<Node>::all(client.clone()).get(node).await?.metadata.uid,
        }),
    };
    let spec = TokenRequestSpec { bound_object_ref, ..TokenRequestSpec::default() };
    let request = TokenRequest { spec: Some(spec), ..TokenRequest::default() };
    let accounts = Api::<ServiceAccount>::namespaced(client, "freezeframe-node");
    let answer = accounts.create_token_request("freezeframe-agent", &PostParams::default(), &request).await?;
    let token = answer.status.context("no token")?.token;
    let mut kubeconfig: Value = serde_json::from_str(&std::fs::read_to_string(plane.kubeconfig())?)?;
    kubeconfig["users"][0]["user"] = json!({"token": token});
    let kubeconfig: Kubeconfig = serde_json::from_value(kubeconfig)?;
    Ok(Client::try_from(kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?)?)
}

/// A plane with two nodes and all of `examples/`, whose admission policies are in force.
async fn guarded_plane(directory: &Path) -> Result<ControlPlane> {
    let plane = plane(directory).await?;
    apply(&plane, "examples")?;
    let client = plane.client().await?;
    for node in ["node-1", "node-2"] {
        let object = serde_json::from_value(json!({"metadata": {"name": node}}))?;
        Api::<Node>::all(client.clone()).create(&PostParams::default(), &object).await?;
    }
    for object in [content("one", "node-1"), content("two", "node-2"), target("db-1"), target("probe")] {
        put(&client, &object).await?;
    }
    let unbound = agent(&plane, None).await?;
    await_condition("the admission policies to be in force", SOON, async || {
        let content = put_status(&unbound, &content("one", "node-1"), json!({})).await;
        let target = put_status(&unbound, &target("probe"), json!({"nodeName": "node-1"})).await;
        Ok((is_refused(&content, "not bound to a node") && is_refused(&target, "not bound to a node")).then_some(()))
    })
    .await?;
    Ok(plane)
}

fn is_refused<T>(answer: &Result<T, kube::Error>, why: &str) -> bool {
    matches!(answer, Err(kube::Error::Api(status)) if status.code == 403 && status.message.contains(why))
}

#[tokio::test]
async fn an_agent_writes_only_the_contents_of_its_own_node() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let plane = guarded_plane(directory.path()).await?;
    let agent = agent(&plane, Some("node-1")).await?;
    put_status(&agent, &content("one", "node-1"), json!({"phase": "Ready"})).await?;
    let foreign = put_status(&agent, &content("two", "node-2"), json!({"phase": "Ready"})).await;
    assert!(is_refused(&foreign, "the content belongs to another node"), "{foreign:?}");
    let listed = api(&agent, "VMSnapshotContent").list(&kube::api::ListParams::default()).await?;
    assert_eq!(listed.items.len(), 2);
    let order = put(&agent, &content("mine", "node-1")).await;
    assert!(is_refused(&order, "cannot patch resource"), "{order:?}");
    Ok(())
}

#[tokio::test]
async fn an_agent_reports_only_the_targets_of_its_own_node() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let plane = guarded_plane(directory.path()).await?;
    let (one, two) = (agent(&plane, Some("node-1")).await?, agent(&plane, Some("node-2")).await?);
    put(&one, &target("web-1")).await?;
    let lie = put_status(&one, &target("web-1"), json!({"nodeName": "node-2"})).await;
    assert!(is_refused(&lie, "an agent reports its own node"), "{lie:?}");
    put_status(&one, &target("web-1"), json!({"nodeName": "node-1"})).await?;
    let theft = put_status(&two, &target("web-1"), json!({"nodeName": "node-2"})).await;
    assert!(is_refused(&theft, "the target belongs to another node"), "{theft:?}");
    let deletion = api(&two, "VMTarget").delete("web-1", &DeleteParams::default()).await;
    assert!(is_refused(&deletion, "the target belongs to another node"), "{deletion:?}");
    api(&one, "VMTarget").delete("web-1", &DeleteParams::default()).await?;
    Ok(())
}

/// Whether `user` may do `verb` to `resource`, a subresource after a slash, by RBAC.
async fn may(client: &Client, user: &str, verb: &str, resource: &str) -> Result<bool> {
    let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
    let attributes = ResourceAttributes {
        group: Some("freezeframe.dev".into()),
        namespace: Some("shop".into()),
        resource: Some(resource.into()),
        subresource: Some(subresource.into()),
        verb: Some(verb.into()),
        ..ResourceAttributes::default()
    };
    let spec = SubjectAccessReviewSpec {
        resource_attributes: Some(attributes),
        user: Some(user.into()),
        ..SubjectAccessReviewSpec::default()
    };
    let review = SubjectAccessReview { spec, ..SubjectAccessReview::default() };
    let answer = Api::<SubjectAccessReview>::all(client.clone()).create(&PostParams::default(), &review).await?;
    Ok(answer.status.context("no answer")?.allowed)
}

#[tokio::test]
async fn operator_and_agent_may_do_their_own_part_alone() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let plane = plane(directory.path()).await?;
    apply(&plane, "examples")?;
    let client = plane.client().await?;
    let rights = [
        (OPERATOR, "patch", "vmsnapshots/status", true),
        (OPERATOR, "create", "vmsnapshotcontents", true),
        (OPERATOR, "patch", "vmsnapshotcontents/status", false),
        (OPERATOR, "delete", "vmsnapshots", true),
        (OPERATOR, "patch", "vmsnapshotschedules/status", true),
        (OPERATOR, "patch", "vmsnapshotschedules", false),
        (OPERATOR, "delete", "vmsnapshotschedules", false),
        (OPERATOR, "patch", "vmtargets/status", false),
        (AGENT, "patch", "vmsnapshotcontents/status", true),
        (AGENT, "patch", "vmsnapshotcontents", false),
        (AGENT, "delete", "vmsnapshotcontents", false),
        (AGENT, "get", "vmsnapshots", false),
        (AGENT, "get", "vmsnapshotclasses", false),
    ];
    for (user, verb, resource, allowed) in rights {
        // RBAC sees a new role a moment after it was written.
        await_condition(&format!("{user}: {verb} {resource}: {allowed}"), SOON, async || {
            Ok((may(&client, user, verb, resource).await? == allowed).then_some(()))
        })
        .await?;
    }
    Ok(())
}
