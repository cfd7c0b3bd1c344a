use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::{FreezeStatus, GuestAgent, MAX_LINE};
use crate::error::Error;
use crate::fake::{FakeAgent, Reaction};

const SOON: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(30);

/// The agent's side, played by the test.
struct Peer {
    stream: UnixStream,
}

impl Peer {
    /// The next line, with a leading 0xFF taken off and told.
    async fn hear(&mut self) -> (bool, Value) {
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            line.push(self.stream.read_u8().await.unwrap());
        }
        let delimited = line[0] == 0xFF;
        (delimited, serde_json::from_slice(&line[usize::from(delimited)..]).unwrap())
    }

    async fn say(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// Answers a sync as qemu-ga does: the complaint about the 0xFF first.
    async fn answer_sync(&mut self) {
        let (delimited, request) = self.hear().await;
        assert!(delimited);
        assert_eq!(request["execute"], "guest-sync-delimited");
        self.say(b"{\"error\":{\"class\":\"GenericError\",\"desc\":\"JSON parse error, stray '\\uFFFD'\"}}\n\xff")
            .await;
        self.say(format!("{{\"return\": {}}}\n", request["arguments"]["id"]).as_bytes()).await;
    }

    async fn answer(&mut self, command: &str, value: impl Into<Value>) {
        let (_, request) = self.hear().await;
        assert_eq!(request["execute"], command);
        self.say(format!("{}\n", json!({ "return": value.into() })).as_bytes()).await;
    }
}

fn pair() -> (GuestAgent, Peer) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (GuestAgent::new(ours), Peer { stream: theirs })
}

#[tokio::test]
async fn the_first_call_syncs_and_the_second_does_not() {
    let (mut agent, mut peer) = pair();
    let (status, ()) = tokio::join!(agent.fsfreeze_status(SOON), async {
        peer.answer_sync().await;
        peer.answer("guest-fsfreeze-status", "thawed").await;
    });
    assert_eq!(status.unwrap(), FreezeStatus::Thawed);
    let (count, ()) = tokio::join!(agent.freeze(&[], SOON), peer.answer("guest-fsfreeze-freeze", 3));
    assert_eq!(count.unwrap(), 3);
}

#[tokio::test]
async fn a_freeze_that_comes_true_after_its_timeout_is_thawed() {
    let (mut agent, mut peer) = pair();
    let (first, ()) = tokio::join!(agent.freeze(&[], SHORT), peer.answer_sync());
    assert!(matches!(first, Err(Error::Timeout { .. })));
    assert!(agent.needs_sync());
    // The ghost: the agent was busy, and only now answers the freeze.
    let (thawed, ()) = tokio::join!(agent.thaw(SOON), async {
        peer.answer("guest-fsfreeze-freeze", 7).await;
        peer.answer_sync().await;
        peer.answer("guest-fsfreeze-thaw", 2).await;
    });
    assert_eq!(thawed.unwrap(), 2);
    assert!(!agent.needs_sync());
}

#[tokio::test]
async fn a_thaw_out_of_step_leaves_with_its_sync_even_if_nobody_answers() {
    let (mut agent, mut peer) = pair();
    assert!(matches!(agent.thaw(SHORT).await, Err(Error::Timeout { .. })));
    drop(agent);
    assert_eq!(peer.hear().await.1["execute"], "guest-sync-delimited");
    assert_eq!(peer.hear().await.1["execute"], "guest-fsfreeze-thaw");
}

#[tokio::test]
async fn a_freeze_never_leaves_before_the_agent_has_shown_life() {
    let (mut agent, mut peer) = pair();
    assert!(matches!(agent.freeze(&[], SHORT).await, Err(Error::Timeout { .. })));
    drop(agent);
    let mut seen = Vec::new();
    peer.stream.read_to_end(&mut seen).await.unwrap();
    assert!(!String::from_utf8_lossy(&seen).contains("freeze"));
}

#[tokio::test]
async fn whatever_an_earlier_client_left_is_discarded_by_the_sync() {
    let rubbish: [&[u8]; 7] = [
        b"{\"return\":1}\n{\"return\":{}}\n",
        b"{\"return\": 12345}\n\xff{\"return\": 12345}\n",
        b"\xff\xff\xff\xff\n\n\xff\n",
        b"{\"ret",
        b"\xff{\"return\":",
        b"\xffnot json at all\n\xff[[[[\n\xff{\"return\":\"text\"}\n",
        b"\xff{\"error\":{\"class\":\"GenericError\",\"desc\":\"x\"}}\n",
    ];
    for left in rubbish {
        let (mut agent, mut peer) = pair();
        peer.say(left).await;
        let (synced, ()) = tokio::join!(agent.sync(SOON), peer.answer_sync());
        synced.unwrap();
        let (status, ()) = tokio::join!(agent.fsfreeze_status(SOON), peer.answer("guest-fsfreeze-status", "frozen"));
        assert_eq!(status.unwrap(), FreezeStatus::Frozen);
    }
}

#[tokio::test]
async fn a_flood_before_the_sync_is_discarded_in_bounded_memory() {
    for filler in [b'x', 0xFF, b'\n'] {
        let (mut agent, mut peer) = pair();
        let script = async {
            peer.say(&vec![filler; 3 * MAX_LINE]).await;
            peer.say(b"\xff").await;
            peer.say(&vec![b' '; 3 * MAX_LINE]).await;
            peer.answer_sync().await;
        };
        let (synced, ()) = tokio::join!(agent.sync(SOON), script);
        synced.unwrap();
        assert!(agent.incoming.buffer.capacity() < 4 * MAX_LINE);
    }
}

#[tokio::test]
async fn an_answer_without_end_is_refused_and_the_next_call_syncs() {
    let (mut agent, mut peer) = pair();
    let (status, ()) = tokio::join!(agent.fsfreeze_status(SOON), async {
        peer.answer_sync().await;
        peer.hear().await;
        peer.say(&vec![b'['; MAX_LINE + 100_000]).await;
    });
    assert!(matches!(status, Err(Error::Protocol { .. })));
    let (thawed, ()) = tokio::join!(agent.thaw(SOON), async {
        peer.answer_sync().await;
        peer.answer("guest-fsfreeze-thaw", 0).await;
    });
    assert_eq!(thawed.unwrap(), 0);
}

#[tokio::test]
async fn answers_that_are_none_leave_the_stream_out_of_step() {
    let deep = format!("{{\"return\":{}{}}}\n", "[".repeat(200_000), "]".repeat(200_000));
    let wrong: [&[u8]; 7] = [
        b"{}\n",
        b"nonsense\n",
        b"{\"return\":-1}\n",
        b"{\"return\":1e99}\n",
        b"\xff{\"return\":1}\n",
        b"\0\n",
        deep.as_bytes(),
    ];
    for answer in wrong {
        let (mut agent, mut peer) = pair();
        let (count, ()) = tokio::join!(agent.freeze(&[], SOON), async {
            peer.answer_sync().await;
            peer.hear().await;
            peer.say(answer).await;
        });
        assert!(matches!(count, Err(Error::Protocol { .. } | Error::Decode { .. })), "{count:?}");
        assert!(agent.needs_sync());
    }
}

#[tokio::test]
async fn an_unknown_freeze_status_proves_nothing() {
    let agent = FakeAgent::new(1);
    agent.react("guest-fsfreeze-status", Reaction::Return(json!("half-frozen")));
    let status = GuestAgent::new(agent.connect().unwrap()).fsfreeze_status(SOON).await;
    assert!(matches!(status, Err(Error::Decode { .. })));
}

#[tokio::test]
async fn a_second_answer_to_one_command_is_not_taken_for_the_next_ones() {
    let (mut agent, mut peer) = pair();
    let (count, ()) = tokio::join!(agent.freeze(&[], SOON), async {
        peer.answer_sync().await;
        peer.hear().await;
        peer.say(b"{\"return\":3}\n{\"return\":9}\n").await;
    });
    assert_eq!(count.unwrap(), 3);
    let (thawed, ()) = tokio::join!(agent.thaw(SOON), async {
        peer.answer_sync().await;
        peer.answer("guest-fsfreeze-thaw", 3).await;
    });
    assert_eq!(thawed.unwrap(), 3);
}

#[tokio::test]
async fn a_second_answer_that_was_not_read_yet_is_not_taken_for_the_next_ones() {
    let (mut agent, mut peer) = pair();
    let (synced, ()) = tokio::join!(agent.sync(SOON), peer.answer_sync());
    synced.unwrap();
    peer.say(b"{\"return\":9}\n").await;
    let (thawed, ()) = tokio::join!(agent.thaw(SOON), async {
        peer.answer_sync().await;
        peer.answer("guest-fsfreeze-thaw", 3).await;
    });
    assert_eq!(thawed.unwrap(), 3);
}

#[tokio::test]
async fn a_delimiter_that_cuts_off_half_an_answer_still_counts() {
    let (mut agent, mut peer) = pair();
    let (synced, ()) = tokio::join!(agent.sync(SOON), async {
        let (_, request) = peer.hear().await;
        peer.say(format!("{{\"return\": {}}}\n", request["arguments"]["id"]).as_bytes()).await;
        peer.say(b"\xff{\"return\":\xff").await;
        peer.say(format!("{{\"return\": {}}}\n", request["arguments"]["id"]).as_bytes()).await;
    });
    synced.unwrap();
}

#[tokio::test]
async fn an_answer_may_arrive_one_byte_at_a_time() {
    let (mut agent, mut peer) = pair();
    let script = async {
        let (_, request) = peer.hear().await;
        let id = &request["arguments"]["id"];
        for byte in [&b"{\"error\":{}}\n\xff"[..], format!("{{\"return\": {id}}}\n").as_bytes()].concat() {
            peer.say(&[byte]).await;
            tokio::task::yield_now().await;
        }
    };
    let (synced, ()) = tokio::join!(agent.sync(SOON), script);
    synced.unwrap();
}

#[tokio::test]
async fn a_call_dropped_half_way_leaves_the_stream_out_of_step() {
    let (mut agent, mut peer) = pair();
    let (synced, ()) = tokio::join!(agent.sync(SOON), peer.answer_sync());
    synced.unwrap();
    drop(tokio::time::timeout(SHORT, agent.freeze(&[], SOON)).await);
    assert!(agent.needs_sync());
}

#[tokio::test]
async fn a_channel_that_nobody_reads_costs_a_call_its_timeout() {
    let (mut agent, _peer) = pair();
    let huge = vec!["/mnt".repeat(1000); 1000];
    // Out of step, so in the end the sync itself finds no room.
    for _ in 0..3 {
        let filler = super::codec::encode("filler", json!({ "x": huge }), None).unwrap();
        let deadline = super::deadline_after(SHORT);
        let blocked = agent.write(&filler, "filler", SHORT, deadline).await;
        assert!(matches!(blocked, Err(Error::Timeout { .. })), "{blocked:?}");
    }
    assert!(matches!(agent.sync(SHORT).await, Err(Error::Timeout { .. })));
    assert!(matches!(agent.thaw(SHORT).await, Err(Error::Timeout { .. })));
}

#[tokio::test]
async fn an_agent_that_disconnects_at_any_step_fails_the_call_at_once() {
    for (command, reaction) in [
        ("guest-sync-delimited", Reaction::DisconnectBefore),
        ("guest-sync-delimited", Reaction::DisconnectAfter),
        ("guest-fsfreeze-freeze", Reaction::DisconnectBefore),
        ("guest-fsfreeze-freeze", Reaction::DisconnectAfter),
    ] {
        let fake = FakeAgent::new(2);
        fake.react(command, reaction.clone());
        let mut agent = GuestAgent::new(fake.connect().unwrap());
        assert!(matches!(agent.freeze(&[], SOON).await, Err(Error::Closed)), "{command}");
        assert!(matches!(agent.freeze(&[], SOON).await, Err(Error::Closed)), "{command}, again");
        assert_eq!(fake.is_frozen(), command == "guest-fsfreeze-freeze" && reaction == Reaction::DisconnectAfter);
    }
}

#[tokio::test]
async fn a_refusal_keeps_the_stream_in_step() {
    let fake = FakeAgent::new(2);
    let mut agent = GuestAgent::new(fake.connect().unwrap());
    assert_eq!(agent.freeze(&[], SOON).await.unwrap(), 2);
    assert!(agent.filesystems(SOON).await.unwrap_err().is_command_not_found());
    assert!(!agent.needs_sync());
    assert_eq!(agent.fsfreeze_status(SOON).await.unwrap(), FreezeStatus::Frozen);
    assert_eq!(agent.thaw(SOON).await.unwrap(), 2);
}

#[tokio::test]
async fn a_guest_tells_its_file_systems_commands_and_exit_codes() {
    let fake = FakeAgent::new(2);
    fake.exit_with(3);
    let mut agent = GuestAgent::new(fake.connect().unwrap());
    assert_eq!(agent.filesystems(SOON).await.unwrap()[1].mountpoint, "/mnt/1");
    let info = agent.info(SOON).await.unwrap();
    assert!(info.enabled("guest-exec") && !info.enabled("guest-shutdown"));
    assert_eq!(agent.exec("/bin/sync", &["-f"], SOON).await.unwrap(), 3);
    assert_eq!(agent.freeze(&["/mnt/0".into()], SOON).await.unwrap(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_program_that_does_not_end_costs_the_call_its_timeout_and_not_the_stream() {
    let fake = FakeAgent::new(1);
    fake.react("guest-exec-status", Reaction::Return(json!({ "exited": false })));
    let mut agent = GuestAgent::new(fake.connect().unwrap());
    assert!(matches!(agent.exec("/bin/sleep", &["9999"], SOON).await, Err(Error::Timeout { .. })));
    fake.behave();
    assert_eq!(agent.fsfreeze_status(SOON).await.unwrap(), FreezeStatus::Thawed);
}

#[tokio::test]
async fn the_fake_freezes_late_after_its_client_gave_up() {
    let fake = FakeAgent::new(2);
    fake.react_once("guest-fsfreeze-freeze", Reaction::Late(Duration::from_millis(200)));
    let mut agent = GuestAgent::new(fake.connect().unwrap());
    assert!(matches!(agent.freeze(&[], SHORT).await, Err(Error::Timeout { .. })));
    assert_eq!(agent.thaw(SOON).await.unwrap(), 2);
    assert!(!fake.is_frozen());
}
