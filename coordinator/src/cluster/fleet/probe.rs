//! When one worker is asked whether it lives and what it holds.

use std::time::Duration;

use super::super::{PROBE_TIMEOUT, backoff};
use crate::tick::Tick;

/// Between two probes of a worker that is watched.
pub(super) const PROBE_INTERVAL: Duration = Duration::from_millis(500);

/// The probes of one process start.
#[derive(Debug)]
pub(super) struct Probe {
    asked_at: Option<Tick>,
    next: Tick,
    failed: u32,
}

impl Probe {
    /// One that is due now.
    pub(super) fn new(now: Tick) -> Self {
        Self { asked_at: None, next: now, failed: 0 }
    }

    /// Makes the next one due at this moment.
    pub(super) fn at(&mut self, moment: Tick) {
        self.next = moment;
    }

    /// Whether it must be sent now; then it counts as sent.
    pub(super) fn take_due(&mut self, now: Tick) -> bool {
        // Probe again if the last probe never reported back.
        let is_open = self.asked_at.is_some_and(|at| now.since(at) < 2 * PROBE_TIMEOUT);
        if is_open || now < self.next {
            return false;
        }
        self.asked_at = Some(now);
        self.next = now + PROBE_INTERVAL;
        true
    }

    pub(super) fn answered(&mut self) {
        self.asked_at = None;
        self.failed = 0;
    }

    pub(super) fn failed(&mut self, now: Tick) {
        self.asked_at = None;
        self.failed = self.failed.saturating_add(1);
        self.next = now + backoff(self.failed);
    }

    /// Whether the last probe failed.
    pub(super) fn is_silent(&self) -> bool {
        self.failed > 0
    }
}
