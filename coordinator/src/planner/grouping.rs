//! Who is in a pipeline with whom. Few workers: every partition, by a dynamic programme over sets.
//! Many: the best cut of some orders of the workers into neighbours, and from there the workers that
//! move and change places, until nothing helps or enough was looked at.

use std::collections::BTreeMap;

use super::costs::Costs;
use super::group::{Care, Group, Offer};
use super::pipeline::ideal;

/// For so many workers every partition is looked at: 256 sets, 6561 pairs of a set and a part.
const EXACT_WORKERS: usize = 8;

/// Groups that a search of many workers computes at most, counted by their workers, so that a plan
/// is found in bounded time. What was computed for workers of the same kind is not computed again.
const SEARCH_WORKERS: usize = 12_000;

/// Pipelines by neighbours have so many workers more than the fewest that hold the model at most.
const MORE_WORKERS: usize = 4;

/// A plan that gives this share of what its workers could give at best is not searched on.
const GOOD_ENOUGH: f64 = 0.995;

/// How many pipelines of how many stages are wanted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    /// Exactly so many stages in each.
    pub(super) stages: Option<u32>,
    /// Exactly so many pipelines.
    pub(super) pipelines: Option<u32>,
}

/// Workers that make a pipeline, by number.
pub(super) type Members = Vec<usize>;

/// The search for the groups that are worth most together.
pub(super) struct Grouping<'a> {
    costs: &'a Costs<'a>,
    wanted: Wanted,
    single_limit_ns: u64,
    /// By the kinds of the members.
    known: BTreeMap<Vec<usize>, Option<f64>>,
    /// How much may still be looked at.
    left: usize,
}

impl<'a> Grouping<'a> {
    pub(super) fn new(costs: &'a Costs<'a>, wanted: Wanted, single_limit_ns: u64) -> Self {
        Self { costs, wanted, single_limit_ns, known: BTreeMap::new(), left: SEARCH_WORKERS }
    }

    /// The same search for another number of pipelines.
    pub(super) fn with_pipelines<T>(
        &mut self,
        pipelines: Option<u32>,
        search: impl FnOnce(&mut Self) -> T,
    ) -> T {
        let before = std::mem::replace(&mut self.wanted.pipelines, pipelines);
        let found = search(self);
        self.wanted.pipelines = before;
        found
    }

    /// The least time in ns of a single sequence's step that any pipeline of `workers` takes, and who
    /// is in that.
    pub(super) fn quickest(&self, workers: &[usize]) -> Option<(u64, Members)> {
        let of = |members: Members| {
            let mut group = Group::new(self.costs, &members, u64::MAX);
            let least = self.is_wanted(members.len()).then(|| group.least_single_ns()).flatten();
            least.map(|least| (least, members))
        };
        if workers.len() <= EXACT_WORKERS {
            return (1..1_usize << workers.len()).filter_map(|set| of(members(workers, set))).min();
        }
        // The quickest first, by what a layer takes: those that hold the model, beginning with any of
        // them, and a few more.
        let mut order = workers.to_vec();
        order.sort_by_key(|&w| (self.costs.workers[w].layer_ns(1), w));
        let orders = std::iter::once(order).chain(self.orders(workers));
        let from = |order: Vec<usize>| {
            let least_from = |from: usize| {
                let order = &order[from..];
                let lengths = (self.fewest(order)..=order.len())
                    .filter_map(|count| of(sorted(&order[..count])));
                lengths.take(1 + usize::from(from == 0) * MORE_WORKERS).min()
            };
            (0..order.len()).filter_map(least_from).min()
        };
        orders.filter_map(from).min()
    }

    /// How many of the first of `order` have memory for all layers at least; more than there are, if
    /// all of them have not.
    fn fewest(&self, order: &[usize]) -> usize {
        if let Some(stages) = self.wanted.stages {
            return stages as usize;
        }
        let costs = self.costs;
        let needed = costs.model.layer_bytes.saturating_mul(costs.layers());
        let mut memory = 0_u64;
        let enough = order.iter().position(|&w| {
            memory = memory.saturating_add(costs.workers[w].spec.memory_bytes);
            memory >= needed
        });
        enough.map_or(order.len(), |place| place) + 1
    }

    /// What a group gives; `None` if it can be no pipeline.
    pub(super) fn offer(&self, members: &[usize], care: Care) -> Option<Offer> {
        if !self.is_wanted(members.len()) {
            return None;
        }
        Group::new(self.costs, members, self.single_limit_ns).offer(care)
    }

    fn is_wanted(&self, stages: usize) -> bool {
        stages > 0
            && stages as u64 <= self.costs.layers()
            && self.wanted.stages.is_none_or(|wanted| wanted as usize == stages)
    }

    /// What a group is worth, nothing if it can be no pipeline; computed once for every kind of it.
    fn worth(&mut self, members: &[usize]) -> Option<f64> {
        if !self.is_wanted(members.len()) {
            return None;
        }
        let mut kinds: Vec<_> = members.iter().map(|&w| self.costs.workers[w].kind).collect();
        kinds.sort_unstable();
        if let Some(&known) = self.known.get(&kinds) {
            return known;
        }
        self.left = self.left.saturating_sub(members.len());
        let found = self.offer(members, Care::Coarse).map(|offer| offer.worth);
        self.known.insert(kinds, found);
        found
    }

    /// The groups of `workers` that are worth most together; `None` if there are not as many
    /// pipelines as are wanted, or none at all.
    pub(super) fn best(&mut self, workers: &[usize]) -> Option<Vec<Members>> {
        if workers.len() <= EXACT_WORKERS {
            return self.every_partition(workers);
        }
        let mut best: Option<(f64, Vec<Members>)> = None;
        for order in self.orders(workers) {
            let Some(found) = self.neighbours(&order) else { continue };
            let worth = self.sum(&found);
            if best.as_ref().is_none_or(|(most, _)| worth > *most) {
                best = Some((worth, found));
            }
        }
        // Among neighbours there may be nobody who is quick enough.
        let (_, mut groups) = match best {
            Some(best) => best,
            None if self.wanted.pipelines.is_none_or(|wanted| wanted == 1) => {
                (0.0, vec![self.quickest(workers)?.1])
            }
            None => return None,
        };
        self.improve(workers, &mut groups);
        groups.sort();
        Some(groups)
    }

    fn sum(&mut self, groups: &[Members]) -> f64 {
        groups.iter().map(|group| self.worth(group).unwrap_or(0.0)).sum()
    }

    /// Every partition of a few workers, some of whom may be left out.
    fn every_partition(&mut self, workers: &[usize]) -> Option<Vec<Members>> {
        let sets = 1_usize << workers.len();
        let worth: Vec<_> = (0..sets)
            .map(|set| self.offer(&members(workers, set), Care::Exact).map(|offer| offer.worth))
            .collect();
        // From each set, by number of pipelines where one is wanted: the most that they are worth,
        // and the group with the first of the set, nobody if that is left out.
        let counts = self.counts();
        let mut most = vec![vec![None; sets]; counts];
        most[0][0] = Some((0.0, 0));
        for set in 1..sets {
            for count in 0..counts {
                let first = set & set.wrapping_neg();
                let mut best: Option<(f64, usize)> =
                    most[count][set ^ first].map(|(worth, _)| (worth, 0));
                let mut part = set;
                while let Some(before) = self.before(count)
                    && part > 0
                {
                    let rest: Option<(f64, usize)> = most[before][set ^ part];
                    if part & first > 0
                        && let (Some(worth), Some((others, _))) = (worth[part], rest)
                        && best.is_none_or(|(most, _)| worth + others > most)
                    {
                        best = Some((worth + others, part));
                    }
                    part = (part - 1) & set;
                }
                most[count][set] = best;
            }
        }
        let (mut set, mut count) = (sets - 1, counts - 1);
        let mut groups = Vec::new();
        while set > 0 {
            let (_, part) = most[count][set]?;
            if part == 0 {
                set &= set - 1;
                continue;
            }
            groups.push(members(workers, part));
            set ^= part;
            count = self.before(count)?;
        }
        (!groups.is_empty()).then_some(groups)
    }

    /// Numbers of pipelines that are told apart: none to the wanted one, or a single one that stands
    /// for as many as there are.
    fn counts(&self) -> usize {
        self.wanted.pipelines.map_or(1, |pipelines| pipelines as usize + 1)
    }

    /// The number of pipelines before one more.
    fn before(&self, count: usize) -> Option<usize> {
        match self.wanted.pipelines {
            Some(_) => count.checked_sub(1),
            None => Some(count),
        }
    }

    /// Orders in which neighbours may do well together.
    fn orders(&self, workers: &[usize]) -> Vec<Vec<usize>> {
        let costs = self.costs;
        let speed = |w: usize| costs.workers[w].layer_ns(costs.workers[w].most_rows());
        let memory = |w: usize| costs.workers[w].spec.memory_bytes;
        let place = |w: usize| (costs.workers[w].rack, costs.workers[w].machine);
        let sorted = |key: &dyn Fn(usize) -> (u64, u64, (usize, usize))| {
            let mut order = workers.to_vec();
            order.sort_by_key(|&w| (key(w), w));
            order
        };
        let by_speed = sorted(&|w| (speed(w), u64::MAX - memory(w), place(w)));
        let by_memory = sorted(&|w| (u64::MAX - memory(w), speed(w), place(w)));
        let mut by_place = by_speed.clone();
        by_place.sort_by_key(|&w| place(w));
        // Those with the most memory beside those with the least.
        let mut mixed = Vec::new();
        let mut ends = by_memory.iter();
        while let Some(&large) = ends.next() {
            mixed.push(large);
            mixed.extend(ends.next_back());
        }
        vec![by_place, by_speed, by_memory, mixed]
    }

    /// How many neighbours a pipeline that begins with the first of `order` may have: from the
    /// fewest that hold the model to a few more, and further if few pipelines are wanted.
    fn lengths(&mut self, order: &[usize]) -> Vec<usize> {
        if let Some(stages) = self.wanted.stages {
            let stages = stages as usize;
            return if stages <= order.len() { vec![stages] } else { Vec::new() };
        }
        let fewest = self.fewest(order);
        let layers = usize::try_from(self.costs.layers()).unwrap_or(usize::MAX);
        let most = order.len().min(layers);
        let feasible = (fewest..=most).find(|&count| self.group(&order[..count]).is_some());
        let Some(fewest) = feasible else { return Vec::new() };
        let mut lengths: Vec<_> = (fewest..=most.min(fewest + MORE_WORKERS)).collect();
        if let Some(pipelines) = self.wanted.pipelines {
            let even = order.len().div_ceil(pipelines.max(1) as usize).min(most);
            let mut length = fewest + MORE_WORKERS;
            while length < even {
                length = (length + length / 4).max(length + 1).min(even);
                lengths.push(length);
            }
        }
        lengths
    }

    /// The best cut of an order into pipelines of neighbours, between which some may be left out.
    fn neighbours(&mut self, order: &[usize]) -> Option<Vec<Members>> {
        let lengths: Vec<_> = (0..order.len()).map(|from| self.lengths(&order[from..])).collect();
        // From each place on, by number of pipelines where one is wanted: the most that they are
        // worth, and the length of the first, zero if who is there is left out.
        let counts = self.counts();
        let mut most = vec![vec![None; counts]; order.len() + 1];
        most[order.len()][0] = Some((0.0, 0));
        for from in (0..order.len()).rev() {
            for count in 0..counts {
                let mut best: Option<(f64, usize)> =
                    most[from + 1][count].map(|(worth, _)| (worth, 0));
                if let Some(before) = self.before(count) {
                    for &length in &lengths[from] {
                        let rest: Option<(f64, usize)> = most[from + length][before];
                        let Some((rest, _)) = rest else { continue };
                        let Some(worth) = self.group(&order[from..from + length]) else { continue };
                        if best.is_none_or(|(most, _)| worth + rest > most) {
                            best = Some((worth + rest, length));
                        }
                    }
                }
                most[from][count] = best;
            }
        }
        let (mut from, mut count) = (0, counts - 1);
        let mut groups = Vec::new();
        while from < order.len() {
            let (_, length) = most[from][count]?;
            if length > 0 {
                groups.push(sorted(&order[from..from + length]));
                count = self.before(count)?;
            }
            from += length.max(1);
        }
        (!groups.is_empty()).then_some(groups)
    }

    fn group(&mut self, members: &[usize]) -> Option<f64> {
        self.worth(&sorted(members))
    }

    /// Moves workers between groups, or in and out, and has them change places, as long as that
    /// helps.
    fn improve(&mut self, workers: &[usize], groups: &mut Vec<Members>) {
        let ideal: f64 = workers.iter().map(|&w| ideal(self.costs, w)).sum();
        loop {
            let before = self.sum(groups);
            if before >= GOOD_ENOUGH * ideal || self.left == 0 {
                return;
            }
            let mut out: Members = workers
                .iter()
                .copied()
                .filter(|w| groups.iter().all(|group| !group.contains(w)))
                .collect();
            // Whoever is in no pipeline makes one more group, which is worth nothing.
            out.sort_unstable();
            let is_better = self.pass(groups, &mut out);
            groups.retain(|group| !group.is_empty());
            if !is_better {
                return;
            }
        }
    }

    /// Tries every move and every exchange once; whether one helped.
    fn pass(&mut self, groups: &mut [Members], out: &mut Members) -> bool {
        let mut is_better = false;
        for a in 0..groups.len() {
            for b in 0..=groups.len() {
                if a == b {
                    continue;
                }
                if b == groups.len() {
                    is_better |= self.relate(&mut groups[a], out, true);
                } else if a < b {
                    let (head, tail) = groups.split_at_mut(b);
                    is_better |= self.relate(&mut head[a], &mut tail[0], false);
                }
                if self.left == 0 {
                    return is_better;
                }
            }
        }
        is_better
    }

    /// Moves and exchanges between two groups, of which the second may be that of nobody's.
    fn relate(&mut self, a: &mut Members, b: &mut Members, is_out: bool) -> bool {
        let worth = |this: &mut Self, a: &Members, b: &Members| -> Option<f64> {
            let of = |this: &mut Self, group: &Members| match group.is_empty() {
                true => this.wanted.pipelines.is_none().then_some(0.0),
                false => this.worth(group),
            };
            let second = if is_out { 0.0 } else { of(this, b)? };
            Some(of(this, a)? + second)
        };
        let Some(mut most) = worth(self, a, b) else { return false };
        let mut is_better = false;
        let mut tried = 0;
        // Places in the two lists; the end of a list stands for nobody.
        while tried < (a.len() + 1) * (b.len() + 1) {
            let (i, j) = (tried / (b.len() + 1), tried % (b.len() + 1));
            tried += 1;
            let (left, right) = (a.get(i).copied(), b.get(j).copied());
            if left.is_none() && right.is_none() {
                continue;
            }
            let (mut next_a, mut next_b) = (a.clone(), b.clone());
            next_a.retain(|&w| Some(w) != left);
            next_b.retain(|&w| Some(w) != right);
            next_a.extend(right);
            next_b.extend(left);
            next_a.sort_unstable();
            next_b.sort_unstable();
            if let Some(found) = worth(self, &next_a, &next_b)
                && found > most * (1.0 + 1e-6)
            {
                (*a, *b, most) = (next_a, next_b, found);
                is_better = true;
                tried = 0;
            }
            if self.left == 0 {
                break;
            }
        }
        is_better
    }
}

fn sorted(members: &[usize]) -> Members {
    let mut members = members.to_vec();
    members.sort_unstable();
    members
}

/// Those of `workers` whose bits are set.
fn members(workers: &[usize], set: usize) -> Members {
    let is_in = |(place, _): &(usize, &usize)| set >> place & 1 == 1;
    workers.iter().enumerate().filter(is_in).map(|(_, &w)| w).collect()
}
