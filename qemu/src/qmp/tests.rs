use std::io::{BufRead, BufReader, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::broadcast::error::RecvError;

use super::{Event, MAX_LINE, Qmp};
use crate::error::Error;
use crate::fake::{FakeQemu, Reaction};

const GREETING: &str =
    r#"{"QMP":{"version":{"qemu":{"micro":22,"minor":2,"major":7},"package":"x"},"capabilities":["oob"],"new":1}}"#;
const SOON: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(30);

/// The monitor's side of a connection, played by the test.
struct Peer {
    stream: UnixStream,
}

impl Peer {
    async fn say(&mut self, text: &str) {
        self.stream.write_all(format!("{text}\r\n").as_bytes()).await.unwrap();
    }

    async fn hear(&mut self) -> Value {
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            line.push(self.stream.read_u8().await.unwrap());
        }
        serde_json::from_slice(&line).unwrap()
    }

    /// Answers the next command and tells which it was.
    async fn answer(&mut self, value: Value) -> Value {
        let request = self.hear().await;
        self.say(&json!({ "return": value, "id": request["id"] }).to_string()).await;
        request
    }
}

async fn connected() -> (Qmp, Peer) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut peer = Peer { stream: theirs };
    peer.say(GREETING).await;
    let (qmp, request) = tokio::join!(Qmp::connect(ours, SOON), peer.answer(json!({})));
    assert_eq!(request["execute"], "qmp_capabilities");
    assert_eq!(request.get("arguments"), None);
    (qmp.unwrap(), peer)
}

async fn execute(qmp: &Qmp, command: &str, timeout: Duration) -> Result<Value, Error> {
    qmp.execute(command, (), timeout).await
}

#[tokio::test]
async fn an_event_before_the_greeting_is_no_breach_of_the_protocol() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut peer = Peer { stream: theirs };
    peer.say(r#"{"event":"RESUME","timestamp":{"seconds":1,"microseconds":2}}"#).await;
    peer.say(GREETING).await;
    let (qmp, _) = tokio::join!(Qmp::connect(ours, SOON), peer.answer(json!({})));
    assert_eq!(qmp.unwrap().version(), "7.2.22");
}

#[tokio::test]
async fn greeting_and_capabilities_make_a_connection() {
    let (qmp, _peer) = connected().await;
    assert_eq!(qmp.version(), "7.2.22");
    assert!(!qmp.is_closed());
}

#[tokio::test]
async fn a_monitor_that_sends_no_greeting_is_busy() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    assert!(matches!(Qmp::connect(ours, SHORT).await, Err(Error::Busy)));
}

#[tokio::test]
async fn a_peer_that_does_not_greet_like_a_monitor_is_refused() {
    for wrong in [r#"{"return":{}}"#, "hello", r#"{"QMP":{"version":7}}"#, r#"{"QMP":null}"#, "[]", "\u{0}"] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        Peer { stream: theirs }.say(wrong).await;
        let refused = Qmp::connect(ours, SOON).await.unwrap_err();
        assert!(matches!(refused, Error::Protocol { .. }), "{wrong}: {refused:?}");
    }
}

#[tokio::test]
async fn a_late_reply_does_not_confuse_the_next_call() {
    let (qmp, mut peer) = connected().await;
    assert!(matches!(execute(&qmp, "first", SHORT).await, Err(Error::Timeout { .. })));
    let late = peer.hear().await;
    let second = tokio::spawn(async move { execute(&qmp, "second", SOON).await });
    let request = peer.hear().await;
    peer.say(&json!({ "return": "late", "id": late["id"] }).to_string()).await;
    peer.say(&json!({ "return": "right", "id": request["id"] }).to_string()).await;
    assert_eq!(second.await.unwrap().unwrap(), "right");
}

#[tokio::test]
async fn duplicate_unknown_and_anonymous_replies_are_ignored() {
    let (qmp, mut peer) = connected().await;
    let (first, request) = tokio::join!(execute(&qmp, "first", SOON), peer.answer(json!(1)));
    assert_eq!(first.unwrap(), 1);
    let id = &request["id"];
    for id in [id.clone(), json!(777), json!("text"), json!({ "deep": [1] }), json!(-1), json!(null), json!(1e300)] {
        peer.say(&json!({ "return": "wrong", "id": id }).to_string()).await;
    }
    peer.say(r#"{"return":"nobody's"}"#).await;
    peer.say(r#"{"something":"new"}"#).await;
    peer.say("").await;
    let (second, _) = tokio::join!(execute(&qmp, "second", SOON), peer.answer(json!(2)));
    assert_eq!(second.unwrap(), 2);
}

#[tokio::test]
async fn answers_may_come_in_any_order() {
    let (qmp, mut peer) = connected().await;
    let script = async {
        let (one, two) = (peer.hear().await, peer.hear().await);
        for request in [two, one] {
            peer.say(&json!({ "return": request["execute"], "id": request["id"] }).to_string()).await;
        }
    };
    let (a, b, ()) = tokio::join!(execute(&qmp, "a", SOON), execute(&qmp, "b", SOON), script);
    assert_eq!((a.unwrap(), b.unwrap()), (json!("a"), json!("b")));
}

#[tokio::test]
async fn events_are_kept_also_unknown_ones_and_bad_ones_are_skipped() {
    let (qmp, mut peer) = connected().await;
    let mut events = qmp.events();
    peer.say(r#"{"event":"STOP","timestamp":{"seconds":3,"microseconds":7}}"#).await;
    peer.say(&format!(r#"{{"event":"DEEP","data":{}1{}}}"#, "[".repeat(500), "]".repeat(500))).await;
    peer.say(&format!(r#"{{"event":"BIG","data":"{}"}}"#, "x".repeat(20_000))).await;
    peer.say(
        r#"{"event":"FROM_THE_FUTURE","data":{"a":[1]},"extra":true,"timestamp":{"seconds":9223372036854775807}}"#,
    )
    .await;
    assert_eq!(events.recv().await.unwrap(), Event { name: "STOP".into(), data: Value::Null, micros: 3_000_007 });
    let unknown = events.recv().await.unwrap();
    assert_eq!((unknown.name.as_str(), unknown.data["a"][0].as_i64()), ("FROM_THE_FUTURE", Some(1)));
    drop(peer);
    assert!(matches!(events.recv().await, Err(RecvError::Closed)));
    assert!(matches!(qmp.events().recv().await, Err(RecvError::Closed)));
}

#[tokio::test]
async fn a_line_of_eleven_mebibytes_ends_the_connection_and_the_call() {
    let (qmp, mut peer) = connected().await;
    let flood = tokio::spawn(async move {
        let chunk = vec![b'['; 1024 * 1024];
        for _ in 0..11 {
            // The client hangs up in the middle.
            if peer.stream.write_all(&chunk).await.is_err() {
                return;
            }
        }
    });
    assert!(matches!(execute(&qmp, "query-block", SOON).await, Err(Error::Protocol { .. })));
    assert!(qmp.is_closed());
    assert!(matches!(execute(&qmp, "query-block", SOON).await, Err(Error::Protocol { .. })));
    flood.await.unwrap();
}

#[tokio::test]
async fn a_line_just_below_the_limit_is_read() {
    let (qmp, mut peer) = connected().await;
    let script = async {
        let id = peer.hear().await["id"].clone();
        let text = "x".repeat(MAX_LINE - 64);
        peer.say(&format!(r#"{{"return":"{text}","id":{id}}}"#)).await;
    };
    let (answer, ()) = tokio::join!(execute(&qmp, "query-qmp-schema", SOON), script);
    assert_eq!(answer.unwrap().as_str().map(str::len), Some(MAX_LINE - 64));
}

#[tokio::test]
async fn deep_nesting_fails_the_call_and_not_the_process() {
    let (qmp, mut peer) = connected().await;
    let depth = 1_000_000;
    let script = async {
        let id = peer.hear().await["id"].clone();
        peer.say(&format!(r#"{{"return":{}{},"id":{id}}}"#, "[".repeat(depth), "]".repeat(depth))).await;
    };
    let (answer, ()) = tokio::join!(execute(&qmp, "query-block", SOON), script);
    assert!(matches!(answer, Err(Error::Decode { .. })));
    let (next, _) = tokio::join!(execute(&qmp, "next", SOON), peer.answer(json!(2)));
    assert_eq!(next.unwrap(), 2);
}

#[tokio::test]
async fn deep_nesting_in_any_member_is_survived() {
    for member in ["id", "error", "event", "data", "timestamp", "QMP", "unknown"] {
        let (qmp, mut peer) = connected().await;
        peer.say(&format!(r#"{{"{member}":{}{}}}"#, "[".repeat(300_000), "]".repeat(300_000))).await;
        drop(peer);
        // Nobody answers: closed, or found to be broken; but an end, without a panic.
        assert!(execute(&qmp, "anything", SOON).await.is_err(), "{member}");
    }
}

#[tokio::test]
async fn an_answer_may_arrive_one_byte_at_a_time() {
    let (qmp, mut peer) = connected().await;
    let script = async {
        let id = peer.hear().await["id"].clone();
        for byte in format!("{{\"return\":\"\\u00e9é\",\"id\":{id}}}\n").bytes() {
            peer.stream.write_u8(byte).await.unwrap();
            tokio::task::yield_now().await;
        }
    };
    let (answer, ()) = tokio::join!(execute(&qmp, "slow", SOON), script);
    assert_eq!(answer.unwrap(), "éé");
}

#[tokio::test]
async fn a_refusal_carries_class_and_words_and_is_cut_to_size() {
    let (qmp, mut peer) = connected().await;
    let script = async {
        let id = peer.hear().await["id"].clone();
        let desc = "é".repeat(100_000);
        peer.say(&json!({ "error": { "class": "CommandNotFound", "desc": desc }, "id": id }).to_string()).await;
    };
    let (answer, ()) = tokio::join!(execute(&qmp, "new-thing", SOON), script);
    let error = answer.unwrap_err();
    assert!(error.is_command_not_found());
    assert!(error.to_string().len() < 3000);
}

#[tokio::test]
async fn an_answer_of_null_is_an_answer() {
    let (qmp, mut peer) = connected().await;
    let (answer, _) = tokio::join!(execute(&qmp, "odd", SOON), peer.answer(Value::Null));
    assert_eq!(answer.unwrap(), Value::Null);
}

#[tokio::test]
async fn a_monitor_that_disconnects_at_any_step_fails_the_call_at_once() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    assert!(matches!(Qmp::connect(ours, SOON).await, Err(Error::Closed)), "before the greeting");

    let (ours, theirs) = UnixStream::pair().unwrap();
    Peer { stream: theirs }.say(GREETING).await;
    assert!(matches!(Qmp::connect(ours, SOON).await, Err(Error::Closed)), "after the greeting");

    let (qmp, mut peer) = connected().await;
    let (answer, ()) = tokio::join!(execute(&qmp, "half", SOON), async move {
        peer.hear().await;
        peer.stream.write_all(br#"{"return":{"#).await.unwrap();
    });
    assert!(matches!(answer, Err(Error::Closed)), "in the middle of an answer");
    assert!(matches!(execute(&qmp, "after", SOON).await, Err(Error::Closed)), "after that");
}

#[tokio::test]
async fn a_monitor_that_stops_reading_costs_the_call_its_timeout_and_nothing_is_sent_later() {
    let (qmp, mut peer) = connected().await;
    let filler = "x".repeat(4 * 1024 * 1024);
    let blocked = qmp.execute::<Value>("blocked", json!({ "filler": filler }), SHORT).await;
    assert!(matches!(blocked, Err(Error::Timeout { .. } | Error::Protocol { .. })), "{blocked:?}");
    let next = execute(&qmp, "stop", SHORT).await;
    assert!(matches!(next, Err(Error::Timeout { .. } | Error::Protocol { .. })), "{next:?}");
    let mut seen = Vec::new();
    peer.stream.read_to_end(&mut seen).await.unwrap();
    assert!(!seen.contains(&b'\n'), "half a command must never be completed");
}

#[tokio::test]
async fn a_dropped_call_leaves_nothing_behind() {
    let (qmp, mut peer) = connected().await;
    drop(tokio::time::timeout(SHORT, execute(&qmp, "dropped", SOON)).await);
    assert!(qmp.inner.link.state().waiting.is_empty());
    peer.answer(json!("late")).await;
    let (next, _) = tokio::join!(execute(&qmp, "next", SOON), peer.answer(json!(2)));
    assert_eq!(next.unwrap(), 2);
}

#[tokio::test]
async fn dropping_the_last_handle_closes_the_socket_also_when_a_duplicate_is_open() {
    let (qmp, mut peer) = connected().await;
    let duplicate = qmp.stream_fd().try_clone_to_owned().unwrap();
    let second = qmp.clone();
    drop(qmp);
    assert!(!second.is_closed());
    drop(second);
    assert_eq!(peer.stream.read(&mut [0; 1]).await.unwrap(), 0);
    drop(duplicate);
}

#[tokio::test]
async fn a_descriptor_travels_with_its_command() {
    let (qmp, peer) = connected().await;
    let peer = peer.stream.into_std().unwrap();
    peer.set_nonblocking(false).unwrap();
    let (file, mut written) = (tempfile::tempfile().unwrap(), String::new());
    let receiver = tokio::task::spawn_blocking(move || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut first = [0_u8; 1];
        rustix::net::recvmsg(peer.as_fd(), &mut [IoSliceMut::new(&mut first)], &mut control, RecvFlags::empty())
            .unwrap();
        let fds = control.drain().map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.count(),
            _ => 0,
        });
        let count: usize = fds.sum();
        BufReader::new(&peer).read_line(&mut written).unwrap();
        let request: Value = serde_json::from_str(&format!("{}{written}", first[0] as char)).unwrap();
        std::io::Write::write_all(&mut &peer, format!("{}\n", json!({ "return": {}, "id": request["id"] })).as_bytes())
            .unwrap();
        (count, request)
    });
    qmp.add_fd(7, "rdwr", file.as_fd(), SOON).await.unwrap();
    let (count, request) = receiver.await.unwrap();
    assert_eq!(count, 1);
    assert_eq!(request["arguments"], json!({ "fdset-id": 7, "opaque": "rdwr" }));
}

#[tokio::test]
async fn a_timeout_without_end_does_not_overflow() {
    let (qmp, mut peer) = connected().await;
    let (answer, _) = tokio::join!(execute(&qmp, "patient", Duration::MAX), peer.answer(json!(1)));
    assert_eq!(answer.unwrap(), 1);
}

#[tokio::test]
async fn quitting_succeeds_when_qemu_is_gone_before_it_answers() {
    let fake = FakeQemu::new();
    fake.react("quit", Reaction::DisconnectAfter);
    let qmp = Qmp::connect(fake.connect().unwrap(), SOON).await.unwrap();
    qmp.quit(SOON).await.unwrap();
    assert_eq!(fake.command_names(), ["qmp_capabilities", "quit"]);
}

#[tokio::test]
async fn the_schema_is_asked_for_once() {
    let fake = FakeQemu::new();
    let entries = json!([
        { "name": "stop", "meta-type": "command", "arg-type": "0" },
        { "name": "STOP", "meta-type": "event" },
        { "name": "0", "meta-type": "from-the-future", "members": [] },
    ]);
    fake.react("query-qmp-schema", Reaction::Return(entries));
    let qmp = Qmp::connect(fake.connect().unwrap(), SOON).await.unwrap();
    assert!(qmp.query_schema_has("stop", SOON).await.unwrap());
    assert!(!qmp.query_schema_has("STOP", SOON).await.unwrap());
    assert_eq!(fake.command_names(), ["qmp_capabilities", "query-qmp-schema"]);
}
