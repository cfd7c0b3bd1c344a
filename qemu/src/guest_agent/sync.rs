//! The delimited sync: how a stream of answers without ids gets back into step.

use std::hash::{BuildHasher, Hasher, RandomState};

use serde_json::json;
use tokio::net::UnixStream;

use crate::codec::{self, Incoming, Message};
use crate::error::Result;

const DELIMITER: u8 = 0xFF;

/// `{"return": N}` is at most some tens of bytes; more behind a delimiter is not the answer to a sync.
const MAX_ANSWER: usize = 4096;

/// The bytes of a sync and the id that its answer must carry.
pub(super) fn request() -> Result<(Vec<u8>, u64)> {
    let id = fresh_id();
    let mut bytes = vec![DELIMITER];
    bytes.extend_from_slice(&codec::encode("guest-sync-delimited", json!({ "id": id }), None)?);
    Ok((bytes, id))
}

/// An id that no earlier client on this channel has used: its late answer would pass for ours. The standard library's
/// hasher is keyed by the operating system's random numbers. JSON numbers are exact up to 2^53.
fn fresh_id() -> u64 {
    RandomState::new().build_hasher().finish() & ((1 << 53) - 1)
}

/// Drops everything up to a delimiter that is followed by our id.
///
/// The agent's complaint about our own delimiter comes first, and before it whatever earlier clients left unread. None of
/// it is kept, so its length does not matter.
pub(super) async fn discard_until(id: u64, incoming: &mut Incoming, stream: &UnixStream) -> Result<()> {
    loop {
        while let Some(candidate) = next_candidate(incoming) {
            if answered_id(&candidate) == Some(id) {
                return Ok(());
            }
        }
        incoming.fill(stream).await?;
    }
}

/// What stands between a delimiter and the end of its line, once it is all there.
fn next_candidate(incoming: &mut Incoming) -> Option<Vec<u8>> {
    loop {
        let Some(start) = incoming.buffer.iter().position(|&byte| byte == DELIMITER) else {
            incoming.discard(incoming.buffer.len());
            return None;
        };
        incoming.discard(start);
        let rest = &incoming.buffer[1..];
        let end = rest.iter().take(MAX_ANSWER).position(|&byte| byte == b'\n' || byte == DELIMITER);
        match end {
            // Another delimiter before the end of the line: what came between was cut off.
            Some(end) if rest[end] == DELIMITER => incoming.discard(end + 1),
            Some(end) => {
                let candidate = rest[..end].to_vec();
                incoming.discard(end + 2);
                return Some(candidate);
            }
            None if rest.len() >= MAX_ANSWER => incoming.discard(1),
            None => return None,
        }
    }
}

fn answered_id(line: &[u8]) -> Option<u64> {
    // Not an answer, or an error: not our sync, and dropped like all the rest.
    let answer = Message::parse(line).ok()?.answer()?.ok()?;
    answer.get().parse().ok()
}
