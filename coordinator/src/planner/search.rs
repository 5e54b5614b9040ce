//! The search for a deployment: the best one, and the one that keeps what serves already where that
//! costs little.

mod answer;
mod incumbents;
mod moves;

use super::costs::Costs;
use super::group::{Care, Group};
use super::grouping::{Grouping, Members, Wanted};
use super::pipeline::{Cut, Pace, pace};
use super::{Deployment, Objective, PlanError, Problem};

/// A deployment that keeps more of what serves may be slower than the best one by so many per cent.
/// Speeds are not measured better than that, and a pipeline that changes stands still for a while.
pub(super) const KEEP_PERCENT: u64 = 5;

/// Pipelines whose time for a single sequence is within so many per cent of the least are as quick.
const QUICK_PERCENT: u64 = 1;

/// Where more pipelines are wanted than are as quick, the bound grows by so many per cent,
const QUICK_MORE_PERCENT: u64 = 10;

/// so many times, to seven times the least; then any pipeline will do.
const QUICK_TRIES: u32 = 20;

/// How a pipeline came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// The incumbent of this index, unchanged.
    Kept(usize),
    /// From the incumbent of this index, with few layers moved.
    Moved(usize),
    /// As fast as it can be.
    Fresh,
}

/// A pipeline of a deployment in the making.
#[derive(Clone, Debug)]
pub(super) struct Planned {
    pub(super) cut: Cut,
    pub(super) pace: Pace,
    pub(super) origin: Origin,
}

/// The search for the deployment of one problem.
pub(super) struct Search<'a> {
    pub(super) costs: &'a Costs<'a>,
    pub(super) problem: &'a Problem,
    wanted: Wanted,
    /// Bound on the time of a single sequence's step, in ns.
    single_limit_ns: u64,
}

impl<'a> Search<'a> {
    pub(super) fn new(costs: &'a Costs<'a>, problem: &'a Problem) -> Self {
        let Problem { options, .. } = problem;
        let wanted = Wanted {
            stages: options.stages.map(|stages| stages.max(1)),
            pipelines: options.pipelines.map(|pipelines| pipelines.max(1)),
        };
        Self { costs, problem, wanted, single_limit_ns: u64::MAX }
    }

    pub(super) fn run(mut self) -> Result<Deployment, PlanError> {
        let all: Members = (0..self.costs.workers.len()).collect();
        let costs = self.costs;
        if self.problem.options.objective == Objective::Latency {
            let grouping = Grouping::new(costs, self.wanted, u64::MAX);
            let (least, _) = grouping.quickest(&all).ok_or_else(|| self.why_none())?;
            self.single_limit_ns = self.single_limit_ns(least, &all);
        }
        let mut grouping = Grouping::new(costs, self.wanted, self.single_limit_ns);
        let best = grouping.best(&all).ok_or_else(|| self.why_none())?;
        let best = self.settle_all(&best).ok_or_else(|| self.why_none())?;
        let enough = total(&best) * (1.0 - KEEP_PERCENT as f64 / 100.0);
        let best: Vec<_> = best.into_iter().map(|planned| self.moved(planned)).collect();
        let moved = |planned: &[Planned]| -> u32 {
            planned.iter().map(|planned| self.layers_moved(&planned.cut)).sum()
        };
        // What keeps pipelines may move more layers than one that does not.
        let keeping = self
            .keeping(&mut grouping, enough)
            .filter(|kept| total(kept) > total(&best) || moved(kept) <= moved(&best));
        let planned = keeping.unwrap_or(best);
        Ok(self.deployment(planned))
    }

    /// The bound on the time of a single sequence's step: a little more than the least, or so much
    /// more that there are as many pipelines as are wanted.
    fn single_limit_ns(&self, least: u64, all: &[usize]) -> u64 {
        let limit_ns = grown(least, QUICK_PERCENT);
        if self.wanted.pipelines.is_none_or(|wanted| wanted == 1) {
            return limit_ns;
        }
        let grows = |limit_ns: &u64| Some(grown(*limit_ns, QUICK_MORE_PERCENT));
        let limits: Vec<_> =
            std::iter::successors(Some(limit_ns), grows).take(QUICK_TRIES as usize).collect();
        let is_enough =
            |limit_ns: u64| Grouping::new(self.costs, self.wanted, limit_ns).is_possible(all);
        let first = limits.partition_point(|&limit_ns| !is_enough(limit_ns));
        limits.get(first).copied().unwrap_or(u64::MAX)
    }

    fn settle_all(&self, groups: &[Members]) -> Option<Vec<Planned>> {
        groups.iter().map(|group| self.settle(group)).collect()
    }

    fn settle(&self, members: &[usize]) -> Option<Planned> {
        let mut group = Group::new(self.costs, members, self.single_limit_ns);
        let offer = group.offer(Care::Exact)?;
        let cut = group.settle(&offer)?;
        let pace = pace(self.costs, &cut)?;
        Some(Planned { cut, pace, origin: Origin::Fresh })
    }
}

fn total(planned: &[Planned]) -> f64 {
    planned.iter().fold(0.0, |sum, planned| sum + planned.pace.tokens_per_s())
}

fn grown(ns: u64, percent: u64) -> u64 {
    ns.saturating_add(ns / 100 * percent)
}
