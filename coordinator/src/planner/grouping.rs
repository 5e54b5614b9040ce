//! Who is in a pipeline with whom. Few workers: every partition, by a dynamic programme over sets.
//! Many: the best cut of some orders of the workers into neighbours, and from there the workers that
//! move and change places, until nothing helps or enough was looked at.

mod improving;
mod many;

use std::collections::BTreeMap;

use super::costs::{Costs, MIDDLE};
use super::group::{Care, Group, Offer};

/// For so many workers every partition is looked at: 256 sets, 6561 pairs of a set and a part.
pub(super) const EXACT_WORKERS: usize = 8;

/// A search of many workers ends when it has looked at so many of them, counted as [`Costs::work`]
/// does, so that a plan is found in bounded time: some 30 ms.
const SEARCH_WORK: u64 = 1_300_000;

/// What the partitions of workers cost for each set of them, in the same unit.
const PARTITION_WORK: usize = 8;

/// What is compared coarsely may be off by some of this many per cent: what is nearer to the best than that
/// is looked at exactly in the end.
const NEAR_PERCENT: f64 = 6.0;

/// For each set of workers, by number of pipelines: the most that they are worth, and one group of those.
type Most = Vec<Vec<Option<(f64, usize)>>>;

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
    /// By worker, layers that its memory holds with the least KV. Whoever holds none is in no group.
    rooms: Vec<u64>,
    /// By the kinds of the members, with either care.
    known: BTreeMap<Vec<usize>, Option<f64>>,
    known_exactly: BTreeMap<Vec<usize>, Option<f64>>,
    /// The work at which enough was looked at.
    enough_work: u64,
}

impl<'a> Grouping<'a> {
    pub(super) fn new(costs: &'a Costs<'a>, wanted: Wanted, single_limit_ns: u64) -> Self {
        let all = 0..costs.workers.len();
        Self {
            costs,
            wanted,
            single_limit_ns,
            rooms: all.map(|w| costs.room(w, MIDDLE, costs.min_kv_blocks)).collect(),
            known: BTreeMap::new(),
            known_exactly: BTreeMap::new(),
            enough_work: costs.work().saturating_add(SEARCH_WORK),
        }
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

    /// Those of `workers` whose memory holds something.
    fn usable(&self, workers: &[usize]) -> Members {
        workers.iter().copied().filter(|&w| self.rooms[w] > 0).collect()
    }

    /// The least time in ns of a single sequence's step that any pipeline of `workers` takes, and who
    /// is in that.
    pub(super) fn quickest(&self, workers: &[usize]) -> Option<(u64, Members)> {
        let workers = self.usable(workers);
        if workers.len() > self.costs.exact_workers {
            return self.quickest_of_many(&workers);
        }
        let mut least = None;
        for set in 1..1_usize << workers.len() {
            self.try_quick(members(&workers, set), &mut least);
        }
        least
    }

    /// Whether these can be a pipeline, which becomes the least if it is quicker.
    fn try_quick(&self, members: Members, least: &mut Option<(u64, Members)>) -> bool {
        if !self.is_wanted(members.len()) || !self.costs.is_wanted() {
            return false;
        }
        let below_ns = least.as_ref().map_or(u64::MAX, |least| least.0);
        let found = Group::new(self.costs, &members, u64::MAX).least_single_ns(below_ns);
        if let Some(ns) = found
            && ns < below_ns
        {
            *least = Some((ns, members));
        }
        found.is_some()
    }

    /// What a group gives; `None` if it can be no pipeline.
    pub(super) fn offer(&self, members: &[usize], care: Care) -> Option<Offer> {
        if !self.is_wanted(members.len()) || !self.costs.is_wanted() {
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
    fn worth(&mut self, members: &[usize], care: Care) -> Option<f64> {
        if !self.is_wanted(members.len()) {
            return None;
        }
        let mut kinds: Vec<_> = members.iter().map(|&w| self.costs.workers[w].kind).collect();
        kinds.sort_unstable();
        // Looking it up takes time too, where most groups are alike.
        self.costs.worked(members.len());
        let known = match care {
            Care::Coarse => &self.known,
            Care::Exact => &self.known_exactly,
        };
        if let Some(&known) = known.get(&kinds) {
            return known;
        }
        let found = self.offer(members, care).map(|offer| offer.worth);
        let known = match care {
            Care::Coarse => &mut self.known,
            Care::Exact => &mut self.known_exactly,
        };
        known.insert(kinds, found);
        found
    }

    /// The groups of `workers` that are worth most together; `None` if there are not as many
    /// pipelines as are wanted, or none at all.
    pub(super) fn best(&mut self, workers: &[usize]) -> Option<Vec<Members>> {
        let workers = self.usable(workers);
        match workers.len() <= self.costs.exact_workers {
            true => self.every_partition(&workers, Care::Exact),
            false => self.best_of_many(&workers),
        }
    }

    /// Whether there are as many pipelines as are wanted; of many workers some may be overlooked.
    pub(super) fn is_possible(&mut self, workers: &[usize]) -> bool {
        let workers = self.usable(workers);
        match workers.len() <= self.costs.exact_workers {
            true => self.every_partition(&workers, Care::Exact).is_some(),
            false => self.cuts(&workers).next().is_some(),
        }
    }

    /// Every partition of a few workers, some of whom may be left out.
    fn every_partition(&mut self, workers: &[usize], care: Care) -> Option<Vec<Members>> {
        let sets = 1_usize << workers.len();
        self.costs.worked(sets * PARTITION_WORK);
        let worth: Vec<_> = (0..sets)
            .map(|set| match care {
                Care::Exact => self.offer(&members(workers, set), care).map(|offer| offer.worth),
                Care::Coarse => self.worth(&members(workers, set), care),
            })
            .collect();
        self.groups(workers, &self.most(&worth))
    }

    /// The same, but exactly only for groups of partitions that are nearly the best.
    fn every_near_partition(&mut self, workers: &[usize]) -> Option<Vec<Members>> {
        let sets = 1_usize << workers.len();
        self.costs.worked(2 * sets * PARTITION_WORK);
        let worth: Vec<_> =
            (0..sets).map(|set| self.worth(&members(workers, set), Care::Coarse)).collect();
        let most = self.most(&worth);
        let (all, count) = (sets - 1, self.counts() - 1);
        let (best, _) = most[count][all]?;
        let before = self.before(count)?;
        let near: Vec<_> = (0..sets)
            .map(|set| {
                let (others, _) = most[before][all ^ set]?;
                let is_near = worth[set]? + others >= best * (1.0 - NEAR_PERCENT / 100.0);
                let is_looked_at = is_near && !self.is_enough();
                is_looked_at.then(|| self.worth(&members(workers, set), Care::Exact))?
            })
            .collect();
        self.groups(workers, &self.most(&near))
    }

    /// From each set, by number of pipelines where one is wanted: the most that they are worth, and the
    /// group with the first of the set, nobody if that is left out.
    fn most(&self, worth: &[Option<f64>]) -> Most {
        let (sets, counts) = (worth.len(), self.counts());
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
        most
    }

    /// The groups that are worth most.
    fn groups(&self, workers: &[usize], most: &Most) -> Option<Vec<Members>> {
        let (mut set, mut count) = ((1 << workers.len()) - 1, self.counts() - 1);
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
}

/// By number.
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
