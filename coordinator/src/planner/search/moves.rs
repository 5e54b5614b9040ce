//! Which layers stay where they are: the cut of a pipeline with the fewest layers moved.

use std::ops::Range;

use super::super::costs::Place;
use super::super::pipeline::Cut;
use super::{Planned, Search};

/// By workers' numbers.
type Layers = Vec<Range<u32>>;

impl Search<'_> {
    /// Dynamic programme over slots and boundaries: the least (moved layers, time of the slowest
    /// stage) with which the slots up to one hold the layers up to one.
    pub(super) fn fewest_moves(
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

    pub(super) fn layers_moved(&self, cut: &Cut) -> u32 {
        let held = self.held();
        let moved = |(w, layers): &(usize, Range<u32>)| {
            (layers.end - layers.start) - stays(&held[*w], layers.clone()) as u32
        };
        cut.stages.iter().map(moved).sum()
    }
}

/// Layers that two ranges share.
pub(super) fn stays(held: &Range<u32>, layers: Range<u32>) -> usize {
    held.end.min(layers.end).saturating_sub(held.start.max(layers.start)) as usize
}
