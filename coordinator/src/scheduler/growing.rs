//! KV that grows: who gets blocks when, and who gives his back when they run out.
//!
//! A sequence begins with blocks for the tokens that are known and one more, and takes a block
//! whenever its answer has filled the last. When none is free, the one that matters least (batch
//! before interactive, then the last that came) gives its blocks back, and begins again from its
//! token log once there is room: with the same tokens. Whoever came first of the interactive ones is
//! never asked, and the router takes none that needs more than there is, so somebody always ends.

#[cfg(test)]
use std::collections::BTreeMap;

use proto::ids::SequenceId;

use super::prefix::Prefix;
use super::{Growth, PipelineScheduler, Sequence, Stand};
use crate::tick::Tick;

/// How those stand who hold blocks.
#[derive(Debug, Default)]
pub(super) struct Holders {
    /// May need more.
    growing: u32,
    /// Hold all that they ever will, and began with less.
    grown_up: u32,
}

impl Holders {
    fn add(&mut self, sequence: &Sequence) {
        self.growing += u32::from(sequence.is_growing());
        self.grown_up += u32::from(sequence.is_grown_up());
    }

    /// Before its blocks change.
    pub(super) fn take(&mut self, sequence: &Sequence) {
        self.growing -= u32::from(sequence.is_growing());
        self.grown_up -= u32::from(sequence.is_grown_up());
    }
}

impl PipelineScheduler {
    /// Gives blocks to those who arrive, in their order.
    pub(super) fn let_in(&mut self, now: Tick) {
        while let Some(id) = self.arriving.front() {
            let Some(sequence) = self.sequences.get(&id) else { return };
            let Prefix { mut blocks, awaited } = self.find_prefix(sequence);
            if let Some(key) = awaited {
                self.await_prefix(id, key);
                continue;
            }
            let (begin, priority) = (sequence.blocks_to_begin(), sequence.priority());
            let needed = begin - blocks.len() as u32;
            let kept = self.kept_for_growth(sequence.may_outgrow(begin));
            let pool = &mut self.active.blocks;
            if needed + kept + pool.free_among(&blocks) > pool.free_count() {
                return;
            }
            let shared = blocks.len();
            pool.share(&blocks);
            let Some(own) = pool.take(needed) else { return pool.give_back(&blocks) };
            blocks.extend(own);
            let Some(sequence) = self.sequences.get_mut(&id) else { return };
            let (queried, hit) = sequence.admit(blocks, shared, now);
            self.holders.add(sequence);
            if self.limits.prefix_cache {
                self.totals.prefix_queries += u64::from(queried);
                self.totals.prefix_hits += u64::from(hit);
            }
            self.begin_demand -= u64::from(begin);
            self.arriving.pop_front();
            // Whoever waited for another's blocks, or begins again, is not behind those who came since.
            let ticket = self.prefilling.insert_by_arrival(priority, id);
            self.sequences.get_mut(&id).expect("it was let in").place =
                Some((Stand::Prefilling, ticket));
            self.compute_prefix(id, shared);
        }
    }

    /// Blocks that stay free when one more begins: one for each that may grow, so that it does not
    /// push out at once whom it should run beside. None when nobody runs.
    fn kept_for_growth(&self, may_grow: bool) -> u32 {
        let growing = self.holders.growing;
        growing + u32::from(may_grow && growing > 0)
    }

    /// Gives a sequence the blocks for its next token. `false` if it has to wait for them, or had to
    /// give up its own.
    pub(super) fn grow(&mut self, id: SequenceId, now: Tick) -> bool {
        loop {
            let Some(sequence) = self.sequences.get_mut(&id) else { return false };
            if sequence.blocks.is_empty() {
                return false;
            }
            let lacking = sequence.blocks_lacking();
            if lacking == 0 {
                return true;
            }
            if let Some(more) = self.active.blocks.take(lacking) {
                self.holders.take(sequence);
                sequence.blocks.extend(more);
                self.holders.add(sequence);
                return true;
            }
            // Somebody's blocks come back with the steps that name them.
            if self.active.blocks.returning_count() > 0 || self.probe.is_some() {
                return false;
            }
            let Some(least) = self.matters_least() else { return false };
            self.totals.preempted += 1;
            self.begin_again(least, now);
        }
    }

    /// Who gives his blocks back first: batch before interactive, then the last that came.
    fn matters_least(&self) -> Option<SequenceId> {
        let holding = self.sequences.values().filter(|sequence| !sequence.blocks.is_empty());
        holding.max_by_key(|sequence| (sequence.priority(), sequence.id())).map(|s| s.id())
    }

    /// Takes a sequence's blocks: it arrives again, before those that came after it, to be replayed
    /// from its token log. Steps on their way may still name the blocks: it gets others, or these once
    /// they are free.
    pub(super) fn begin_again(&mut self, id: SequenceId, now: Tick) {
        let Some(mut sequence) = self.sequences.remove(&id) else { return };
        if let Some((stand, ticket)) = sequence.place.take() {
            self.queue(stand).remove(ticket);
        }
        self.leave_prefix(&mut sequence);
        self.holders.take(&sequence);
        self.active.blocks.give_back(&sequence.blocks);
        sequence.begin_again(now);
        self.begin_demand += u64::from(sequence.blocks_to_begin());
        self.arrive(sequence);
    }

    /// Puts a sequence among those who wait for their first blocks: interactive before batch, then
    /// in order of arrival at the router, however often it has begun.
    pub(super) fn arrive(&mut self, mut sequence: Box<Sequence>) {
        let (id, priority) = (sequence.id(), sequence.priority());
        sequence.place = Some((Stand::Arriving, self.arriving.insert_by_arrival(priority, id)));
        self.sequences.insert(id, sequence);
    }

    /// What the router has not counted of those who are here.
    pub fn growth(&self) -> Growth {
        let taken = u64::from(self.blocks_taken()) + self.begin_demand;
        let blocks = taken as i64 - self.promised as i64;
        Growth { blocks, grown_up: self.holders.grown_up }
    }
}

impl PipelineScheduler {
    /// Blocks that somebody holds. A probe's is none of them: it gives way to anybody.
    pub(super) fn blocks_taken(&self) -> u32 {
        let blocks = &self.active.blocks;
        let probe = self.probe.and_then(|id| self.sequences.get(&id));
        let probing = probe.map_or(0, |probe| probe.blocks.len() as u32);
        (blocks.total() - blocks.free_count()).saturating_sub(probing)
    }
}

#[cfg(test)]
impl PipelineScheduler {
    /// Whether rows of a sequence were sent since it last began.
    pub(crate) fn has_run(&self, id: SequenceId) -> bool {
        self.sequences.get(&id).is_some_and(|sequence| sequence.has_run())
    }

    /// What is counted as things happen is what is there.
    pub(crate) fn check_counts(&self) {
        let sum = |of: &dyn Fn(&Sequence) -> u32| -> u64 {
            self.sequences.values().map(|sequence| u64::from(of(sequence))).sum()
        };
        let is = u32::from;
        assert_eq!(u64::from(self.holders.growing), sum(&|s| is(s.is_growing())));
        assert_eq!(u64::from(self.holders.grown_up), sum(&|s| is(s.is_grown_up())));
        assert_eq!(self.promised, sum(&|s| s.promised()));
        let begins = |s: &Sequence| if s.blocks.is_empty() { s.blocks_to_begin() } else { 0 };
        assert_eq!(self.begin_demand, sum(&begins));
        let mut holders = BTreeMap::new();
        for &block in self.sequences.values().flat_map(|sequence| &sequence.blocks) {
            *holders.entry(block).or_default() += 1;
        }
        self.active.blocks.check(&holders);
        self.check_prefixes();
    }
}

impl Sequence {
    fn is_growing(&self) -> bool {
        !self.blocks.is_empty() && self.may_outgrow(self.blocks.len() as u32)
    }

    /// The router counts it among those that grow, which is over.
    fn is_grown_up(&self) -> bool {
        let grew = self.promised() > 0 && self.may_outgrow(self.promised());
        grew && !self.blocks.is_empty() && !self.is_growing()
    }
}
