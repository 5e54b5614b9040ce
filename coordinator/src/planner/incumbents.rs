//! The search for a deployment, from what serves already: pipelines stay as they are, or move few
//! layers, where that costs little.

use super::costs::{Costs, ONLY, Place};
use super::grouping::{Grouping, Members, Wanted};
use super::pipeline::{Care, Cut, Group, Pace, pace, single_ns, stages_ns};
use super::{Assignment, Deployment, Incumbent, Objective, PlanError, Prediction, Problem, Stage};

/// A deployment that keeps more of what serves may be slower than the best one by so many per cent.
/// Speeds are not measured better than that, and a pipeline that changes stands still for a while.
pub(super) const KEEP_PERCENT: u64 = 5;

/// Pipelines whose time for a single sequence is within so many per cent of the least are as quick.
const QUICK_PERCENT: u64 = 1;

/// Where more pipelines are wanted than are as quick, the bound grows by so many per cent,
const QUICK_MORE_PERCENT: u64 = 10;

/// so many times, to seven times the least; then any pipeline will do.
const QUICK_TRIES: u32 = 20;

/// In pipelines of more stages a new worker goes to the end, not where the fewest layers move.
const INSERT_STAGES: usize = 16;

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

/// By workers' numbers.
type Layers = Vec<std::ops::Range<u32>>;

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
        let planned = self
            .keeping(&mut grouping, enough)
            .unwrap_or_else(|| best.into_iter().map(|planned| self.moved(planned)).collect());
        Ok(self.deployment(planned))
    }

    /// The bound on the time of a single sequence's step: a little more than the least, or so much
    /// more that there are as many pipelines as are wanted.
    fn single_limit_ns(&self, least: u64, all: &[usize]) -> u64 {
        let mut limit_ns = grown(least, QUICK_PERCENT);
        if self.wanted.pipelines.is_none_or(|wanted| wanted == 1) {
            return limit_ns;
        }
        let is_enough =
            |limit_ns: u64| Grouping::new(self.costs, self.wanted, limit_ns).best(all).is_some();
        for _ in 0..QUICK_TRIES {
            if is_enough(limit_ns) {
                return limit_ns;
            }
            limit_ns = grown(limit_ns, QUICK_MORE_PERCENT);
        }
        u64::MAX
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

    // ---- what serves already

    fn incumbents(&self) -> &'a [Incumbent] {
        &self.problem.options.incumbent
    }

    /// The stages of an incumbent by workers' numbers, if all of them are there and hold every layer
    /// once.
    pub(super) fn whole(&self, incumbent: &Incumbent) -> Option<Cut> {
        let mut stages: Vec<(usize, std::ops::Range<u32>)> = Vec::new();
        for stage in &incumbent.stages {
            let begin = stages.last().map_or(0, |(_, layers)| layers.end);
            let worker = self.costs.find(&stage.worker)?;
            let is_next = stage.layers.start == begin && stage.layers.end > begin;
            if !is_next || stages.iter().any(|(other, _)| *other == worker) {
                return None;
            }
            stages.push((worker, stage.layers.clone()));
        }
        let is_all = stages.last()?.1.end == self.costs.model.layers;
        is_all.then_some(Cut { stages, kv_blocks: incumbent.kv_blocks })
    }

    fn fits(&self, cut: &Cut) -> bool {
        self.room(cut).is_some_and(|blocks| blocks >= cut.kv_blocks)
    }

    /// KV blocks that every stage has room for.
    fn room(&self, cut: &Cut) -> Option<u32> {
        let count = cut.stages.len();
        let blocks = cut.stages.iter().enumerate().map(|(i, (w, layers))| {
            self.costs.blocks(*w, Place::of(i, count), u64::from(layers.end - layers.start))
        });
        blocks.min().flatten()
    }

    /// An incumbent that may stay as it is.
    fn kept(&self, index: usize) -> Option<Planned> {
        let cut = self.whole(&self.incumbents()[index])?;
        let (least, most) = (self.costs.min_kv_blocks, self.costs.max_kv_blocks);
        let is_wanted = self.wanted.stages.is_none_or(|stages| stages as usize == cut.stages.len());
        if !is_wanted
            || !(least..=most).contains(&cut.kv_blocks)
            || !self.fits(&cut)
            || !self.is_quick_enough(&cut)
        {
            return None;
        }
        let pace = pace(self.costs, &cut)?;
        Some(Planned { cut, pace, origin: Origin::Kept(index) })
    }

    fn is_quick_enough(&self, cut: &Cut) -> bool {
        self.single_limit_ns == u64::MAX
            || single_ns(self.costs, cut) <= grown(self.single_limit_ns, KEEP_PERCENT)
    }

    /// A deployment that keeps incumbents and gives `enough` tokens per second: all that can stay, or
    /// without the one that makes least of its workers, without the two, the four, and so on.
    fn keeping(&self, grouping: &mut Grouping<'_>, enough: f64) -> Option<Vec<Planned>> {
        let mut kept: Vec<Planned> = Vec::new();
        for index in 0..self.incumbents().len() {
            let Some(planned) = self.kept(index) else { continue };
            let is_taken =
                |w: usize| kept.iter().any(|other| other.cut.workers().any(|taken| taken == w));
            if !planned.cut.workers().any(is_taken) {
                kept.push(planned);
            }
        }
        let share = |planned: &Planned| {
            let ideal: f64 = planned.cut.workers().map(|w| ideal(self.costs, w)).sum();
            planned.pace.tokens_per_s() / ideal
        };
        kept.sort_by(|a, b| share(b).total_cmp(&share(a)));
        if let Some(pipelines) = self.wanted.pipelines {
            kept.truncate(pipelines as usize);
        }
        let mut given_up = 0;
        while given_up < kept.len() || (given_up == 0 && !self.incumbents().is_empty()) {
            let stay = &kept[..kept.len() - given_up];
            if let Some(found) = self.beside(grouping, stay)
                && total(&found) >= enough
                && found.iter().any(|planned| planned.origin != Origin::Fresh)
            {
                return Some(found);
            }
            given_up = (given_up * 2).max(1);
        }
        None
    }

    /// Pipelines beside those that stay: the other incumbents mended, and the rest as it is best.
    fn beside(&self, grouping: &mut Grouping<'_>, stay: &[Planned]) -> Option<Vec<Planned>> {
        let mut found = stay.to_vec();
        let is_free = |found: &[Planned], w: usize| {
            found.iter().all(|planned| planned.cut.workers().all(|taken| taken != w))
        };
        for (index, incumbent) in self.incumbents().iter().enumerate() {
            let is_full = self.wanted.pipelines.is_some_and(|most| most as usize <= found.len());
            if is_full || stay.iter().any(|planned| planned.origin == Origin::Kept(index)) {
                continue;
            }
            let free: Members =
                (0..self.costs.workers.len()).filter(|&w| is_free(&found, w)).collect();
            found.extend(self.mended(index, incumbent, &free));
        }
        let free: Members = (0..self.costs.workers.len()).filter(|&w| is_free(&found, w)).collect();
        let pipelines = self.wanted.pipelines.map(|wanted| wanted - found.len() as u32);
        if pipelines == Some(0) || free.is_empty() {
            return pipelines.is_none_or(|more| more == 0).then_some(found);
        }
        let more = grouping.with_pipelines(pipelines, |grouping| grouping.best(&free));
        match more {
            Some(more) => {
                found.extend(self.settle_all(&more)?.into_iter().map(|new| self.moved(new)))
            }
            None if pipelines.is_some() => return None,
            None => {}
        }
        (!found.is_empty()).then_some(found)
    }

    /// An incumbent that lost some of its workers, with the quickest free ones in their places or, if
    /// there are none, without.
    fn mended(&self, index: usize, incumbent: &Incumbent, free: &[usize]) -> Option<Planned> {
        let is_old = |w: &usize| {
            let id = &self.costs.workers[*w].spec.id;
            self.incumbents().iter().any(|i| i.stages.iter().any(|stage| stage.worker == *id))
        };
        let mut spare: Members = free.iter().copied().filter(|w| !is_old(w)).collect();
        let speed = |w: usize| {
            let worker = &self.costs.workers[w];
            worker.layer_ns(worker.most_rows())
        };
        // The quickest is taken first, from the end.
        spare.sort_by_key(|&w| std::cmp::Reverse((speed(w), w)));
        let mut lost = 0;
        let mut slots = Vec::new();
        for stage in &incumbent.stages {
            let old = self.costs.find(&stage.worker).filter(|w| free.contains(w));
            lost += u32::from(old.is_none());
            slots.extend(old.or_else(|| spare.pop()));
        }
        if lost == 0 || lost as usize == incumbent.stages.len() {
            return None;
        }
        let mut members = slots.clone();
        members.sort_unstable();
        members.dedup();
        let is_wanted = self.wanted.stages.is_none_or(|stages| stages as usize == members.len());
        if !is_wanted || members.len() != slots.len() {
            return None;
        }
        let best = self.settle(&members)?;
        self.near(index, &slots, &best).or(Some(best))
    }

    /// A new pipeline with fewer layers moved, if it has workers of an incumbent.
    fn moved(&self, planned: Planned) -> Planned {
        let mut members: Members = planned.cut.workers().collect();
        members.sort_unstable();
        let overlap = |incumbent: &Incumbent| -> u32 {
            let stages = incumbent.stages.iter();
            let here = stages.filter(|stage| {
                self.costs.find(&stage.worker).is_some_and(|w| members.contains(&w))
            });
            here.map(|stage| stage.layers.end.saturating_sub(stage.layers.start)).sum()
        };
        let most = self
            .incumbents()
            .iter()
            .enumerate()
            .map(|(index, incumbent)| (overlap(incumbent), std::cmp::Reverse(index)))
            .max();
        let Some((1.., std::cmp::Reverse(index))) = most else { return planned };
        let old = &self.incumbents()[index].stages;
        let mut slots: Members = old
            .iter()
            .filter_map(|stage| self.costs.find(&stage.worker).filter(|w| members.contains(w)))
            .collect();
        let mut seen = Members::new();
        slots.retain(|w| {
            !seen.contains(w) && {
                seen.push(*w);
                true
            }
        });
        let new: Members = members.iter().copied().filter(|w| !slots.contains(w)).collect();
        for w in new {
            let places = match slots.len() < INSERT_STAGES {
                true => 0..=slots.len(),
                false => slots.len()..=slots.len(),
            };
            let with = |place: usize| {
                let mut slots = slots.clone();
                slots.insert(place, w);
                slots
            };
            // Where the fewest layers move, whether or not this is the last of the new ones.
            let moves = |place: usize| {
                let cut = self.fewest_moves(&with(place), u64::MAX, &planned, None);
                (cut.map_or(u32::MAX, |cut| self.layers_moved(&cut)), std::cmp::Reverse(place))
            };
            let place = places.min_by_key(|&place| moves(place)).unwrap_or(slots.len());
            slots = with(place);
        }
        self.near(index, &slots, &planned).unwrap_or(planned)
    }

    /// The cut between these workers in this order with the fewest layers moved, if it is at most
    /// [`KEEP_PERCENT`] slower than the best one and moves fewer; with the KV that the incumbent has,
    /// if there is room for it.
    fn near(&self, index: usize, slots: &[usize], best: &Planned) -> Option<Planned> {
        let bound = grown(best.pace.bottleneck_ns, KEEP_PERCENT);
        let incumbent = &self.incumbents()[index];
        let pinned = incumbent.kv_blocks.clamp(self.costs.min_kv_blocks, self.costs.max_kv_blocks);
        let needed = self.costs.needed_blocks(best.pace.steps.rows * best.pace.steps.in_flight);
        for blocks in [Some(pinned), Some(needed), None] {
            let Some(mut cut) = self.fewest_moves(slots, bound, best, blocks) else { continue };
            let Some(room) = self.room(&cut) else { continue };
            cut.kv_blocks = if room >= pinned && blocks == Some(pinned) { pinned } else { room };
            let Some(pace) = pace(self.costs, &cut) else { continue };
            let is_enough = pace.tokens_per_s()
                >= best.pace.tokens_per_s() * (1.0 - KEEP_PERCENT as f64 / 100.0);
            if is_enough
                && self.is_quick_enough(&cut)
                && self.layers_moved(&cut) < self.layers_moved(&best.cut)
            {
                return Some(Planned { cut, pace, origin: Origin::Moved(index) });
            }
        }
        None
    }

    /// Dynamic programme over slots and boundaries: the least (moved layers, time of the slowest
    /// stage) with which the slots up to one hold the layers up to one.
    fn fewest_moves(
        &self,
        slots: &[usize],
        bound_ns: u64,
        best: &Planned,
        blocks: Option<u32>,
    ) -> Option<Cut> {
        let layers = self.costs.model.layers as usize;
        let held = self.held();
        let blocks = blocks.unwrap_or(self.costs.min_kv_blocks);
        let steps = best.pace.steps;
        let mut least = vec![None; layers + 1];
        least[0] = Some((0, 0));
        let mut begins: Vec<Vec<usize>> = Vec::new();
        for (i, &w) in slots.iter().enumerate() {
            let place = Place::of(i, slots.len());
            let most = self.costs.room(w, place, blocks).min(layers as u64) as usize;
            let mut next = vec![None; layers + 1];
            let mut begin_of = vec![0; layers + 1];
            for end in 1..=layers {
                for begin in end.saturating_sub(most)..end {
                    let Some((moved, slowest)) = least[begin] else { continue };
                    let share = end - begin;
                    let ns =
                        self.costs.stage_ns(w, place, share as u64, (steps.rows, steps.in_flight));
                    if ns > bound_ns {
                        continue;
                    }
                    let cost = (
                        moved + share - stays(&held[w], begin as u32..end as u32),
                        ns.max(slowest),
                    );
                    if next[end].is_none_or(|least| cost < least) {
                        next[end] = Some(cost);
                        begin_of[end] = begin;
                    }
                }
            }
            least = next;
            begins.push(begin_of);
        }
        least[layers]?;
        let mut end = layers;
        let mut stages = Vec::new();
        for (&w, begin_of) in slots.iter().zip(&begins).rev() {
            let begin = begin_of[end];
            stages.push((w, begin as u32..end as u32));
            end = begin;
        }
        stages.reverse();
        Some(Cut { stages, kv_blocks: blocks })
    }

    /// By worker, the layers that an incumbent has there.
    fn held(&self) -> Layers {
        let mut held = vec![0..0; self.costs.workers.len()];
        for stage in self.incumbents().iter().flat_map(|incumbent| &incumbent.stages) {
            if let Some(w) = self.costs.find(&stage.worker) {
                held[w] = stage.layers.clone();
            }
        }
        held
    }

    fn layers_moved(&self, cut: &Cut) -> u32 {
        let held = self.held();
        let moved = |(w, layers): &(usize, std::ops::Range<u32>)| {
            (layers.end - layers.start) - stays(&held[*w], layers.clone()) as u32
        };
        cut.stages.iter().map(moved).sum()
    }

    // ---- the answer

    fn deployment(&self, mut planned: Vec<Planned>) -> Deployment {
        planned.sort_by_key(|planned| {
            let old = match planned.origin {
                Origin::Kept(index) | Origin::Moved(index) => index,
                Origin::Fresh => usize::MAX,
            };
            (old, planned.cut.stages[0].0)
        });
        let continues = self.continues(&planned);
        let pipelines = planned.iter().zip(&continues).map(|(planned, &continues)| {
            let Planned { cut, pace, .. } = planned;
            let stage = |(w, layers): &(usize, std::ops::Range<u32>)| Stage {
                worker: self.costs.workers[*w].spec.id.clone(),
                layers: layers.clone(),
            };
            Assignment {
                stages: cut.stages.iter().map(stage).collect(),
                kv_blocks: cut.kv_blocks,
                step_rows: pace.steps.rows,
                bottleneck_ns: pace.bottleneck_ns,
                token_ns: pace.token_ns,
                predicted_tokens_per_s: pace.tokens_per_s(),
                continues,
                reason: self.pipeline_reason(planned),
            }
        });
        let whole = self.incumbents().iter().filter_map(|incumbent| self.whole(incumbent));
        let incumbent_tokens_per_s = whole
            .filter_map(|cut| pace(self.costs, &cut))
            .fold(0.0, |sum, pace| sum + pace.tokens_per_s());
        Deployment {
            pipelines: pipelines.collect(),
            left_out: self.left_out(&planned),
            tokens_per_s: total(&planned),
            incumbent_tokens_per_s,
            layers_moved: planned.iter().map(|planned| self.layers_moved(&planned.cut)).sum(),
            reason: self.reason(&planned),
            workers: planned.iter().flat_map(|planned| self.predictions(planned)).collect(),
        }
    }

    fn predictions(&self, planned: &Planned) -> Vec<Prediction> {
        let Planned { cut, pace, .. } = planned;
        let times = stages_ns(self.costs, cut, pace.steps);
        let of = |((w, layers), ns): (&(usize, std::ops::Range<u32>), u64)| {
            let busy = ns as f64 * f64::from(pace.steps.in_flight) / pace.token_ns as f64;
            let share = f64::from(layers.end - layers.start) / f64::from(self.costs.model.layers);
            Prediction {
                worker: self.costs.workers[*w].spec.id.clone(),
                layers: layers.clone(),
                busy,
                tokens_per_s: pace.tokens_per_s() * share,
            }
        };
        cut.stages.iter().zip(times).map(of).collect()
    }

    /// For each pipeline the incumbent that most of its layers are left from. No two pipelines go on
    /// from the same.
    fn continues(&self, planned: &[Planned]) -> Vec<Option<usize>> {
        let mut overlaps = Vec::new();
        for (pipeline, planned) in planned.iter().enumerate() {
            for (index, incumbent) in self.incumbents().iter().enumerate() {
                let same = |(w, layers): &(usize, std::ops::Range<u32>)| -> usize {
                    let id = &self.costs.workers[*w].spec.id;
                    let old = incumbent.stages.iter().filter(|stage| stage.worker == *id);
                    old.map(|stage| stays(&stage.layers, layers.clone())).sum()
                };
                let layers: usize = planned.cut.stages.iter().map(same).sum();
                if layers > 0 {
                    overlaps.push((std::cmp::Reverse(layers), index, pipeline));
                }
            }
        }
        overlaps.sort_unstable();
        let mut continues = vec![None; planned.len()];
        for (_, index, pipeline) in overlaps {
            if continues[pipeline].is_none() && !continues.contains(&Some(index)) {
                continues[pipeline] = Some(index);
            }
        }
        continues
    }

    /// Why there is no plan at all.
    fn why_none(&self) -> PlanError {
        let costs = self.costs;
        let model = costs.model;
        let all: Members = (0..costs.workers.len()).collect();
        let any = Wanted { stages: self.wanted.stages, pipelines: None };
        if let Some(pipelines) = self.wanted.pipelines
            && let Some(possible) = Grouping::new(costs, any, self.single_limit_ns).best(&all)
        {
            return PlanError::TooManyPipelines { pipelines, possible: possible.len() as u32 };
        }
        if costs.token_limit_ns < u64::MAX {
            let free = Costs::new(self.problem, u64::MAX);
            if let Some((least, _)) = Grouping::new(&free, any, u64::MAX).quickest(&all) {
                return PlanError::TooSlow {
                    limit_ms: costs.token_limit_ns / 1_000_000,
                    least_ms: least.div_ceil(1_000_000),
                };
            }
        }
        let kv_blocks = costs.min_kv_blocks;
        let layer_bytes = model
            .kv_block_layer_bytes
            .saturating_mul(u64::from(kv_blocks))
            .saturating_add(model.layer_bytes);
        let memory = costs.workers.iter().map(|worker| worker.spec.memory_bytes);
        PlanError::DoesNotFit {
            memory_bytes: memory.fold(0, u64::saturating_add),
            needed_bytes: layer_bytes
                .saturating_mul(costs.layers())
                .saturating_add(costs.fixed_bytes(ONLY)),
            kv_blocks,
        }
    }
}

/// Tokens per second of a worker that holds every layer, whatever its memory.
pub(super) fn ideal(costs: &Costs<'_>, worker: usize) -> f64 {
    let rows = costs.workers[worker].most_rows();
    f64::from(rows) * 1e9 / costs.stage_ns(worker, ONLY, costs.layers(), (rows, 1)) as f64
}

fn total(planned: &[Planned]) -> f64 {
    planned.iter().fold(0.0, |sum, planned| sum + planned.pace.tokens_per_s())
}

fn grown(ns: u64, percent: u64) -> u64 {
    ns.saturating_add(ns / 100 * percent)
}

/// Layers that two ranges share.
fn stays(held: &std::ops::Range<u32>, layers: std::ops::Range<u32>) -> usize {
    held.end.min(layers.end).saturating_sub(held.start.max(layers.start)) as usize
}
