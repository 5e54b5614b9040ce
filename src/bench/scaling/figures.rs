//! What is made of what was observed. Pure.

use serde::Serialize;

use crate::bench::Spread;

/// How far everything was at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Moment {
    /// Since the first of them.
    pub(super) seconds: f64,
    /// Tokens so far, of the kind that is measured.
    pub(super) tokens: u64,
    /// Of each stage, in the order of pipelines and stages: its engine computed for so long ...
    pub(super) busy_ms: Vec<f64>,
    /// ... and steps waited for it for so long.
    pub(super) waited_ms: Vec<f64>,
    /// Of all pipelines together: from the sending of each step to its result.
    pub(super) on_way_ms: f64,
    /// CPU time that the workers and then the coordinator have used.
    pub(super) cpu_seconds: Vec<f64>,
}

/// One measurement of one arrangement.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Observed {
    pub(super) tokens_per_s: f64,
    /// Of each stage.
    pub(super) busy: Vec<f64>,
    pub(super) network: f64,
    /// CPUs that each worker and then the coordinator used.
    pub(super) cpus: Vec<f64>,
}

impl Observed {
    /// Of moments at equal distances; nothing if there are fewer than two.
    pub(super) fn of(moments: &[Moment]) -> Self {
        let (Some(first), Some(last)) = (moments.first(), moments.last()) else {
            return Self::default();
        };
        let seconds = last.seconds - first.seconds;
        if seconds <= 0.0 {
            return Self::default();
        }
        let grown = |now: &[f64], before: &[f64]| -> Vec<f64> {
            now.iter().zip(before).map(|(now, before)| (now - before).max(0.0)).collect()
        };
        let busy_ms = grown(&last.busy_ms, &first.busy_ms);
        let waited_ms = grown(&last.waited_ms, &first.waited_ms);
        let at_stages: f64 = busy_ms.iter().chain(&waited_ms).sum();
        let on_way_ms = last.on_way_ms - first.on_way_ms;
        let network = if on_way_ms > 0.0 { 1.0 - at_stages / on_way_ms } else { 0.0 };
        let cpus = grown(&last.cpu_seconds, &first.cpu_seconds);
        Self {
            tokens_per_s: slope(moments),
            // A step counts when it has come back: the first one began before the first moment.
            busy: busy_ms.iter().map(|ms| (ms / 1000.0 / seconds).min(1.0)).collect(),
            network: network.clamp(0.0, 1.0),
            cpus: cpus.iter().map(|cpu| cpu / seconds).collect(),
        }
    }
}

/// Tokens per second: the slope of the line with the least squares of distances. Tokens come by steps,
/// and whether the last step comes just before the end or just after moves a slope little.
fn slope(moments: &[Moment]) -> f64 {
    let count = moments.len() as f64;
    let mean = |of: &dyn Fn(&Moment) -> f64| moments.iter().map(of).sum::<f64>() / count;
    let (seconds, tokens) = (mean(&|at| at.seconds), mean(&|at| at.tokens as f64));
    let sum = |of: &dyn Fn(f64, f64) -> f64| -> f64 {
        moments.iter().map(|at| of(at.seconds - seconds, at.tokens as f64 - tokens)).sum()
    };
    let square = sum(&|seconds, _| seconds * seconds);
    if square > 0.0 { sum(&|seconds, tokens| seconds * tokens) / square } else { 0.0 }
}

/// What an arrangement gives, as medians of all rounds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    /// Of all sequences or prompts together.
    pub tokens_per_s: f64,
    /// What the rounds gave.
    pub spread: Spread,
    /// What its workers give alone, added up.
    pub sum_tokens_per_s: f64,
    /// `tokens_per_s` of that.
    pub share: f64,
    /// The part of the time that stages stood still, in the mean of all stages.
    pub bubble: f64,
    /// The part of a step's way that it neither was computed nor waited for an engine: on the network,
    /// in queues before it, and with the coordinator.
    pub network: f64,
    /// Of each stage: the part of the time that its engine computed.
    pub busy: Vec<f64>,
    /// CPUs that each worker used, network included.
    pub worker_cpus: Vec<f64>,
    /// CPUs that the coordinator used.
    pub coordinator_cpus: f64,
}

impl Figures {
    /// Of the rounds. `alone` is what each of its workers gives alone.
    pub(super) fn of(rounds: &[Observed], alone: &[f64]) -> Self {
        let medians = |of: &dyn Fn(&Observed) -> &[f64]| -> Vec<f64> {
            let count = rounds.iter().map(|round| of(round).len()).min().unwrap_or(0);
            let nth = |index| rounds.iter().map(|round| of(round)[index]).collect::<Vec<_>>();
            (0..count).map(|index| Spread::of(&nth(index)).median).collect()
        };
        let median = |of: &dyn Fn(&Observed) -> f64| {
            Spread::of(&rounds.iter().map(of).collect::<Vec<_>>()).median
        };
        let rates: Vec<f64> = rounds.iter().map(|round| round.tokens_per_s).collect();
        let spread = Spread::of(&rates);
        let sum_tokens_per_s: f64 = alone.iter().sum();
        let share = if sum_tokens_per_s > 0.0 { spread.median / sum_tokens_per_s } else { 0.0 };
        let busy = medians(&|round| &round.busy);
        let mut worker_cpus = medians(&|round| &round.cpus);
        let coordinator_cpus = worker_cpus.pop().unwrap_or(0.0);
        Self {
            tokens_per_s: spread.median,
            spread,
            sum_tokens_per_s,
            share,
            bubble: 1.0 - busy.iter().sum::<f64>() / busy.len().max(1) as f64,
            network: median(&|round| round.network),
            busy,
            worker_cpus,
            coordinator_cpus,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment(seconds: f64, tokens: u64) -> Moment {
        Moment { seconds, tokens, ..Moment::default() }
    }

    #[test]
    fn a_rate_does_not_hang_on_the_last_step() {
        // Steps of 32 tokens, three a second, looked at five times a second, from any moment on.
        for begin in 0..10 {
            let at = |index: u32| {
                let seconds = f64::from(begin) / 30.0 + f64::from(index) / 5.0;
                moment(seconds, 32 * (seconds * 3.0 + 1e-9) as u64)
            };
            let rate = Observed::of(&(0..75).map(at).collect::<Vec<_>>()).tokens_per_s;
            assert!((rate - 96.0).abs() < 0.5, "{rate}");
        }
        assert_eq!(Observed::of(&[]), Observed::default());
        assert_eq!(Observed::of(&[moment(1.0, 5)]), Observed::default());
    }

    #[test]
    fn a_way_is_computing_waiting_and_the_rest() {
        let before = Moment {
            busy_ms: vec![100.0, 100.0],
            waited_ms: vec![5.0, 5.0],
            on_way_ms: 1000.0,
            cpu_seconds: vec![1.0, 2.0, 0.5],
            ..moment(0.0, 10)
        };
        let after = Moment {
            busy_ms: vec![1900.0, 1500.0],
            waited_ms: vec![405.0, 5.0],
            on_way_ms: 5000.0,
            cpu_seconds: vec![2.0, 3.5, 0.7],
            ..moment(2.0, 110)
        };
        let observed = Observed::of(&[before, after]);
        assert_eq!(observed.tokens_per_s, 50.0);
        assert_eq!(observed.busy, [0.9, 0.7]);
        assert!((observed.network - 0.1).abs() < 1e-9, "3400 and 400 of 4000: {observed:?}");
        let figures = Figures::of(std::slice::from_ref(&observed), &[30.0, 32.5]);
        assert_eq!((figures.sum_tokens_per_s, figures.share), (62.5, 0.8));
        assert!((figures.bubble - 0.2).abs() < 1e-9);
        assert_eq!(figures.worker_cpus, [0.5, 0.75]);
        assert!((figures.coordinator_cpus - 0.1).abs() < 1e-9);
    }

    #[test]
    fn rounds_count_by_their_median() {
        let round = |tokens_per_s| Observed {
            tokens_per_s,
            busy: vec![tokens_per_s / 100.0],
            cpus: vec![0.5, 0.1],
            ..Observed::default()
        };
        let figures = Figures::of(&[round(90.0), round(10.0), round(80.0)], &[100.0]);
        assert_eq!((figures.tokens_per_s, figures.share), (80.0, 0.8));
        assert_eq!(figures.spread, Spread { min: 10.0, median: 80.0, max: 90.0 });
        assert!((figures.bubble - 0.2).abs() < 1e-9);
        assert_eq!(Figures::of(&[], &[]).share, 0.0);
    }
}
