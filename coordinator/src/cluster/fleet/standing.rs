//! Who is kept out of plans for a while: workers that are lost again and again, and those that
//! could not take their stage.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::tick::Tick;

/// A worker that was lost so often ...
const FLAPS: usize = 3;
/// ... within this time is kept out ...
const FLAP_WINDOW: Duration = Duration::from_secs(600);
/// ... for this long, doubled each time it happens again ...
const QUARANTINE_FIRST: Duration = Duration::from_secs(60);
/// ... up to this.
const QUARANTINE_LIMIT: Duration = Duration::from_secs(3600);
/// A worker that could not take its stage is kept out for this long, doubled each time.
const REFUSAL_FIRST: Duration = Duration::from_secs(5);

/// The past of workers, by id. Outlives their records: a worker that flaps has a new one each time.
#[derive(Debug, Default)]
pub(super) struct FlapHistories(BTreeMap<String, FlapHistory>);

/// What a worker's past means for plans.
#[derive(Debug, Default)]
struct FlapHistory {
    losses: VecDeque<Tick>,
    /// Quarantines and refusals so far.
    times_kept_out: u32,
    kept_out: Option<KeptOut>,
}

#[derive(Debug)]
struct KeptOut {
    until: Tick,
    why: String,
    /// Because it could not take its stage: another process start is free of it.
    by_refusal: bool,
}

impl FlapHistories {
    /// It was lost. The text of an alarm if that happens too often.
    pub(super) fn lost(&mut self, now: Tick, id: &str, why: &str) -> Option<String> {
        let history = self.of(now, id);
        history.losses.push_back(now);
        history.losses.retain(|&at| now.since(at) <= FLAP_WINDOW);
        if history.losses.len() < FLAPS {
            return None;
        }
        history.losses.clear();
        let why = format!("was lost {FLAPS} times, last: {why}");
        let span = history.keep_out(now, QUARANTINE_FIRST, why, false);
        Some(format!(
            "worker {id} was lost {FLAPS} times within {} s and is kept out for {} s",
            FLAP_WINDOW.as_secs(),
            span.as_secs()
        ))
    }

    /// It could not take its stage.
    pub(super) fn refused(&mut self, now: Tick, id: &str, why: &str) {
        let why = format!("could not take its stage: {why}");
        self.of(now, id).keep_out(now, REFUSAL_FIRST, why, true);
    }

    /// Another process start may take what this one refused.
    pub(super) fn started_again(&mut self, id: &str) {
        if let Some(history) = self.0.get_mut(id) {
            history.kept_out.take_if(|kept_out| kept_out.by_refusal);
        }
    }

    /// Why a worker is kept out for now.
    pub(super) fn kept_out(&self, now: Tick, id: &str) -> Option<&str> {
        self.current(now, id).map(|kept_out| kept_out.why.as_str())
    }

    /// Whether it is kept out because it could not take its stage.
    pub(super) fn has_refused(&self, now: Tick, id: &str) -> bool {
        self.current(now, id).is_some_and(|kept_out| kept_out.by_refusal)
    }

    fn current(&self, now: Tick, id: &str) -> Option<&KeptOut> {
        self.0.get(id)?.kept_out.as_ref().filter(|kept_out| now < kept_out.until)
    }

    /// The history of a worker. Those that mean nothing any more are dropped first, so that there
    /// are no more of them than losses within the last hours.
    fn of(&mut self, now: Tick, id: &str) -> &mut FlapHistory {
        self.0.retain(|_, history| !history.is_over(now));
        self.0.entry(id.to_owned()).or_default()
    }
}

impl FlapHistory {
    /// Keeps the worker out for `first`, doubled for every time before. How long that is.
    fn keep_out(&mut self, now: Tick, first: Duration, why: String, by_refusal: bool) -> Duration {
        let span = (first * 2u32.saturating_pow(self.times_kept_out.min(16))).min(QUARANTINE_LIMIT);
        self.times_kept_out += 1;
        let until = now + span;
        match &self.kept_out {
            // A quarantine is not shortened by a refusal.
            Some(before) if before.until > until => {}
            _ => self.kept_out = Some(KeptOut { until, why, by_refusal }),
        }
        span
    }

    /// Whether it was good for so long that its past is forgotten.
    fn is_over(&self, now: Tick) -> bool {
        let last_loss = self.losses.back().is_none_or(|&at| now.since(at) > FLAP_WINDOW);
        let kept_out = self.kept_out.as_ref().map_or(Tick::ZERO, |kept_out| kept_out.until);
        last_loss && now.since(kept_out) > QUARANTINE_LIMIT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_long_past_is_forgotten_and_a_refusal_ends_with_the_process() {
        let mut histories = FlapHistories::default();
        let hours = |hours: u64| Tick(Duration::from_secs(3600 * hours));
        for id in 0..100 {
            histories.refused(hours(2), &format!("w{id}"), "no memory");
        }
        assert!(histories.has_refused(hours(2), "w7"));
        histories.started_again("w7");
        assert_eq!(histories.kept_out(hours(2), "w7"), None);
        assert_eq!(histories.kept_out(hours(2), "w8"), Some("could not take its stage: no memory"));
        histories.refused(hours(4), "other", "no memory");
        assert_eq!(histories.0.len(), 1, "nobody is remembered for ever");
    }

    #[test]
    fn a_refusal_does_not_end_a_quarantine() {
        let mut histories = FlapHistories::default();
        let at = |seconds: u64| Tick(Duration::from_secs(seconds));
        let alarms: Vec<_> = (0..3).filter_map(|i| histories.lost(at(i), "w", "silent")).collect();
        assert_eq!(alarms, ["worker w was lost 3 times within 600 s and is kept out for 60 s"]);
        histories.refused(at(3), "w", "busy");
        histories.started_again("w");
        assert!(histories.kept_out(at(61), "w").unwrap().starts_with("was lost"));
        assert_eq!(histories.kept_out(at(62), "w"), None);
    }
}
