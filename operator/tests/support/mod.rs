//! A server that expects certain calls, and caches without a watch.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "each test crate uses a part; a test's support may stop it"
)]

pub mod cluster;
pub mod objects;

use std::sync::Arc;
use std::time::Duration;

use freezeframe_api::v1alpha1::{VMSnapshot, VMSnapshotContent};
use freezeframe_operator::caches::{Caches, Sources};
use freezeframe_operator::context::Context;
use freezeframe_operator::metrics::Metrics;
use http::{Method, Request, Response};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::time::timeout;
use tower_test::mock::{Handle, SendResponse};

/// The server's side of a conversation.
pub struct Server(Handle<Request<Body>, Response<Body>>);

/// Longer than any wait of the operator's.
const PATIENCE: Duration = Duration::from_secs(60);

/// One call that was received.
pub struct Call {
    pub method: Method,
    pub path: String,
    pub query: String,
    pub content_type: String,
    pub body: Value,
    reply: SendResponse<Response<Body>>,
}

pub fn server() -> (Client, Server) {
    let (service, handle) = tower_test::mock::pair();
    (Client::new(service, "default"), Server(handle))
}

impl Server {
    /// The next call, which must be of this method to a path that ends so.
    pub async fn expect(&mut self, method: Method, path_end: &str) -> Call {
        let call = self.next().await;
        let (made, path) = (&call.method, &call.path);
        assert!(call.is(&method, path_end), "{made} {path}, not {method} {path_end}");
        call
    }

    /// The next call, whatever it is. One must come.
    pub async fn next(&mut self) -> Call {
        timeout(PATIENCE, self.poll()).await.expect("no call came").unwrap()
    }

    /// The next call, however late it comes; None when the client is gone.
    pub async fn poll(&mut self) -> Option<Call> {
        let (request, reply) = self.0.next_request().await?;
        let (parts, body) = request.into_parts();
        let bytes = body.collect_bytes().await.unwrap();
        Some(Call {
            method: parts.method,
            path: parts.uri.path().to_owned(),
            query: parts.uri.query().unwrap_or_default().to_owned(),
            content_type: parts.headers.get("content-type").map(|v| v.to_str().unwrap().to_owned()).unwrap_or_default(),
            body: serde_json::from_slice(&bytes).unwrap_or_default(),
            reply,
        })
    }
}

impl Call {
    pub fn is(&self, method: &Method, path_end: &str) -> bool {
        self.method == *method && self.path.ends_with(path_end)
    }

    pub fn answer(self, object: &impl serde::Serialize) {
        self.respond(200, &serde_json::to_value(object).unwrap());
    }

    pub fn fail(self, code: u16, reason: &str) {
        let status = json!({"apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code, "reason": reason,
            "message": "as the test has it", "metadata": {}});
        self.respond(code, &status);
    }

    fn respond(self, code: u16, body: &Value) {
        let body = Body::from(serde_json::to_vec(body).unwrap());
        self.reply.send_response(Response::builder().status(code).body(body).unwrap());
    }
}

/// An operator whose watches have seen VM `db-1` running and class `standard`, and these.
pub fn operator(snapshots: Vec<VMSnapshot>, contents: Vec<VMSnapshotContent>) -> (Arc<Context>, Server, Sources) {
    let (client, server) = server();
    let (caches, mut sources) = Caches::new();
    sources.snapshots.fill(snapshots);
    sources.contents.fill(contents);
    sources.targets.fill([objects::target()]);
    sources.classes.fill([objects::class()]);
    sources.schedules.fill([]);
    sources.restores.fill([]);
    (Arc::new(Context::new(client, caches, Metrics::default(), None)), server, sources)
}
