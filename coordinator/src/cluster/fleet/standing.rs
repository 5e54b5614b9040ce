//! Who is kept out of plans for a while: workers that are lost again and again, and those that
//! could not take their stage.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::super::Loss;
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
    /// Because it was lost too often.
    quarantine: Option<KeptOut>,
    /// When it was lost so often it answered, and did not do its part.
    is_broken: bool,
    /// Because it could not take its stage: another process start is free of it.
    refusal: Option<KeptOut>,
}

#[derive(Debug)]
struct KeptOut {
    until: Tick,
    why: String,
}

impl FlapHistories {
    /// It was lost. The text of an alarm if that happens too often.
    pub(super) fn lost(&mut self, now: Tick, id: &str, loss: Loss, why: &str) -> Option<String> {
        let history = self.of(now, id);
        history.losses.push_back(now);
        history.losses.retain(|&at| now.since(at) <= FLAP_WINDOW);
        if history.losses.len() < FLAPS {
            return None;
        }
        history.losses.clear();
        history.is_broken = loss == Loss::Broken;
        let why = format!("was lost {FLAPS} times, last: {why}");
        let span = history.next_span(QUARANTINE_FIRST);
        history.quarantine = Some(KeptOut { until: now + span, why });
        Some(format!(
            "worker {id} was lost {FLAPS} times within {} s and is kept out for {} s",
            FLAP_WINDOW.as_secs(),
            span.as_secs()
        ))
    }

    /// It could not take its stage.
    pub(super) fn refused(&mut self, now: Tick, id: &str, why: &str) {
        let why = format!("could not take its stage: {why}");
        let history = self.of(now, id);
        let span = history.next_span(REFUSAL_FIRST);
        history.refusal = Some(KeptOut { until: now + span, why });
    }

    /// Another process start may take what this one refused.
    pub(super) fn started_again(&mut self, id: &str) {
        if let Some(history) = self.0.get_mut(id) {
            history.refusal = None;
        }
    }

    /// Why a worker is kept out for now.
    pub(super) fn kept_out(&self, now: Tick, id: &str) -> Option<&str> {
        let history = self.0.get(id)?;
        let kept_out = current(history.quarantine.as_ref(), now)
            .or_else(|| current(history.refusal.as_ref(), now))?;
        Some(&kept_out.why)
    }

    /// Whether it is kept out because it could not take its stage.
    pub(super) fn has_refused(&self, now: Tick, id: &str) -> bool {
        self.0.get(id).is_some_and(|history| current(history.refusal.as_ref(), now).is_some())
    }

    /// Whether it is kept out because it was lost too often. Where nobody can take its place only one that
    /// is broken is: of the others some serve for a while each time, and that is better than nothing.
    pub(super) fn is_quarantined(&self, now: Tick, id: &str, is_needed: bool) -> bool {
        self.0.get(id).is_some_and(|history| {
            let is_kept_out = current(history.quarantine.as_ref(), now).is_some();
            is_kept_out && (history.is_broken || !is_needed)
        })
    }

    /// The history of a worker. Those that mean nothing any more are dropped first, so that there
    /// are no more of them than losses within the last hours.
    fn of(&mut self, now: Tick, id: &str) -> &mut FlapHistory {
        self.0.retain(|_, history| !history.is_over(now));
        self.0.entry(id.to_owned()).or_default()
    }
}

impl FlapHistory {
    /// For how long it is kept out now: `first`, doubled for every time before.
    fn next_span(&mut self, first: Duration) -> Duration {
        let span = (first * 2u32.saturating_pow(self.times_kept_out.min(16))).min(QUARANTINE_LIMIT);
        self.times_kept_out += 1;
        span
    }

    /// Whether it was good for so long that its past is forgotten.
    fn is_over(&self, now: Tick) -> bool {
        let last_loss = self.losses.back().is_none_or(|&at| now.since(at) > FLAP_WINDOW);
        let ends = self.quarantine.iter().chain(&self.refusal).map(|kept_out| kept_out.until);
        last_loss && now.since(ends.max().unwrap_or(Tick::ZERO)) > QUARANTINE_LIMIT
    }
}

fn current(kept_out: Option<&KeptOut>, now: Tick) -> Option<&KeptOut> {
    kept_out.filter(|kept_out| now < kept_out.until)
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
        let lost = |histories: &mut FlapHistories, loss| {
            (0..3).filter_map(|i| histories.lost(at(i), "w", loss, "silent")).collect::<Vec<_>>()
        };
        let alarms = lost(&mut histories, Loss::Gone);
        assert_eq!(alarms, ["worker w was lost 3 times within 600 s and is kept out for 60 s"]);
        assert!(!histories.has_refused(at(3), "w"));
        histories.refused(at(3), "w", "busy");
        assert!(histories.has_refused(at(4), "w"), "nor does a quarantine hide a refusal");
        histories.started_again("w");
        assert!(histories.kept_out(at(61), "w").unwrap().starts_with("was lost"));
        assert_eq!(histories.kept_out(at(62), "w"), None);
    }

    #[test]
    fn one_that_is_broken_is_kept_out_however_much_it_is_needed() {
        let now = Tick(Duration::from_secs(1));
        for (loss, is_kept_out) in [(Loss::Gone, false), (Loss::Broken, true)] {
            let mut histories = FlapHistories::default();
            for _ in 0..FLAPS {
                histories.lost(now, "w", loss, "it goes again and again");
            }
            assert!(histories.is_quarantined(now, "w", false), "{loss:?}");
            assert_eq!(histories.is_quarantined(now, "w", true), is_kept_out, "{loss:?}");
        }
    }
}
