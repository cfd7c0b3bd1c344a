//! What the guest's application sees: each record it has made durable on both disks comes here as one line.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// One record, durable on both disks when it was sent.
#[derive(Clone, Copy, Debug)]
pub struct Beat {
    /// When it arrived here.
    pub at: Instant,
    /// Number of the record.
    pub record: u64,
    /// The guest's monotonic clock when it was sent.
    pub guest_clock: Duration,
}

/// The beats of one guest, collected by a thread that ends when QEMU does.
#[derive(Clone, Debug)]
pub struct Heartbeat {
    beats: Arc<Mutex<Vec<Beat>>>,
}

impl Heartbeat {
    /// Listens on QEMU's end of the heartbeat port.
    pub(crate) fn listen(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).with_context(|| format!("connecting to {}", path.display()))?;
        let heartbeat = Self { beats: Arc::default() };
        let beats = Arc::clone(&heartbeat.beats);
        std::thread::spawn(move || {
            // An error of the socket is its end, as QEMU's death is.
            for line in BufReader::new(stream).lines().map_while(std::io::Result::ok) {
                lock(&beats).extend(parse(&line));
            }
        });
        Ok(heartbeat)
    }

    /// All beats so far.
    #[must_use]
    pub fn beats(&self) -> Vec<Beat> {
        lock(&self.beats).clone()
    }

    /// Number of the last record known durable on both disks; 0 before the first.
    #[must_use]
    pub fn records_written(&self) -> u64 {
        lock(&self.beats).last().map_or(0, |beat| beat.record)
    }

    /// The longest time without a beat from `since` until now, on the host's clock: how long the application stood still.
    ///
    /// It counts from the last beat before `since`, and a guest that stands still right now counts until now.
    #[must_use]
    pub fn gap(&self, since: Instant) -> Duration {
        let beats = lock(&self.beats);
        let first = beats.partition_point(|beat| beat.at < since).saturating_sub(1);
        let times = beats[first..].iter().map(|beat| beat.at).chain([Instant::now()]);
        let mut previous = None;
        let gaps = times.map(|at| at.saturating_duration_since(previous.replace(at).unwrap_or(at.min(since))));
        gaps.max().unwrap_or_default()
    }
}

fn lock(beats: &Mutex<Vec<Beat>>) -> MutexGuard<'_, Vec<Beat>> {
    beats.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A line may be cut in half where the guest's port was full: such a one is no beat.
fn parse(line: &str) -> Option<Beat> {
    let (record, nanoseconds) = line.split_once(' ')?;
    let guest_clock = Duration::from_nanos(nanoseconds.parse().ok()?);
    Some(Beat { at: Instant::now(), record: record.parse().ok()?, guest_clock })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ago(seconds: u64) -> Instant {
        Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap()
    }

    fn heartbeat(seconds_ago: &[u64]) -> Heartbeat {
        let beat = |seconds: &u64| Beat { at: ago(*seconds), record: 1, guest_clock: Duration::ZERO };
        Heartbeat { beats: Arc::new(Mutex::new(seconds_ago.iter().map(beat).collect())) }
    }

    #[test]
    fn the_gap_counts_from_the_last_beat_before_the_start() {
        let gap = heartbeat(&[100, 90, 20, 15, 10]).gap(ago(50));
        assert!(gap.abs_diff(Duration::from_secs(70)) < Duration::from_secs(1), "{gap:?}");
    }

    #[test]
    fn a_guest_that_stands_still_counts_until_now() {
        let gap = heartbeat(&[100, 99, 60]).gap(ago(98));
        assert!(gap.abs_diff(Duration::from_secs(60)) < Duration::from_secs(1), "{gap:?}");
    }

    #[test]
    fn half_a_line_is_no_beat() {
        assert!(parse("12").is_none());
        assert!(parse("12 3x").is_none());
        assert_eq!(parse("12 34").map(|beat| beat.record), Some(12));
    }
}
