//! The search behind [`plan`](super::plan): which bound is feasible, and who takes what then.

use super::{Assignment, ModelCosts, Options, PlanError, STEP_ROWS, Stage, WorkerSpec};

/// One planning problem.
pub(super) struct Search<'a> {
    model: &'a ModelCosts,
    options: &'a Options,
    /// By id.
    pub(super) workers: Vec<&'a WorkerSpec>,
    min_kv_blocks: u32,
}

/// What a stage holds beside its layers.
#[derive(Clone, Copy, Debug)]
struct Place {
    first: bool,
    last: bool,
}

const MIDDLE: Place = Place { first: false, last: false };
const FIRST: Place = Place { first: true, last: false };
const LAST: Place = Place { first: false, last: true };
const ONLY: Place = Place { first: true, last: true };

/// The place of stage `index` of `count`.
fn place(index: usize, count: usize) -> Place {
    Place { first: index == 0, last: index + 1 == count }
}

impl<'a> Search<'a> {
    pub(super) fn new(
        model: &'a ModelCosts,
        workers: &'a [WorkerSpec],
        options: &'a Options,
    ) -> Self {
        let mut workers: Vec<_> = workers.iter().collect();
        workers.sort_by(|a, b| a.id.cmp(&b.id));
        Self { model, options, workers, min_kv_blocks: options.min_kv_blocks.max(1) }
    }

    /// The least time in ns that the slowest of `stages` stages can take; `None` if memory is short.
    pub(super) fn least_bound(&self, stages: u32) -> Option<u64> {
        let layers = u64::from(self.model.layers);
        let slowest =
            |w: &&WorkerSpec| w.layer_ns.max(1).saturating_mul(layers).saturating_add(w.head_ns);
        let mut enough = self.workers.iter().map(slowest).max()?;
        self.choose(stages, enough, self.min_kv_blocks)?;
        let mut too_small = 0;
        while enough - too_small > 1 {
            let middle = too_small + (enough - too_small) / 2;
            match self.choose(stages, middle, self.min_kv_blocks) {
                Some(_) => enough = middle,
                None => too_small = middle,
            }
        }
        Some(enough)
    }

    /// The stages of a feasible bound, with as much KV as the bound allows.
    pub(super) fn best(&self, stages: u32, bound: u64) -> Vec<Stage> {
        let (mut enough, mut too_many) =
            (self.min_kv_blocks, self.options.max_kv_blocks.max(self.min_kv_blocks) + 1);
        while too_many - enough > 1 {
            let middle = enough + (too_many - enough) / 2;
            match self.choose(stages, bound, middle) {
                Some(_) => enough = middle,
                None => too_many = middle,
            }
        }
        let chosen = self.choose(stages, bound, enough).expect("the bound is feasible");
        let count = chosen.len();
        let mut shares: Vec<u64> = chosen
            .iter()
            .enumerate()
            .map(|(i, &w)| self.share(self.workers[w], place(i, count), bound, enough))
            .collect();
        // The shares may add up to more: relieve the slowest stage, layer by layer.
        for _ in u64::from(self.model.layers)..shares.iter().sum() {
            let slowest = (0..count)
                .filter(|&i| shares[i] > 1)
                .max_by_key(|&i| self.time(self.workers[chosen[i]], place(i, count), shares[i]))
                .expect("more layers than stages");
            shares[slowest] -= 1;
        }
        self.stages(&chosen, &shares)
    }

    /// Workers in stage order whose shares under `bound` and with `blocks` hold all layers, each
    /// at least one.
    fn choose(&self, stages: u32, bound: u64, blocks: u32) -> Option<Vec<usize>> {
        let layers = u64::from(self.model.layers);
        let share = |place: Place| -> Vec<u64> {
            self.workers.iter().map(|w| self.share(w, place, bound, blocks)).collect()
        };
        if stages == 1 {
            let only = share(ONLY);
            return (0..only.len()).find(|&w| only[w] >= layers).map(|w| vec![w]);
        }
        let (middle, first, last) = (share(MIDDLE), share(FIRST), share(LAST));
        // The largest shares of middle stages; equal ones by id.
        let mut order: Vec<usize> = (0..middle.len()).filter(|&w| middle[w] > 0).collect();
        order.sort_by_key(|&w| (std::cmp::Reverse(middle[w]), w));
        let mut rank = vec![usize::MAX; middle.len()];
        let mut sums = vec![0];
        for (i, &w) in order.iter().enumerate() {
            rank[w] = i;
            sums.push(sums[i] + middle[w]);
        }

        let wanted = stages as usize - 2;
        let mut best: Option<(u64, usize, usize)> = None;
        for f in 0..middle.len() {
            for l in 0..middle.len() {
                if f == l || first[f] == 0 || last[l] == 0 {
                    continue;
                }
                // The first `end` of `order` without `f` and `l` are `wanted` workers.
                let inside = |end: usize| usize::from(rank[f] < end) + usize::from(rank[l] < end);
                let mut end = wanted;
                while end - inside(end) < wanted {
                    end += 1;
                }
                if end > order.len() {
                    continue;
                }
                let left_out = |w: usize| if rank[w] < end { middle[w] } else { 0 };
                let sum = first[f] + last[l] + sums[end] - left_out(f) - left_out(l);
                // Of equal pairs the first worker by id begins and the last ends: easy to read.
                if best.is_none_or(|(most, first, _)| sum > most || (sum == most && f == first)) {
                    best = Some((sum, f, l));
                }
            }
        }
        let (sum, f, l) = best?;
        if sum < layers {
            return None;
        }
        let mut inner: Vec<_> =
            order.into_iter().filter(|&w| w != f && w != l).take(wanted).collect();
        inner.sort_unstable();
        Some([vec![f], inner, vec![l]].concat())
    }

    /// Layers that a worker can take in this place if its stage may take `bound` ns and must hold
    /// `blocks` KV blocks.
    fn share(&self, worker: &WorkerSpec, place: Place, bound: u64, blocks: u32) -> u64 {
        let head_ns = self.head_ns(worker, place);
        let Some(bytes) = worker.memory_bytes.checked_sub(self.fixed_bytes(place)) else {
            return 0;
        };
        let Some(time) = bound.checked_sub(head_ns) else { return 0 };
        let kv_bytes = self.model.kv_block_layer_bytes.saturating_mul(u64::from(blocks));
        let by_memory = bytes / self.model.layer_bytes.saturating_add(kv_bytes);
        by_memory.min(time / worker.layer_ns.max(1)).min(u64::from(self.model.layers))
    }

    fn fixed_bytes(&self, place: Place) -> u64 {
        let embedding = if place.first { self.model.embedding_bytes } else { 0 };
        let has_head = place.last || (place.first && self.model.tied_head);
        let head = if has_head { self.model.head_bytes } else { 0 };
        match self.model.tied_head {
            true => embedding.max(head),
            false => embedding.saturating_add(head),
        }
    }

    /// What norm and head take of a step's time in this place, in the mean of many steps.
    fn head_ns(&self, worker: &WorkerSpec, place: Place) -> u64 {
        match (place.first, place.last) {
            (true, true) => worker.head_ns,
            (true, false) if self.model.tied_head => worker.head_ns / 2,
            (false, true) if self.model.tied_head => worker.head_ns.div_ceil(2),
            (false, true) => worker.head_ns,
            _ => 0,
        }
    }

    fn time(&self, worker: &WorkerSpec, place: Place, layers: u64) -> u64 {
        let head_ns = self.head_ns(worker, place);
        worker.layer_ns.max(1).saturating_mul(layers).saturating_add(head_ns)
    }

    fn stages(&self, chosen: &[usize], shares: &[u64]) -> Vec<Stage> {
        let mut next = 0;
        let stage = |(&w, &share): (&usize, &u64)| {
            let begin = next;
            next += share as u32;
            Stage { worker: self.workers[w].id.clone(), layers: begin..next }
        };
        chosen.iter().zip(shares).map(stage).collect()
    }

    fn find(&self, id: &str) -> Option<usize> {
        self.workers.binary_search_by(|w| w.id.as_str().cmp(id)).ok()
    }

    /// The stages that served before with as few layers moved as possible, no stage slower than
    /// `bound`; workers that are gone are replaced by the fastest spare ones or drop out. `None`
    /// if nobody stays or it cannot be done.
    pub(super) fn keep(&self, bound: u64) -> Option<Vec<Stage>> {
        let incumbent = &self.options.incumbent;
        if !incumbent.iter().any(|stage| self.find(&stage.worker).is_some()) {
            return None;
        }
        let mut spare: Vec<usize> = (0..self.workers.len())
            .filter(|&w| incumbent.iter().all(|stage| stage.worker != self.workers[w].id))
            .collect();
        // The fastest is taken first, from the end.
        spare.sort_by_key(|&w| std::cmp::Reverse((self.workers[w].layer_ns, w)));
        let mut slots: Vec<(usize, &Stage)> = incumbent
            .iter()
            .filter_map(|stage| Some((self.find(&stage.worker).or_else(|| spare.pop())?, stage)))
            .collect();
        slots.truncate(self.model.layers as usize);
        if self.options.stages.is_some_and(|stages| stages as usize != slots.len()) {
            return None;
        }
        self.least_moves(&slots, bound)
    }

    /// Dynamic programme over slots and boundaries: `best[end]` is the least (moved layers, time of
    /// the slowest stage) of the slots so far when they hold `0..end`.
    fn least_moves(&self, slots: &[(usize, &Stage)], bound: u64) -> Option<Vec<Stage>> {
        let layers = self.model.layers as usize;
        let mut best = vec![None; layers + 1];
        best[0] = Some((0, 0));
        let mut begins: Vec<Vec<usize>> = Vec::new();
        for (i, &(w, old)) in slots.iter().enumerate() {
            let (worker, place) = (self.workers[w], place(i, slots.len()));
            let most = self.share(worker, place, bound, self.min_kv_blocks) as usize;
            // A spare that stands in for another has none of its layers.
            let held = if old.worker == worker.id { old.layers.clone() } else { 0..0 };
            let mut next = vec![None; layers + 1];
            let mut begin_of = vec![0; layers + 1];
            for end in 1..=layers {
                let fewest = end.saturating_sub(most);
                for (begin, before) in best.iter().enumerate().take(end).skip(fewest) {
                    let &Some((moved, slowest)) = before else { continue };
                    let stays =
                        (end.min(held.end as usize)).saturating_sub(begin.max(held.start as usize));
                    let time: u64 = self.time(worker, place, (end - begin) as u64);
                    let cost = (moved + (end - begin - stays), time.max(slowest));
                    if next[end].is_none_or(|least| cost < least) {
                        next[end] = Some(cost);
                        begin_of[end] = begin;
                    }
                }
            }
            best = next;
            begins.push(begin_of);
        }
        best[layers]?;
        let mut end = layers;
        let mut shares = vec![0; slots.len()];
        for (share, begin_of) in shares.iter_mut().zip(&begins).rev() {
            *share = (end - begin_of[end]) as u64;
            end = begin_of[end];
        }
        let chosen: Vec<_> = slots.iter().map(|&(w, _)| w).collect();
        Some(self.stages(&chosen, &shares))
    }

    /// Adds what follows from the stages.
    pub(super) fn assignment(&self, stages: Vec<Stage>, why: &str) -> Assignment {
        let count = stages.len();
        let mut kv_blocks = self.options.max_kv_blocks.max(self.min_kv_blocks);
        let mut slowest = (0, 0);
        for (i, stage) in stages.iter().enumerate() {
            let worker = self.workers[self.find(&stage.worker).expect("stages name workers")];
            let layers = u64::from(stage.layers.end - stage.layers.start);
            let weights = self.model.layer_bytes * layers + self.fixed_bytes(place(i, count));
            let block_bytes = self.model.kv_block_layer_bytes.max(1) * layers;
            let room = worker.memory_bytes.saturating_sub(weights) / block_bytes;
            kv_blocks = kv_blocks.min(room.try_into().unwrap_or(u32::MAX));
            slowest = slowest.max((self.time(worker, place(i, count), layers), i));
        }
        let (bottleneck_ns, i) = slowest;
        let slow = &stages[i];
        let reason = format!(
            "{count} of {} workers: {why}; the slowest stage is {} with layers {}..{}{}, {:.3} ms for \
             {STEP_ROWS} rows; KV for {} tokens",
            self.workers.len(),
            slow.worker,
            slow.layers.start,
            slow.layers.end,
            match place(i, count) {
                Place { last: true, first } if first || !self.model.tied_head => " and the head",
                Place { first: false, last: false } => "",
                Place { first: true, .. } if !self.model.tied_head => "",
                _ => " and half of the head",
            },
            bottleneck_ns as f64 / 1e6,
            u64::from(kv_blocks) * u64::from(proto::BLOCK_TOKENS),
        );
        Assignment {
            kv_blocks,
            bottleneck_ns,
            predicted_tokens_per_s: f64::from(STEP_ROWS) * 1e9 / bottleneck_ns as f64,
            reason,
            stages,
        }
    }

    pub(super) fn does_not_fit(&self) -> PlanError {
        let model = self.model;
        let kv_blocks = u64::from(self.min_kv_blocks);
        let layer_bytes =
            model.kv_block_layer_bytes.saturating_mul(kv_blocks).saturating_add(model.layer_bytes);
        PlanError::DoesNotFit {
            memory_bytes: self.workers.iter().fold(0, |sum, w| sum.saturating_add(w.memory_bytes)),
            needed_bytes: layer_bytes
                .saturating_mul(u64::from(model.layers))
                .saturating_add(self.fixed_bytes(ONLY)),
            kv_blocks: self.min_kv_blocks,
        }
    }
}
