//! What the driver says of itself.

use std::collections::VecDeque;
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
        for report in self.lanes.reports() {
            let at = report.at;
            let is_it =
                |p: &&mut proto::status::PipelineStatus| (p.id, p.epoch) == (at.id.0, at.epoch.0);
            let shown = view.plan.pipelines.iter_mut().find(is_it);
            let Some(shown) = shown else { continue };
            (shown.steps, shown.on_way_ms) = (report.trips.steps, report.trips.on_way_ms);
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

impl Driver {
    /// How full everything is, over all pipelines.
    pub(super) fn queue(&self) -> QueueStatus {
        let router = self.router.stats();
        QueueStatus {
            running: router.running,
            waiting: router.waiting + self.parking.len() as u32,
            waiting_limit: self.config.limits.waiting_requests,
            kv_blocks_total: router.kv_blocks_total,
            kv_blocks_used: router.kv_blocks_used,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
