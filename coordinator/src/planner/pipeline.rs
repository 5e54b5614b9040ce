//! A pipeline that is cut already: how fast it is.
//!
//! `in_flight` steps of `rows` rows go round. All of them are back after the time per token of one
//! answer, `max(loop, in_flight × slowest stage)`: either a step's way through all stages and back,
//! or what the slowest stage takes for all steps.

use std::ops::Range;

use super::costs::{Costs, ONLY, Place};
use crate::scheduler::in_flight_limit;

/// Which steps go round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Steps {
    pub(super) rows: u32,
    pub(super) in_flight: u32,
}

impl Steps {
    pub(super) fn sequences(self) -> u32 {
        self.rows * self.in_flight
    }
}

/// How fast a pipeline is with the steps that suit it best.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    pub(super) steps: Steps,
    pub(super) bottleneck_ns: u64,
    pub(super) token_ns: u64,
}

impl Pace {
    pub(super) fn tokens_per_s(&self) -> f64 {
        f64::from(self.steps.sequences()) * 1e9 / self.token_ns as f64
    }

    /// More tokens in the same time, then less time per token, then smaller steps.
    fn is_better_than(&self, other: &Self) -> bool {
        let crossed = |a: &Self, b: &Self| u128::from(a.steps.sequences()) * u128::from(b.token_ns);
        let key = |a: &Self, b: &Self| {
            (crossed(a, b), std::cmp::Reverse(a.token_ns), std::cmp::Reverse(a.steps.rows))
        };
        key(self, other) > key(other, self)
    }
}

/// Workers with their layers, in stage order, and the KV that they all hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// A worker and its layers for each stage.
    pub(super) stages: Vec<(usize, Range<u32>)>,
    pub(super) kv_blocks: u32,
}

impl Cut {
    pub(super) fn workers(&self) -> impl Iterator<Item = usize> {
        self.stages.iter().map(|stage| stage.0)
    }
}

/// The time in ns of a single sequence's step through these stages and back, which nobody can be
/// faster than.
pub(super) fn single_ns(costs: &Costs<'_>, cut: &Cut) -> u64 {
    loop_ns(costs, cut, Steps { rows: 1, in_flight: 1 })
}

fn stage_times(costs: &Costs<'_>, cut: &Cut, steps: Steps) -> impl Iterator<Item = u64> {
    let count = cut.stages.len();
    cut.stages.iter().enumerate().map(move |(i, (w, layers))| {
        let layers = u64::from(layers.end - layers.start);
        costs.stage_ns(*w, Place::of(i, count), layers, (steps.rows, steps.in_flight))
    })
}

fn loop_ns(costs: &Costs<'_>, cut: &Cut, steps: Steps) -> u64 {
    let path: Vec<_> = cut.workers().collect();
    stage_times(costs, cut, steps)
        .fold(costs.hops_ns(&path), |sum: u64, stage| sum.saturating_add(stage))
}

/// The time of each stage for such a step, in ns.
pub(super) fn stages_ns(costs: &Costs<'_>, cut: &Cut, steps: Steps) -> Vec<u64> {
    stage_times(costs, cut, steps).collect()
}

/// The best pace of a pipeline that is cut already; `None` if it cannot keep the bound on the time
/// per token. Whether its memory holds the cut is not looked at.
pub(super) fn pace(costs: &Costs<'_>, cut: &Cut) -> Option<Pace> {
    let stages = cut.stages.len() as u32;
    let most_rows = cut.workers().map(|w| costs.workers[w].most_rows()).min()?;
    let sequences = costs.sequences(cut.kv_blocks);
    let mut best: Option<Pace> = None;
    for rows in 1..=most_rows.min(sequences) {
        // A single step in flight has the head where it ends, several share it.
        for (begin, end) in [(1, 1), (2, in_flight_limit(stages))] {
            let steps = Steps { rows, in_flight: begin };
            let loop_ns = loop_ns(costs, cut, steps);
            let bottleneck_ns = stage_times(costs, cut, steps).max()?;
            for in_flight in begin..=end.min(sequences / rows) {
                let token_ns = loop_ns.max(bottleneck_ns.saturating_mul(u64::from(in_flight)));
                let steps = Steps { rows, in_flight };
                let found = Pace { steps, bottleneck_ns, token_ns };
                if token_ns <= costs.token_limit_ns
                    && best.as_ref().is_none_or(|best| found.is_better_than(best))
                {
                    best = Some(found);
                }
            }
        }
    }
    best
}

/// Tokens per second of a worker that holds every layer, whatever its memory.
pub(super) fn ideal(costs: &Costs<'_>, worker: usize) -> f64 {
    let rows = costs.workers[worker].most_rows();
    f64::from(rows) * 1e9 / costs.stage_ns(worker, ONLY, costs.layers(), (rows, 1)) as f64
}
