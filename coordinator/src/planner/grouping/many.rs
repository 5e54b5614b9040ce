//! Many workers: orders in which neighbours may do well together, and their best cut into pipelines.

use super::super::group::Care;
use super::{Grouping, Members, sorted};

/// Pipelines by neighbours have so many workers more than the fewest that hold the model at most.
const MORE_WORKERS: usize = 4;

impl Grouping<'_> {
    /// [`Self::quickest`] of many: in some orders, those that hold the model, beginning with any of
    /// them; then as many workers go, come and change places as makes it quicker.
    pub(super) fn quickest_of_many(&self, workers: &[usize]) -> Option<(u64, Members)> {
        let mut least = None;
        let mut by_speed = workers.to_vec();
        by_speed.sort_by_key(|&w| (self.costs.workers[w].layer_ns(1), w));
        for order in std::iter::once(by_speed).chain(self.orders(workers)) {
            for from in 0..order.len() {
                let order = &order[from..];
                let mut more = if from == 0 { MORE_WORKERS } else { 0 };
                for count in self.fewest(order)..=order.len() {
                    if self.try_quick(sorted(&order[..count]), &mut least) {
                        match more.checked_sub(1) {
                            Some(left) => more = left,
                            None => break,
                        }
                    }
                }
            }
        }
        while !self.is_enough() && self.quickens(workers, &mut least) {}
        least
    }

    /// Whether somebody went, came or changed places.
    fn quickens(&self, workers: &[usize], least: &mut Option<(u64, Members)>) -> bool {
        let Some((before, members)) = least.clone() else { return false };
        let others = || workers.iter().copied().filter(|w| !members.contains(w));
        for without in members.iter().map(Some).chain([None]) {
            let rest = members.iter().copied().filter(|w| Some(w) != without);
            for with in others().map(Some).chain([None]) {
                let changed: Members = rest.clone().chain(with).collect();
                self.try_quick(sorted(&changed), least);
            }
        }
        least.as_ref().is_some_and(|(now, _)| *now < before)
    }

    /// How many of the first of `order` have memory for all layers at least; more than there are, if
    /// all of them have not.
    fn fewest(&self, order: &[usize]) -> usize {
        if let Some(stages) = self.wanted.stages {
            return stages as usize;
        }
        let mut room = 0_u64;
        let enough = order.iter().position(|&w| {
            room = room.saturating_add(self.rooms[w]);
            room >= self.costs.layers()
        });
        enough.map_or(order.len(), |place| place) + 1
    }

    /// [`Self::best`] of many.
    pub(super) fn best_of_many(&mut self, workers: &[usize]) -> Option<Vec<Members>> {
        let found: Vec<_> = self.cuts(workers).collect();
        let mut best: Option<(f64, Vec<Members>)> = None;
        for groups in found {
            let worth = self.sum(&groups, Care::Coarse);
            if best.as_ref().is_none_or(|(most, _)| worth > *most) {
                best = Some((worth, groups));
            }
        }
        let mut groups = match best {
            Some((_, groups)) => groups,
            None if self.wanted.pipelines.is_none_or(|wanted| wanted == 1) => {
                vec![self.quickest(workers)?.1]
            }
            None => return None,
        };
        self.improve(workers, &mut groups);
        groups.sort();
        Some(groups)
    }

    /// Where a search may begin.
    pub(super) fn cuts(&mut self, workers: &[usize]) -> impl Iterator<Item = Vec<Members>> {
        // Among neighbours there may be few who are quick enough.
        let is_free = self.single_limit_ns == u64::MAX;
        let mut orders = self.orders(workers).into_iter();
        let mut quick = (!is_free).then(|| workers.to_vec());
        std::iter::from_fn(move || {
            if let Some(workers) = quick.take()
                && let Some(groups) = self.quick_ones(&workers)
            {
                return Some(groups);
            }
            orders.find_map(|order| self.neighbours(&order))
        })
    }

    pub(super) fn sum(&mut self, groups: &[Members], care: Care) -> f64 {
        groups.iter().map(|group| self.worth(group, care).unwrap_or(0.0)).sum()
    }

    /// The quickest pipeline, the quickest of the other workers, and so on.
    fn quick_ones(&self, workers: &[usize]) -> Option<Vec<Members>> {
        let mut left = workers.to_vec();
        let mut groups = Vec::new();
        let most = self.wanted.pipelines.map_or(usize::MAX, |pipelines| pipelines as usize);
        while groups.len() < most
            && let Some((ns, members)) = self.quickest(&left)
            && ns <= self.single_limit_ns
        {
            left.retain(|w| !members.contains(w));
            groups.push(members);
        }
        let is_enough = self.wanted.pipelines.is_none() || groups.len() == most;
        (is_enough && !groups.is_empty()).then_some(groups)
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
        self.worth(&sorted(members), Care::Coarse)
    }
}
