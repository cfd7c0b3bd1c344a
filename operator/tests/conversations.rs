//! What the operator says to the API server, and what it makes of the answers.
#![allow(clippy::unwrap_used, reason = "a test's helpers may stop it")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use freezeframe_api::v1alpha1::{DeletionPolicy, Phase, VMSnapshot, VMSnapshotContent};
use freezeframe_operator::context::Context;
use freezeframe_operator::error::{Error, ErrorKind};
use freezeframe_operator::{content, vmsnapshot};
use http::Method;
use kube::core::DeserializeGuard;
use kube::core::error_boundary::InvalidObject;
use kube::runtime::controller::Action;
use serde_json::{Value, json};
use support::objects::{self, deleted, finalized, fresh, overdue, ready, reported};
use support::{Server, operator};

async fn reconcile(snapshot: &VMSnapshot, ctx: &Arc<Context>) -> Result<Action, Error> {
    vmsnapshot::reconcile(Arc::new(DeserializeGuard(Ok(snapshot.clone()))), ctx.clone()).await
}

async fn reconcile_content(content: &VMSnapshotContent, ctx: &Arc<Context>) -> Result<Action, Error> {
    content::reconcile(Arc::new(DeserializeGuard(Ok(content.clone()))), ctx.clone()).await
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
    let snapshot = fresh();
    let (ctx, mut server, _sources) = operator(vec![snapshot.clone()], vec![]);
    let script = async {
        let call = server.expect(Method::PATCH, "/namespaces/shop/vmsnapshots/a").await;
        let expected = json!({"uid": "uid-a", "resourceVersion": "100", "finalizers": ["freezeframe.dev/snapshot"]});
        assert_eq!(
            (&call.body, call.content_type.as_str()),
            (&json!({"metadata": expected}), "application/merge-patch+json")
        );
        call.answer(&version(finalized(snapshot.clone()), "101"));
        let call = server.expect(Method::PATCH, "/vmsnapshotcontents/vmsnap-uid-a").await;
        assert_eq!(call.content_type, "application/apply-patch+yaml");
        assert!(call.query.contains("force=true") && call.query.contains("fieldManager=freezeframe-operator"));
        assert_eq!(call.body["spec"]["vmSnapshotRef"]["uid"], "uid-a");
        call.answer(&objects::content());
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
    let snapshot = fresh();
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
    let snapshot = finalized(fresh());
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
        call.answer(&objects::content());
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
    let snapshot = finalized(fresh());
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
    let snapshot = finalized(fresh());
    let (ctx, mut server, _sources) = operator(vec![snapshot.clone()], vec![objects::content()]);
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
    let mut snapshot = finalized(fresh());
    snapshot.status.get_or_insert_default().phase = Phase::Ready;
    snapshot.status.get_or_insert_default().content_name = Some("vmsnap-uid-a".into());
    let (ctx, mut server, _sources) = operator(vec![snapshot.clone()], vec![]);
    let script = async {
        let report = ready();
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
    let snapshot = finalized(fresh());
    let report = ready();
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
    let snapshot = overdue();
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
    let snapshot = finalized(fresh());
    let report = ready();
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
    let snapshot = deleted(finalized(fresh()));
    let (ctx, mut server, _sources) = operator(vec![snapshot.clone()], vec![objects::content()]);
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
    let snapshot = deleted(finalized(fresh()));
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
    let snapshot = fresh();
    let (ctx, mut server, _sources) = operator(vec![snapshot.clone()], vec![]);
    let script = async { server.expect(Method::PATCH, "/vmsnapshots/a").await };
    let (result, _unanswered) = tokio::join!(reconcile(&snapshot, &ctx), script);
    assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
}

#[tokio::test]
async fn an_object_that_cannot_be_read_is_an_error_of_its_own() {
    let (ctx, _server, _sources) = operator(vec![], vec![]);
    let broken = InvalidObject { error: "no field vmName".into(), metadata: fresh().metadata };
    let result = vmsnapshot::reconcile(Arc::new(DeserializeGuard(Err(broken))), ctx).await;
    assert_eq!(kind(&result), Some(ErrorKind::Unreadable));
}

#[tokio::test]
async fn a_content_is_let_go_when_its_node_has_removed_everything_and_not_before() {
    let snapshot = deleted(finalized(fresh()));
    let going = deleted(ready());
    let removed = deleted(reported("Removed", "Removed", "True", "Deleted"));
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
    let snapshot = fresh();
    let content = objects::content();
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
            let judged = json!({"uid": "uid-content", "resourceVersion": "200"});
            assert_eq!(call.body["preconditions"], judged, "no later version");
            call.answer(&content);
            drop(server);
        };
        let (result, ()) = tokio::join!(reconcile_content(&content, &ctx), script);
        result.unwrap();
    }
}

#[tokio::test]
async fn a_content_is_kept_while_the_server_cannot_say_whether_its_snapshot_is_gone() {
    let content = objects::content();
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
    let snapshot = fresh();
    let content = objects::content();
    let (ctx, server, _sources) = operator(vec![snapshot], vec![content.clone()]);
    drop(server);
    reconcile_content(&content, &ctx).await.unwrap();
}

#[tokio::test]
async fn a_node_is_not_given_up_on_before_the_server_was_asked_for_its_report() {
    let snapshot = finalized(overdue());
    let (ctx, mut server, _sources) = operator(vec![snapshot.clone()], vec![objects::content()]);
    let script = async {
        server.expect(Method::GET, "/vmsnapshotcontents/vmsnap-uid-a").await.answer(&ready());
        let written = accept_status(&mut server, &snapshot, "101").await;
        drop(server);
        written
    };
    let (result, written) = tokio::join!(reconcile(&snapshot, &ctx), script);
    result.unwrap();
    assert_eq!(written.status.unwrap().phase, Phase::Ready, "the cut was made in time; the watch was late");
}

#[tokio::test]
async fn nothing_is_gone_on_the_word_of_a_server_that_does_not_serve_the_kind() {
    let snapshot = deleted(finalized(fresh()));
    let (ctx, mut server, _sources) = operator(vec![snapshot.clone()], vec![]);
    let script = async {
        let call = server.expect(Method::GET, "/vmsnapshotcontents/vmsnap-uid-a").await;
        call.fail(404, "404 page not found");
        drop(server);
    };
    let (result, ()) = tokio::join!(reconcile(&snapshot, &ctx), script);
    assert_eq!(kind(&result), Some(ErrorKind::Refused));
    let orphan = objects::content();
    let (ctx, mut server, _sources) = operator(vec![], vec![orphan.clone()]);
    let script = async {
        server.expect(Method::GET, "/vmsnapshots/a").await.fail(404, "404 page not found");
        drop(server);
    };
    let (result, ()) = tokio::join!(reconcile_content(&orphan, &ctx), script);
    assert_eq!(kind(&result), Some(ErrorKind::Refused));
}

#[tokio::test]
async fn what_is_waited_for_is_looked_at_again_soon_though_no_watch_tells() {
    let queued = fresh();
    let mut first = finalized(queued.clone());
    (first.metadata.name, first.metadata.uid) = (Some("first".into()), Some("uid-0".into()));
    let (ctx, mut server, _sources) = operator(vec![queued.clone(), first], vec![]);
    let script = async {
        accept_status(&mut server, &queued, "101").await;
        drop(server);
    };
    let (result, ()) = tokio::join!(reconcile(&queued, &ctx), script);
    assert_eq!(result.unwrap(), Action::requeue(Duration::from_secs(30)));
}

fn retaining(mut content: VMSnapshotContent) -> VMSnapshotContent {
    content.spec.deletion_policy = DeletionPolicy::Retain;
    content
}

fn marked(mut content: VMSnapshotContent) -> VMSnapshotContent {
    let mark = ("freezeframe.dev/snapshot-deleted".to_owned(), "true".to_owned());
    content.metadata.labels.get_or_insert_default().extend([mark]);
    content
}

/// Takes the mark that a content has outlived its snapshot, as the server would.
async fn accept_mark(server: &mut Server) {
    let call = server.expect(Method::PATCH, "/vmsnapshotcontents/vmsnap-uid-a").await;
    let metadata = json!({"uid": "uid-content", "resourceVersion": "200",
        "labels": {"freezeframe.dev/snapshot-deleted": "true"}});
    assert_eq!(call.body, json!({"metadata": metadata, "spec": {"deletionPolicy": "Retain"}}));
    call.answer(&marked(retaining(ready())));
}

#[tokio::test]
async fn a_content_with_policy_retain_is_marked_before_its_snapshot_is_let_go_and_is_not_deleted() {
    let mut snapshot = deleted(finalized(fresh()));
    snapshot.spec.deletion_policy = Some(DeletionPolicy::Retain);
    let (ctx, mut server, _sources) = operator(vec![snapshot.clone()], vec![ready()]);
    let script = async {
        accept_mark(&mut server).await;
        let call = server.expect(Method::POST, "/namespaces/shop/events").await;
        assert_eq!((&call.body["reason"], &call.body["regarding"]["uid"]), (&json!("Retained"), &json!("uid-a")));
        assert!(call.body["note"].as_str().unwrap().contains("node-a: vda: /vm/disk.qcow2"), "{}", call.body);
        call.fail(500, "InternalError");
        let call = server.expect(Method::PATCH, "/vmsnapshots/a").await;
        assert_eq!(call.body["metadata"]["finalizers"], json!([]));
        call.answer(&deleted(fresh()));
        drop(server);
    };
    let (result, ()) = tokio::join!(reconcile(&snapshot, &ctx), script);
    result.unwrap();
}

#[tokio::test]
async fn a_snapshot_is_not_let_go_while_its_content_does_not_say_that_it_stays() {
    let mut snapshot = deleted(finalized(fresh()));
    snapshot.spec.deletion_policy = Some(DeletionPolicy::Retain);
    let (ctx, mut server, _sources) = operator(vec![snapshot.clone()], vec![ready()]);
    let script = async {
        server.expect(Method::PATCH, "/vmsnapshotcontents/vmsnap-uid-a").await.fail(409, "Conflict");
        drop(server);
    };
    let (result, ()) = tokio::join!(reconcile(&snapshot, &ctx), script);
    assert_eq!(kind(&result), Some(ErrorKind::Conflict));
}

#[tokio::test]
async fn a_content_that_outlived_its_snapshot_is_left_to_the_administrator_whatever_policy_he_gives_it() {
    let lost_a_disk = reported("Failed", "Ready", "False", "SnapshotOverflowed");
    for content in [marked(retaining(ready())), marked(ready()), marked(retaining(lost_a_disk))] {
        let (ctx, server, _sources) = operator(vec![], vec![content.clone()]);
        drop(server);
        reconcile_content(&content, &ctx).await.expect("no call is made");
    }
}

#[tokio::test]
async fn an_orphan_with_policy_retain_is_marked_and_not_deleted() {
    let content = retaining(ready());
    let (ctx, mut server, _sources) = operator(vec![], vec![content.clone()]);
    let script = async {
        server.expect(Method::GET, "/vmsnapshots/a").await.fail(404, "NotFound");
        accept_mark(&mut server).await;
        drop(server);
    };
    let (result, ()) = tokio::join!(reconcile_content(&content, &ctx), script);
    result.unwrap();
}

#[tokio::test]
async fn an_orphan_that_failed_is_deleted_for_nothing_of_it_is_kept() {
    let content = marked(retaining(reported("Failed", "Ready", "False", "CopyFailed")));
    let (ctx, mut server, _sources) = operator(vec![], vec![content.clone()]);
    let script = async {
        server.expect(Method::GET, "/vmsnapshots/a").await.fail(404, "NotFound");
        server.expect(Method::DELETE, "/vmsnapshotcontents/vmsnap-uid-a").await.answer(&content);
        drop(server);
    };
    let (result, ()) = tokio::join!(reconcile_content(&content, &ctx), script);
    result.unwrap();
}

#[tokio::test]
async fn where_left_data_is_is_told_once_more_when_its_content_goes() {
    let content = deleted(marked(retaining(reported("Removed", "Removed", "True", "Retained"))));
    let (ctx, mut server, _sources) = operator(vec![], vec![content.clone()]);
    let script = async {
        let call = server.expect(Method::POST, "/events").await;
        assert!(call.body["note"].as_str().unwrap().contains("vda: /vm/disk.qcow2"), "{}", call.body);
        call.fail(500, "InternalError");
        server.expect(Method::PATCH, "/vmsnapshotcontents/vmsnap-uid-a").await.answer(&content);
        drop(server);
    };
    let (result, ()) = tokio::join!(reconcile_content(&content, &ctx), script);
    result.unwrap();
}

#[tokio::test]
async fn a_snapshot_is_not_cancelled_when_its_node_has_reported_meanwhile() {
    let snapshot = deleted(finalized(fresh()));
    let (ctx, mut server, _sources) = operator(vec![snapshot.clone()], vec![retaining(objects::content())]);
    let script = async {
        let call = server.expect(Method::PATCH, "/vmsnapshotcontents/vmsnap-uid-a").await;
        let seen = json!({"uid": "uid-content", "resourceVersion": "200"});
        assert_eq!(call.body, json!({"metadata": seen, "spec": {"deletionPolicy": "Delete"}}));
        call.fail(409, "Conflict");
        drop(server);
    };
    let (result, ()) = tokio::join!(reconcile(&snapshot, &ctx), script);
    assert_eq!(kind(&result), Some(ErrorKind::Conflict), "nothing is deleted before this is thought over");
}
