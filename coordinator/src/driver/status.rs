//! What the driver says of itself.

use std::collections::{BTreeMap, VecDeque};
use std::ops::RangeInclusive;
use std::time::Duration;

use proto::status::{ClusterStatus, QueueStatus, RateStatus};

use super::clients::Counted;
use super::control::Driver;
use crate::tick::Tick;

/// Over which rates are taken.
const WINDOW: Duration = Duration::from_secs(10);

/// Between samples: 20 of them make the window.
const SAMPLE_EVERY: Duration = Duration::from_millis(500);

/// Tokens per second over the last [`WINDOW`].
#[derive(Debug, Default)]
pub(super) struct Rates {
    /// When, prompt tokens and generated tokens since start; oldest first.
    samples: VecDeque<(Tick, u64, u64)>,
}

impl Rates {
    /// Notes how far the counters are.
    pub(super) fn sample(&mut self, now: Tick, counted: Counted) {
        if self.samples.back().is_some_and(|(last, ..)| now.since(*last) < SAMPLE_EVERY) {
            return;
        }
        self.samples.push_back((now, counted.prompt_tokens, counted.generated_tokens));
        // One sample stays that is as old as the window.
        while self.samples.get(1).is_some_and(|(second, ..)| now.since(*second) >= WINDOW) {
            self.samples.pop_front();
        }
    }

    /// Prompt and generated tokens per second.
    fn per_second(&self) -> (f64, f64) {
        let (Some(first), Some(last)) = (self.samples.front(), self.samples.back()) else {
            return (0.0, 0.0);
        };
        let seconds = last.0.since(first.0).as_secs_f64();
        if seconds <= 0.0 {
            return (0.0, 0.0);
        }
        let rate = |from: u64, to: u64| to.saturating_sub(from) as f64 / seconds;
        (rate(first.1, last.1), rate(first.2, last.2))
    }
}

impl Driver {
    /// The whole as it is now; who serves fills in what it knows of the model.
    pub(super) fn status(&self) -> ClusterStatus {
        let mut view = self.cluster.view();
        // The first of equal ones, as they are shown.
        let pipelines = view.plan.pipelines.iter_mut().rev();
        let mut by_epoch: BTreeMap<_, _> =
            pipelines.map(|shown| ((shown.id, shown.epoch), shown)).collect();
        for report in self.lanes.reports() {
            let at = report.at;
            let Some(shown) = by_epoch.get_mut(&(at.id.0, at.epoch.0)) else { continue };
            (shown.steps, shown.on_way_ms) = (report.trips.steps, report.trips.on_way_ms);
            shown.budget = report.budget;
            for (stage, means) in shown.stages.iter_mut().zip(&report.stages) {
                (stage.compute_ms, stage.wait_ms) = (means.compute_ms, means.wait_ms);
                (stage.steps, stage.busy_ms) = (means.steps, means.busy_ms);
                stage.waited_ms = means.waited_ms;
            }
        }
        let counted = self.totals.counted();
        let (prompt_tokens_per_s, generated_tokens_per_s) = self.rates.per_second();
        ClusterStatus {
            cluster: self.config.cluster_name.clone(),
            cluster_id: self.config.cluster.cluster_id.clone(),
            term: view.term.map_or(0, |term| term.0),
            class: view.class.map(|class| class.to_string()).unwrap_or_default(),
            ready: *self.ready.borrow(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            model: proto::status::ModelStatus::default(),
            workers: view.workers,
            plan: view.plan,
            queue: self.queue(),
            rates: RateStatus {
                prompt_tokens_per_s,
                generated_tokens_per_s,
                requests_finished: counted.finished,
                requests_failed: counted.failed,
                prompt_tokens: counted.prompt_tokens,
                generated_tokens: counted.generated_tokens,
            },
            waiting: self.waiting(),
            admin: self.config.admin.clone(),
        }
    }
}

/// What a client is told at least and at most who is to come again: sooner costs more than it brings, and
/// later nobody knows how things are.
const RETRY_AFTER: RangeInclusive<u64> = 1..=60;

/// The same while nothing was computed: nobody knows.
const RETRY_AFTER_UNKNOWN: u64 = 10;

/// How long it takes until so many tokens are computed, in whole seconds.
fn retry_after(tokens: u64, per_second: f64) -> Duration {
    let seconds = match per_second > 0.0 {
        // More than any u64 reads as the largest.
        true => (tokens as f64 / per_second).ceil() as u64,
        false => RETRY_AFTER_UNKNOWN,
    };
    Duration::from_secs(seconds.clamp(*RETRY_AFTER.start(), *RETRY_AFTER.end()))
}

impl Driver {
    /// When those who wait will have been served, at the rate of the last ten seconds.
    pub(super) fn retry_after(&self) -> Duration {
        let (read, generated) = self.rates.per_second();
        retry_after(self.router.stats().waiting_tokens, read + generated)
    }

    /// How full everything is, over all pipelines.
    pub(super) fn queue(&self) -> QueueStatus {
        let router = self.router.stats();
        QueueStatus {
            running: router.running,
            waiting: router.waiting + self.parking.len() as u32,
            waiting_limit: self.config.limits.waiting_requests,
            waiting_tokens: router.waiting_tokens,
            waiting_tokens_limit: self.config.limits.waiting_tokens,
            kv_blocks_total: router.kv_blocks_total,
            kv_blocks_used: router.kv_blocks_used,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_refused_is_told_how_long_those_who_wait_will_take() {
        assert_eq!(retry_after(3000, 100.0), Duration::from_secs(30));
        assert_eq!(retry_after(3001, 100.0), Duration::from_secs(31));
        assert_eq!(retry_after(0, 100.0), Duration::from_secs(1));
        assert_eq!(retry_after(u64::MAX, 1e-9), Duration::from_secs(60));
        assert_eq!(retry_after(5, 0.0), Duration::from_secs(10), "nobody knows");
    }

    #[test]
    fn rates_are_those_of_the_last_ten_seconds() {
        let mut rates = Rates::default();
        assert_eq!(rates.per_second(), (0.0, 0.0));
        for half_seconds in 0..60u64 {
            // Nothing for 15 s, then 4 prompt and 20 generated tokens a second.
            let busy = half_seconds.saturating_sub(30);
            let counted = Counted {
                prompt_tokens: 2 * busy,
                generated_tokens: 10 * busy,
                ..Counted::default()
            };
            rates.sample(Tick::from_millis(500 * half_seconds), counted);
        }
        assert_eq!(rates.per_second(), (4.0, 20.0));
        assert_eq!(rates.samples.len(), 21);
    }
}
