//! What the operator says to the API server, and what it makes of the answers.
#![allow(clippy::unwrap_used, reason = "a test's helpers may stop it")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use freezeframe_api::conditions::reasons;
use freezeframe_api::v1alpha1::{ContentPhase, Phase, VMSnapshot, VMSnapshotContent};
use freezeframe_operator::context::Context;
use freezeframe_operator::error::{Error, ErrorKind};
use freezeframe_operator::{content, vmsnapshot};
use http::Method;
use k8s_openapi::jiff::Timestamp;
use kube::core::DeserializeGuard;
use kube::core::error_boundary::InvalidObject;
use kube::runtime::controller::Action;
use serde_json::{Value, json};
use support::fixtures::{self, SnapshotExt as _};
use support::{Server, operator};

async fn reconcile(snapshot: &VMSnapshot, ctx: &Arc<Context>) -> Result<Action, Error> {
    vmsnapshot::reconcile(Arc::new(DeserializeGuard(Ok(snapshot.clone()))), ctx.clone()).await
}

async fn reconcile_content(content: &VMSnapshotContent, ctx: &Arc<Context>) -> Result<Action, Error> {
    content::reconcile(Arc::new(DeserializeGuard(Ok(content.clone()))), ctx.clone()).await
}

/// A snapshot that was just created.
fn fresh(name: &str) -> VMSnapshot {
    fixtures::snapshot_created(name, Timestamp::from_second(Timestamp::now().as_second()).unwrap())
}

fn version(mut snapshot: VMSnapshot, version: &str) -> VMSnapshot {
    snapshot.metadata.resource_version = Some(version.into());
    snapshot
}

fn kind(result: &Result<Action, Error>) -> Option<ErrorKind> {
    result.as_ref().err().map(Error::kind)
}

/// Takes a status as the server would.
async fn accept_status(server: &mut Server, snapshot: &VMSnapshot, new_version: &str) -> VMSnapshot {
    let call = server.expect(Method::PATCH, "/vmsnapshots/a/status").await;
    let written: VMSnapshot = {
        let mut object = version(snapshot.clone(), new_version);
        object.status = serde_json::from_value(call.body["status"].clone()).unwrap();
        object
    };
    call.answer(&written);
    written
}

#[tokio::test]
async fn a_new_snapshot_costs_three_writes_and_no_read() {
    let snapshot = fresh("a");
    let (ctx, mut server, _sources) = operator(vec![snapshot.clone()], vec![]);
    let script = async {
        let call = server.expect(Method::PATCH, "/namespaces/shop/vmsnapshots/a").await;
        let expected = json!({"uid": "uid-a", "resourceVersion": "100", "finalizers": ["freezeframe.dev/snapshot"]});
        assert_eq!(
            (&call.body, call.content_type.as_str()),
            (&json!({"metadata": expected}), "application/merge-patch+json")
        );
        call.answer(&version(snapshot.clone().finalized(), "101"));
        let call = server.expect(Method::PATCH, "/vmsnapshotcontents/vmsnap-uid-a").await;
        assert_eq!(call.content_type, "application/apply-patch+yaml");
        assert!(call.query.contains("force=true") && call.query.contains("fieldManager=freezeframe-operator"));
        assert_eq!(call.body["spec"]["vmSnapshotRef"]["uid"], "uid-a");
        call.answer(&fixtures::content(&snapshot));
        let call = server.expect(Method::PATCH, "/vmsnapshots/a/status").await;
        assert_eq!(call.content_type, "application/apply-patch+yaml");
        assert_eq!(call.body["metadata"], json!({"name": "a", "resourceVersion": "101"}), "that of our own write");
        assert_eq!((call.body["status"]["phase"].as_str(), &call.body["spec"]), (Some("Preparing"), &Value::Null));
        call.answer(&version(snapshot.clone(), "102"));
        drop(server);
    };
    let (result, ()) = tokio::join!(reconcile(&snapshot, &ctx), script);
    result.unwrap();
}

#[tokio::test]
async fn a_snapshot_that_changed_meanwhile_gets_no_work_order() {
    let snapshot = fresh("a");
    let (ctx, mut server, _sources) = operator(vec![snapshot.clone()], vec![]);
    let script = async {
        server.expect(Method::PATCH, "/vmsnapshots/a").await.fail(409, "Conflict");
        drop(server);
    };
    let (result, ()) = tokio::join!(reconcile(&snapshot, &ctx), script);
    assert_eq!(kind(&result), Some(ErrorKind::Conflict));
}

#[tokio::test]
async fn a_content_whose_creation_was_answered_with_an_error_is_found_and_adopted() {
    let snapshot = fresh("a").finalized();
    let (ctx, mut server, _sources) = operator(vec![snapshot.clone()], vec![]);
    let script = async {
        server.expect(Method::GET, "/vmsnapshotcontents/vmsnap-uid-a").await.fail(404, "NotFound");
        server.expect(Method::PATCH, "/vmsnapshotcontents/vmsnap-uid-a").await.fail(500, "InternalError");
        server
    };
    let (result, mut server) = tokio::join!(reconcile(&snapshot, &ctx), script);
    assert_eq!(kind(&result), Some(ErrorKind::Unavailable));
    let script = async {
        let call = server.expect(Method::GET, "/vmsnapshotcontents/vmsnap-uid-a").await;
        call.answer(&fixtures::content(&snapshot));
        let written = accept_status(&mut server, &snapshot, "102").await;
        drop(server);
        written
    };
    let (result, written) = tokio::join!(reconcile(&snapshot, &ctx), script);
    result.unwrap();
    assert_eq!(written.status.unwrap().phase, Phase::Preparing);
}

#[tokio::test]
async fn a_work_order_that_the_server_refuses_is_an_error_that_waits_long() {
    let snapshot = fresh("a").finalized();
    let (ctx, mut server, _sources) = operator(vec![snapshot.clone()], vec![]);
    let script = async {
        server.expect(Method::GET, "/vmsnapshotcontents/vmsnap-uid-a").await.fail(404, "NotFound");
        server.expect(Method::PATCH, "/vmsnapshotcontents/vmsnap-uid-a").await.fail(422, "Invalid");
        drop(server);
    };
    let (result, ()) = tokio::join!(reconcile(&snapshot, &ctx), script);
    assert_eq!(kind(&result), Some(ErrorKind::Refused));
}

#[tokio::test]
async fn a_cache_that_is_behind_our_own_write_is_not_acted_on() {
    let snapshot = fresh("a").finalized();
    let (ctx, mut server, _sources) = operator(vec![snapshot.clone()], vec![fixtures::content(&snapshot)]);
    let script = async {
        let written = accept_status(&mut server, &snapshot, "105").await;
        drop(server);
        written
    };
    let (result, written) = tokio::join!(reconcile(&snapshot, &ctx), script);
    result.unwrap();
    let behind = reconcile(&version(snapshot, "104"), &ctx).await.unwrap();
    assert_eq!(behind, Action::requeue(Duration::from_secs(1)));
    reconcile(&written, &ctx).await.expect("nothing is written when the cache has caught up");
}

#[tokio::test]
async fn a_lost_content_is_believed_of_the_server_alone() {
    let mut snapshot = fresh("a").finalized().phase(Phase::Ready);
    snapshot.status.as_mut().unwrap().content_name = Some("vmsnap-uid-a".into());
    let (ctx, mut server, _sources) = operator(vec![snapshot.clone()], vec![]);
    let script = async {
        let report = fixtures::reported(&snapshot, ContentPhase::Ready, reasons::COMPLETED);
        server.expect(Method::GET, "/vmsnapshotcontents/vmsnap-uid-a").await.answer(&report);
        let written = accept_status(&mut server, &snapshot, "101").await;
        drop(server);
        written
    };
    let (result, written) = tokio::join!(reconcile(&snapshot, &ctx), script);
    result.unwrap();
    assert!(written.status.unwrap().ready_to_use);
}

#[tokio::test]
async fn a_snapshot_that_became_ready_gets_one_event_and_a_lost_event_is_no_error() {
    let snapshot = fresh("a").finalized();
    let report = fixtures::reported(&snapshot, ContentPhase::Ready, reasons::COMPLETED);
    let (ctx, mut server, _sources) = operator(vec![snapshot.clone()], vec![report]);
    let script = async {
        accept_status(&mut server, &snapshot, "103").await;
        let call = server.expect(Method::POST, "/apis/events.k8s.io/v1/namespaces/shop/events").await;
        assert_eq!((&call.body["reason"], &call.body["type"]), (&json!("Ready"), &json!("Normal")));
        assert_eq!(call.body["regarding"]["uid"], "uid-a");
        call.fail(500, "InternalError");
        drop(server);
    };
    let (result, ()) = tokio::join!(reconcile(&snapshot, &ctx), script);
    result.unwrap();
}

#[tokio::test]
async fn a_status_is_not_put_on_a_later_snapshot_of_the_same_name() {
    let snapshot = fixtures::snapshot("a");
    let (ctx, mut server, _sources) = operator(vec![snapshot.clone()], vec![]);
    let script = async {
        let call = server.expect(Method::PATCH, "/vmsnapshots/a/status").await;
        assert_eq!(call.body["status"]["phase"], "Failed");
        assert_eq!(call.body["metadata"]["resourceVersion"], "100", "the server compares it");
        call.fail(409, "Conflict");
        drop(server);
    };
    let (result, ()) = tokio::join!(reconcile(&snapshot, &ctx), script);
    assert_eq!(kind(&result), Some(ErrorKind::Conflict));
}

#[tokio::test]
async fn a_status_of_a_snapshot_that_is_gone_is_dropped_without_an_event() {
    let snapshot = fresh("a").finalized();
    let report = fixtures::reported(&snapshot, ContentPhase::Ready, reasons::COMPLETED);
    let (ctx, mut server, _sources) = operator(vec![snapshot.clone()], vec![report]);
    let script = async {
        server.expect(Method::PATCH, "/vmsnapshots/a/status").await.fail(404, "NotFound");
        drop(server);
    };
    let (result, ()) = tokio::join!(reconcile(&snapshot, &ctx), script);
    result.unwrap();
}

#[tokio::test]
async fn a_deleted_snapshots_content_is_deleted_by_its_uid_and_may_be_gone_already() {
    let snapshot = fresh("a").finalized().deleted();
    let (ctx, mut server, _sources) = operator(vec![snapshot.clone()], vec![fixtures::content(&snapshot)]);
    let script = async {
        accept_status(&mut server, &snapshot, "103").await;
        let call = server.expect(Method::DELETE, "/vmsnapshotcontents/vmsnap-uid-a").await;
        assert_eq!(call.body["preconditions"], json!({"uid": "uid-content"}));
        call.fail(404, "NotFound");
        drop(server);
    };
    let (result, ()) = tokio::join!(reconcile(&snapshot, &ctx), script);
    result.unwrap();
}

#[tokio::test]
async fn a_deleted_snapshot_is_let_go_when_the_server_too_knows_of_no_content() {
    let snapshot = fresh("a").finalized().deleted();
    let (ctx, mut server, _sources) = operator(vec![snapshot.clone()], vec![]);
    let script = async {
        server.expect(Method::GET, "/vmsnapshotcontents/vmsnap-uid-a").await.fail(404, "NotFound");
        let call = server.expect(Method::PATCH, "/vmsnapshots/a").await;
        assert_eq!(call.body["metadata"], json!({"uid": "uid-a", "resourceVersion": "100", "finalizers": []}));
        call.fail(404, "NotFound");
        drop(server);
    };
    let (result, ()) = tokio::join!(reconcile(&snapshot, &ctx), script);
    result.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_server_that_never_answers_does_not_hold_a_reconcile() {
    let snapshot = fresh("a");
    let (ctx, mut server, _sources) = operator(vec![snapshot.clone()], vec![]);
    let script = async { server.expect(Method::PATCH, "/vmsnapshots/a").await };
    let (result, _unanswered) = tokio::join!(reconcile(&snapshot, &ctx), script);
    assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
}

#[tokio::test]
async fn an_object_that_cannot_be_read_is_an_error_of_its_own() {
    let (ctx, _server, _sources) = operator(vec![], vec![]);
    let broken = InvalidObject { error: "no field vmName".into(), metadata: fresh("a").metadata };
    let result = vmsnapshot::reconcile(Arc::new(DeserializeGuard(Err(broken))), ctx).await;
    assert_eq!(kind(&result), Some(ErrorKind::Unreadable));
}

#[tokio::test]
async fn a_content_is_let_go_when_its_node_has_removed_everything_and_not_before() {
    let snapshot = fresh("a").finalized().deleted();
    let going = fixtures::deleted(fixtures::reported(&snapshot, ContentPhase::Ready, reasons::COMPLETED));
    let mut removed = going.clone();
    let condition = json!({"type": "Removed", "status": "True", "reason": "Deleted", "message": "", "lastTransitionTime": "2001-01-01T00:00:00Z"});
    removed.status.as_mut().unwrap().conditions.push(serde_json::from_value(condition).unwrap());
    let (ctx, mut server, _sources) = operator(vec![snapshot], vec![going.clone()]);
    reconcile_content(&going, &ctx).await.expect("no call is made");
    let script = async {
        let call = server.expect(Method::PATCH, "/vmsnapshotcontents/vmsnap-uid-a").await;
        assert_eq!(call.body["metadata"], json!({"uid": "uid-content", "resourceVersion": "200", "finalizers": []}));
        call.answer(&removed);
        drop(server);
    };
    let (result, ()) = tokio::join!(reconcile_content(&removed, &ctx), script);
    result.unwrap();
}

#[tokio::test]
async fn a_content_is_orphaned_when_the_server_knows_no_snapshot_of_its_uid() {
    let snapshot = fresh("a");
    let content = fixtures::content(&snapshot);
    let mut namesake = snapshot.clone();
    namesake.metadata.uid = Some("another".into());
    for answer in [None, Some(namesake)] {
        let (ctx, mut server, _sources) = operator(vec![], vec![content.clone()]);
        let script = async {
            let call = server.expect(Method::GET, "/namespaces/shop/vmsnapshots/a").await;
            match answer {
                Some(namesake) => call.answer(&namesake),
                None => call.fail(404, "NotFound"),
            }
            let call = server.expect(Method::DELETE, "/vmsnapshotcontents/vmsnap-uid-a").await;
            assert_eq!(call.body["preconditions"], json!({"uid": "uid-content"}));
            call.answer(&content);
            drop(server);
        };
        let (result, ()) = tokio::join!(reconcile_content(&content, &ctx), script);
        result.unwrap();
    }
}

#[tokio::test]
async fn a_content_is_kept_while_the_server_cannot_say_whether_its_snapshot_is_gone() {
    let content = fixtures::content(&fresh("a"));
    let (ctx, mut server, _sources) = operator(vec![], vec![content.clone()]);
    let script = async {
        server.expect(Method::GET, "/vmsnapshots/a").await.fail(503, "ServiceUnavailable");
        drop(server);
    };
    let (result, ()) = tokio::join!(reconcile_content(&content, &ctx), script);
    assert_eq!(kind(&result), Some(ErrorKind::Unavailable));
}

#[tokio::test]
async fn a_content_whose_snapshot_is_in_the_cache_is_kept_without_a_call() {
    let snapshot = fresh("a");
    let content = fixtures::content(&snapshot);
    let (ctx, server, _sources) = operator(vec![snapshot], vec![content.clone()]);
    drop(server);
    reconcile_content(&content, &ctx).await.unwrap();
}
