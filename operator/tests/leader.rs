//! Who leads, by what is said to the API server. Time is paused, so that a wait of seconds takes none.
#![allow(clippy::unwrap_used, reason = "a test's helpers may stop it")]

mod support;

use std::future::pending;
use std::time::Duration;

use freezeframe_operator::leader::Candidate;
use http::Method;
use k8s_openapi::api::coordination::v1::Lease;
use serde_json::{Value, json};
use support::{Call, Server, server};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

const LEASE: &str = "/namespaces/system/leases/freezeframe-operator";

fn lease(holder: &str, renewed: u32) -> Lease {
    serde_json::from_value(json!({
        "metadata": {"name": "freezeframe-operator", "resourceVersion": "7"},
        "spec": {"holderIdentity": holder, "renewTime": format!("2001-01-01T00:00:{renewed:02}.000000Z")},
    }))
    .unwrap()
}

fn candidate() -> (Candidate, Server) {
    let (client, server) = server();
    (Candidate::new(client, "system", "me"), server)
}

async fn look(server: &mut Server, found: &Lease) {
    server.expect(Method::GET, LEASE).await.answer(found);
}

async fn claim(server: &mut Server) -> Call {
    let call = server.expect(Method::PUT, LEASE).await;
    assert_eq!(call.body["spec"]["holderIdentity"], "me");
    assert_eq!(call.body["metadata"]["resourceVersion"], "7", "only the lease that was looked at is taken");
    call
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_does_not_exist_is_created() {
    let (candidate, mut server) = candidate();
    let script = async {
        server.expect(Method::GET, LEASE).await.fail(404, "NotFound");
        let call = server.expect(Method::POST, "/namespaces/system/leases").await;
        assert_eq!(
            (&call.body["spec"]["holderIdentity"], &call.body["spec"]["leaseDurationSeconds"]),
            (&json!("me"), &json!(15))
        );
        call.answer(&lease("me", 0));
    };
    tokio::join!(candidate.acquire(), script);
}

#[tokio::test(start_paused = true)]
async fn a_lease_of_another_is_taken_only_after_it_was_seen_unchanged_for_its_whole_duration() {
    let (candidate, mut server) = candidate();
    let script = async {
        look(&mut server, &lease("other", 0)).await;
        let mut seen = Instant::now();
        for _ in 0..2 {
            look(&mut server, &lease("other", 1)).await;
        }
        look(&mut server, &lease("other", 2)).await;
        seen = seen.max(Instant::now());
        while seen.elapsed() < Duration::from_secs(15) {
            look(&mut server, &lease("other", 2)).await;
        }
        claim(&mut server).await.answer(&lease("me", 3));
        assert!(seen.elapsed() < Duration::from_secs(19));
    };
    tokio::join!(candidate.acquire(), script);
}

#[tokio::test(start_paused = true)]
async fn of_two_that_claim_a_free_lease_the_slower_one_waits() {
    let (candidate, mut server) = candidate();
    let script = async {
        look(&mut server, &lease("", 0)).await;
        claim(&mut server).await.fail(409, "Conflict");
        look(&mut server, &lease("other", 1)).await;
        look(&mut server, &lease("", 2)).await;
        claim(&mut server).await.answer(&lease("me", 3));
    };
    tokio::join!(candidate.acquire(), script);
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_gets_no_answers_gives_up_before_another_one_may_take_over() {
    let (candidate, mut server) = candidate();
    let start = Instant::now();
    let silence = async {
        let mut unanswered = vec![];
        loop {
            unanswered.push(server.expect(Method::GET, LEASE).await);
        }
    };
    tokio::select! {
        () = candidate.keep(Instant::now(), CancellationToken::new()) => {}
        () = silence => {}
    }
    assert_eq!(start.elapsed(), Duration::from_secs(10), "not when a pending renewal has timed out");
}

#[tokio::test(start_paused = true)]
async fn a_leader_goes_on_through_a_short_outage() {
    let (candidate, mut server) = candidate();
    let script = async {
        for _ in 0..2 {
            server.expect(Method::GET, LEASE).await.fail(503, "ServiceUnavailable");
        }
        look(&mut server, &lease("me", 0)).await;
        claim(&mut server).await.answer(&lease("me", 1));
        for _ in 0..2 {
            server.expect(Method::GET, LEASE).await.fail(503, "ServiceUnavailable");
        }
        look(&mut server, &lease("me", 1)).await;
    };
    tokio::select! {
        () = candidate.keep(Instant::now(), CancellationToken::new()) => panic!("gave up"),
        () = script => {}
    }
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_sees_another_name_on_the_lease_stops_at_once() {
    let (candidate, mut server) = candidate();
    let script = async {
        look(&mut server, &lease("other", 9)).await;
        pending::<()>().await;
    };
    tokio::select! {
        () = candidate.keep(Instant::now(), CancellationToken::new()) => {}
        () = script => {}
        () = sleep(Duration::from_secs(5)) => panic!("went on"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_stops_in_order_leaves_the_lease_free() {
    let (candidate, mut server) = candidate();
    let stop = CancellationToken::new();
    stop.cancel();
    let script = async {
        look(&mut server, &lease("me", 0)).await;
        let call = server.expect(Method::PUT, LEASE).await;
        assert_eq!(call.body["spec"].get("holderIdentity"), None::<&Value>);
        call.answer(&lease("", 0));
    };
    tokio::join!(candidate.keep(Instant::now(), stop), script);
}

#[tokio::test(start_paused = true)]
async fn what_was_begun_as_the_leader_ends_with_the_lease() {
    let (candidate, mut server) = candidate();
    let acting = CancellationToken::new();
    let guard = acting.clone().drop_guard();
    let act = async move {
        let _dropped_with_the_action = guard;
        pending::<()>().await;
    };
    let script = async {
        look(&mut server, &lease("", 0)).await;
        claim(&mut server).await.answer(&lease("me", 1));
        look(&mut server, &lease("other", 2)).await;
    };
    let (result, ()) = tokio::join!(candidate.lead(act, CancellationToken::new()), script);
    assert!(result.is_err() && acting.is_cancelled());
}

#[tokio::test(start_paused = true)]
async fn one_that_stands_by_stops_without_having_acted() {
    let (candidate, mut server) = candidate();
    let stop = CancellationToken::new();
    let script = async {
        look(&mut server, &lease("other", 0)).await;
        stop.cancel();
    };
    let act = async { panic!("acted without the lease") };
    let (result, ()) = tokio::join!(candidate.lead(act, stop.clone()), script);
    result.unwrap();
}
