//! How slowly one client takes its answers.

use std::time::Duration;

use tokio::time::Instant;

/// Bytes that a client takes at least while it keeps all its answers waiting for
/// [`Timeouts::write`](super::Timeouts::write) in all: half a KiB a second, slower than any link in use. One
/// that takes them in drops, or one small answer after another, is cut as one that takes nothing.
const PACE_BYTES: usize = 16 << 10;

/// Time that has passed while something was so.
#[derive(Clone, Copy, Debug, Default)]
struct Stopwatch {
    since: Option<Instant>,
    before: Duration,
}

impl Stopwatch {
    fn run(&mut self, runs: bool, now: Instant) {
        match (self.since, runs) {
            (None, true) => self.since = Some(now),
            (Some(since), false) => {
                self.before += now.saturating_duration_since(since);
                self.since = None;
            }
            _ => {}
        }
    }

    fn restart(&mut self, now: Instant) {
        *self = Self { since: self.since.map(|_| now), before: Duration::ZERO };
    }

    fn elapsed(&self, now: Instant) -> Duration {
        self.before
            + self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }
}

/// What a client has taken, and how long it kept the server waiting for that.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// While everything that is here waits for the client.
    waiting: Stopwatch,
    /// While anything is open.
    open: Stopwatch,
    taken_bytes: usize,
}

impl Pace {
    /// Bytes were taken; enough of them, and the count begins anew.
    pub(super) fn taken(&mut self, bytes: usize, now: Instant) {
        self.taken_bytes = self.taken_bytes.saturating_add(bytes);
        if self.taken_bytes >= PACE_BYTES {
            self.taken_bytes = 0;
            self.waiting.restart(now);
            self.open.restart(now);
        }
    }

    /// Whether anything is open from now on, and whether all that is here waits for the client.
    pub(super) fn changed(&mut self, open: bool, all_wait: bool, now: Instant) {
        self.open.run(open, now);
        self.waiting.run(open && all_wait, now);
    }

    /// When it has kept the server waiting for `limit` in all, if it goes on so.
    pub(super) fn until(&self, limit: Duration) -> Option<Instant> {
        Some(self.waiting.since? + limit.saturating_sub(self.waiting.before))
    }

    /// How long it has kept the server waiting, if it did so for half of the time or more: one that reads
    /// as we compute never does, however long that takes.
    pub(super) fn stalled(&self, now: Instant) -> Duration {
        let waited = self.waiting.elapsed(now);
        match waited * 2 >= self.open.elapsed(now) {
            true => waited,
            false => Duration::ZERO,
        }
    }
}
