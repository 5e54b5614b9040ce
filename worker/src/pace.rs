//! How long steps really take, beside what the registry says of this worker: what is published is kept
//! true. What is decided is pure: it counts windows and looks at no clock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto::ids::ModelId;
use proto::plan::WorkerModel;
use proto::step::{Output, Row, RowStatus};

/// Windows in a row that must depart from what is published; each is a part of the time that a departure
/// must last, in which a busy stage computes many steps.
const WINDOWS: u32 = 12;

/// Windows in a row that must depart [`LARGE_DEPARTURE`] times.
const LARGE_WINDOWS: u32 = 3;

/// What slows a machine down so much is no noise, and everybody waits for it.
const LARGE_DEPARTURE: f64 = 4.0;

/// By which share of the published times measured ones must depart.
const DEPARTURE: f64 = 0.25;

/// Windows in a row without a stage after which a worker that says it is slow measures itself again: three
/// minutes, where a departure must last for one. Nobody gives it work to show that it is not, and it costs a second of one.
const REST_WINDOWS: u32 = 36;

/// Time of some steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Spent {
    /// In the engine.
    pub(crate) measured_ns: u64,
    /// By the published times.
    pub(crate) predicted_ns: u64,
}

impl Spent {
    fn add(&mut self, other: Self) {
        self.measured_ns = self.measured_ns.saturating_add(other.measured_ns);
        self.predicted_ns = self.predicted_ns.saturating_add(other.predicted_ns);
    }

    /// How many times as long as published; `None` if nothing was computed.
    fn ratio(self) -> Option<f64> {
        let Self { measured_ns, predicted_ns } = self;
        (measured_ns > 0 && predicted_ns > 0).then(|| measured_ns as f64 / predicted_ns as f64)
    }
}

/// What a stage computes in each step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Share {
    pub(crate) model: ModelId,
    pub(crate) layers: u32,
    /// Whether head and sampler are here.
    pub(crate) is_last: bool,
}

/// How long one window is, if a departure counts that lasts for so long.
pub(crate) fn window(drift_time: Duration) -> Duration {
    drift_time / WINDOWS
}

/// The steps of a worker's stages, counted and timed.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    steps: AtomicU64,
    times: Mutex<Times>,
}

#[derive(Debug, Default)]
struct Times {
    published: Vec<WorkerModel>,
    spent: Spent,
}

impl Pace {
    /// These times are in the registry from now on; what was measured beside others is forgotten.
    pub(crate) fn publish(&self, models: Vec<WorkerModel>) {
        *self.times() = Times { published: models, spent: Spent::default() };
    }

    /// A step was computed.
    pub(crate) fn note(&self, share: Share, rows: &[Row], compute: Duration) {
        self.steps.fetch_add(1, Ordering::Relaxed);
        let mut times = self.times();
        let model = times.published.iter().find(|model| model.id == share.model);
        if let Some(predicted_ns) = model.and_then(|model| predicted_ns(model, share, rows)) {
            let measured_ns = u64::try_from(compute.as_nanos()).unwrap_or(u64::MAX);
            times.spent.add(Spent { measured_ns, predicted_ns });
        }
    }

    /// Steps since the process started.
    pub(crate) fn steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }

    /// What was spent since it was asked last.
    pub(crate) fn take(&self) -> Spent {
        std::mem::take(&mut self.times().spent)
    }

    fn times(&self) -> MutexGuard<'_, Times> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The time that a step should take; `None` if it is none that the published times speak of: they are
/// of steps through the layers, with greedy sampling.
fn predicted_ns(model: &WorkerModel, share: Share, rows: &[Row]) -> Option<u64> {
    let (mut tokens, mut draws) = (0_u32, 0_u32);
    for row in rows.iter().filter(|row| row.status == RowStatus::Ok) {
        match row.output {
            Output::None | Output::State => {}
            Output::Sample(_) => draws += 1,
            Output::Score(_) | Output::Logits | Output::Draw(_) | Output::Drawn(_) => return None,
        }
        tokens = tokens.saturating_add(u32::try_from(row.tokens.len()).unwrap_or(u32::MAX));
    }
    if tokens == 0 {
        return None;
    }
    let layers_ns = model.layer_ns(tokens)?.saturating_mul(u64::from(share.layers));
    let head_ns = if share.is_last && draws > 0 { model.head_ns(draws)? } else { 0 };
    Some(layers_ns.saturating_add(head_ns))
}

/// PURE. Decides when what is published is not true any more.
#[derive(Debug, Default)]
pub(crate) struct Drift {
    /// So many windows in a row departed to the same side.
    windows: u32,
    /// And the last so many of those by [`LARGE_DEPARTURE`].
    large_windows: u32,
    /// What was spent in those.
    large_spent: Spent,
    is_slower: bool,
    spent: Spent,
}

impl Drift {
    /// After each [`window`]: by which factor all published times are to be multiplied, if they are.
    /// A window in which nothing was computed says nothing. Not again before as much time has passed
    /// again.
    pub(crate) fn observe(&mut self, window: Spent) -> Option<f64> {
        let ratio = window.ratio()?;
        let is_slower = ratio > 1.0;
        if (ratio - 1.0).abs() <= DEPARTURE {
            *self = Self::default();
            return None;
        }
        if is_slower != self.is_slower {
            *self = Self { is_slower, ..Self::default() };
        }
        self.windows += 1;
        self.spent.add(window);
        if (1.0 / LARGE_DEPARTURE..LARGE_DEPARTURE).contains(&ratio) {
            (self.large_windows, self.large_spent) = (0, Spent::default());
        } else {
            self.large_windows += 1;
            self.large_spent.add(window);
        }
        let spent = match (self.large_windows, self.windows) {
            // What was between that and the usual before says nothing of how it is now.
            (LARGE_WINDOWS.., _) => self.large_spent,
            (_, WINDOWS..) => self.spent,
            _ => return None,
        };
        *self = Self::default();
        spent.ratio()
    }
}

/// PURE. Decides when a worker that stands by measures itself again: what slowed it down may have gone.
#[derive(Debug, Default)]
pub(crate) struct Rest {
    /// So many windows in a row it had no stage and said that it is slow.
    windows: u32,
}

impl Rest {
    /// After each [`window`]: whether to measure now.
    pub(crate) fn observe(&mut self, has_stage: bool, is_slow: bool) -> bool {
        self.windows = if has_stage || !is_slow { 0 } else { self.windows + 1 };
        let is_due = self.windows >= REST_WINDOWS;
        if is_due {
            self.windows = 0;
        }
        is_due
    }
}

/// Whether times say that this machine is slower than they said `before`, by more than what passes.
pub(crate) fn is_slower(now: &[WorkerModel], before: &[WorkerModel]) -> bool {
    let total = |models: &[WorkerModel]| {
        let steps = models.iter().flat_map(|model| &model.steps);
        steps.map(|step| step.layer_ns as f64 + step.head_ns as f64).sum::<f64>()
    };
    total(now) > total(before) * (1.0 + DEPARTURE)
}

#[cfg(test)]
mod tests {
    use proto::ids::{Generation, PrefixHash, SequenceId};
    use proto::plan::StepTime;

    use super::*;

    const NOTHING: [f64; 0] = [];

    fn window(measured_ns: u64) -> Spent {
        Spent { measured_ns, predicted_ns: 1000 }
    }

    fn observe(drift: &mut Drift, windows: u32, measured_ns: u64) -> Vec<f64> {
        (0..windows).filter_map(|_| drift.observe(window(measured_ns))).collect()
    }

    #[test]
    fn what_departs_for_a_minute_is_published_once() {
        let mut drift = Drift::default();
        assert_eq!(observe(&mut drift, 100, 1250), NOTHING, "a quarter is not more than a quarter");
        assert_eq!(observe(&mut drift, WINDOWS - 1, 2000), NOTHING);
        assert_eq!(observe(&mut drift, 1, 2000), [2.0]);
        assert_eq!(observe(&mut drift, WINDOWS - 1, 2000), NOTHING, "not again within a minute");
        assert_eq!(observe(&mut drift, 1, 1000), NOTHING, "what is true again begins anew");
        assert_eq!(observe(&mut drift, WINDOWS, 500), [0.5]);
    }

    #[test]
    fn a_moment_is_no_minute_and_silence_says_nothing() {
        let mut drift = Drift::default();
        for _ in 0..WINDOWS {
            assert_eq!(observe(&mut drift, WINDOWS / 2, 3000), NOTHING);
            assert_eq!(observe(&mut drift, WINDOWS / 2, 300), NOTHING, "to the other side");
        }
        let mut drift = Drift::default();
        assert_eq!(observe(&mut drift, WINDOWS - 1, 3000), NOTHING);
        assert_eq!(drift.observe(Spent::default()), None);
        assert_eq!(observe(&mut drift, 1, 3000), [3.0]);
    }

    #[test]
    fn a_tenth_of_the_speed_is_published_in_a_quarter_of_the_time() {
        let mut drift = Drift::default();
        // It begins somewhere within a window.
        assert_eq!(observe(&mut drift, 1, 2000), NOTHING);
        assert_eq!(observe(&mut drift, LARGE_WINDOWS - 1, 10_000), NOTHING);
        assert_eq!(observe(&mut drift, 1, 10_000), [10.0], "of those windows alone");
        assert_eq!(observe(&mut drift, LARGE_WINDOWS - 1, 100), NOTHING);
        assert_eq!(observe(&mut drift, 1, 100), [0.1]);
        // Not of windows that are not in a row.
        for _ in 0..WINDOWS {
            assert_eq!(observe(&mut drift, LARGE_WINDOWS - 1, 10_000), NOTHING);
            assert_eq!(observe(&mut drift, 1, 1000), NOTHING);
        }
        assert_eq!(4 * LARGE_WINDOWS, WINDOWS);
    }

    #[test]
    fn a_slow_worker_without_a_stage_measures_itself_now_and_then() {
        let mut rest = Rest::default();
        let times = |rest: &mut Rest, windows, has_stage, is_slow| {
            (0..windows).filter(|_| rest.observe(has_stage, is_slow)).count()
        };
        assert_eq!(times(&mut rest, 1000, true, true), 0, "its steps tell");
        assert_eq!(times(&mut rest, 1000, false, false), 0, "nothing is to be found out");
        assert_eq!(times(&mut rest, REST_WINDOWS - 1, false, true), 0);
        assert_eq!(times(&mut rest, 1, true, true), 0);
        assert_eq!(times(&mut rest, 2 * REST_WINDOWS, false, true), 2);

        let models = |layer_ns| {
            let steps = vec![StepTime { rows: 1, layer_ns, head_ns: 0 }];
            vec![WorkerModel { steps, ..WorkerModel::default() }]
        };
        assert!(is_slower(&models(126), &models(100)));
        assert!(!is_slower(&models(125), &models(100)) && !is_slower(&models(50), &models(100)));
    }

    #[test]
    fn steps_are_compared_with_what_is_published() {
        let model = ModelId([1; 32]);
        let steps = vec![
            StepTime { rows: 1, layer_ns: 100, head_ns: 1000 },
            StepTime { rows: 4, layer_ns: 160, head_ns: 1600 },
        ];
        let pace = Pace::default();
        pace.publish(vec![WorkerModel { id: model, steps }]);
        let row = |tokens: usize, output: Output| Row {
            sequence: SequenceId(1),
            generation: Generation(1),
            position: 0,
            tokens: vec![0; tokens],
            prefix_hash_before: PrefixHash::EMPTY,
            prefix_hash_after: PrefixHash::EMPTY,
            blocks: Vec::new(),
            output,
            status: RowStatus::Ok,
            detail: String::new(),
            traceparent: String::new(),
        };
        let took = Duration::from_nanos(500);
        let note = |is_last, rows: &[Row]| {
            pace.note(Share { model, layers: 10, is_last }, rows, took);
            pace.take().predicted_ns
        };
        let sample = || row(1, Output::Sample(Box::default()));
        assert_eq!(note(false, &[sample()]), 1000, "the head is elsewhere");
        assert_eq!(note(true, &[sample()]), 2000);
        assert_eq!(note(true, &[row(4, Output::None)]), 1600, "nothing is drawn");
        assert_eq!(note(true, &[row(3, Output::None), sample()]), 2600);
        assert_eq!(note(true, &[row(1, Output::Logits)]), 0, "nobody knows");
        let failed = Row { status: RowStatus::Stale, ..sample() };
        assert_eq!(note(true, &[failed]), 0);
        let other = Share { model: ModelId([2; 32]), layers: 1, is_last: false };
        pace.note(other, &[sample()], took);
        assert_eq!((pace.take(), pace.steps()), (Spent::default(), 7));
        pace.note(Share { model, layers: 10, is_last: false }, &[sample()], took);
        assert_eq!(pace.take(), Spent { measured_ns: 500, predicted_ns: 1000 });
    }
}
