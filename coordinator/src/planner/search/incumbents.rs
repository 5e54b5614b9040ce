//! What serves already: pipelines stay as they are, or move few layers, where that costs little.

use super::super::Incumbent;
use super::super::costs::Place;
use super::super::grouping::{Grouping, Members};
use super::super::pipeline::{Cut, ideal, pace, single_ns};
use super::{KEEP_PERCENT, Origin, Planned, Search, grown, total};

/// In pipelines of more stages a new worker goes to the end, not where the fewest layers move.
const INSERT_STAGES: usize = 16;

impl<'a> Search<'a> {
    pub(super) fn incumbents(&self) -> &'a [Incumbent] {
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
    pub(super) fn keeping(&self, grouping: &mut Grouping<'_>, enough: f64) -> Option<Vec<Planned>> {
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
    pub(super) fn moved(&self, planned: Planned) -> Planned {
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
}
