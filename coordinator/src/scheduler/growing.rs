//! KV that grows: who gets blocks when, and who gives his back when they run out.
//!
//! A sequence begins with blocks for the tokens that are known and one more, and takes a block
//! whenever its answer has filled the last. When none is free, the one that matters least (batch
//! before interactive, then of the caller who holds most, then the last that came) gives its blocks
//! back, and begins again from its token log once there is room: with the same tokens. Whoever came
//! first is never asked, and the router takes none that needs more than there is, so somebody
//! always ends.
//!
//! Who begins may have others make room: interactive ones batch, and a caller one who has more. Those go
//! back to the router.

use std::collections::BTreeMap;

use proto::ids::SequenceId;

use super::prefix::Prefix;
use super::queue::Ticket;
#[cfg(test)]
use super::shares::Share;
use super::{Caller, Growth, PipelineScheduler, Priority, Sequence, Stand};
use crate::tick::Tick;

/// Those behind one who has to wait that are looked at, whether a caller with less may go before: twice as many
/// as run by default, in a tenth of a millisecond.
const LOOK_AHEAD: usize = 512;

/// What becomes of one who is to begin.
enum Begun {
    /// It has its blocks, or waits for another's prefix, and does not stand here any more.
    Moved,
    /// Somebody made room: try again.
    Again,
    /// It has to wait.
    Waits,
}

impl PipelineScheduler {
    /// Gives blocks to those who arrive, in their order. Behind one who has to wait only those begin
    /// whose callers have less than his.
    pub(super) fn let_in(&mut self, now: Tick) {
        let (mut after, mut looked_at): (Option<Ticket>, _) = (None, 0);
        let mut waits: Option<(Priority, u32)> = None;
        while let Some((ticket, id)) = self.arriving.next(after) {
            let Some(sequence) = self.sequences.get(&id) else { return };
            let (priority, begin) = (sequence.priority(), sequence.blocks_to_begin());
            let own = self.holders.share(priority, sequence.caller()).held_blocks;
            let may_pass = waits.is_none_or(|(class, holds)| {
                class == priority && own.saturating_add(begin) < holds
            });
            match may_pass.then(|| self.begin(id, now)) {
                Some(Begun::Moved | Begun::Again) => continue,
                Some(Begun::Waits) | None => {}
            }
            let (_, holds) = waits.unwrap_or((priority, own));
            waits = Some((priority, holds.min(own)));
            looked_at += 1;
            if looked_at == LOOK_AHEAD || waits.is_some_and(|(_, holds)| holds == 0) {
                return;
            }
            after = Some(ticket);
        }
    }

    fn begin(&mut self, id: SequenceId, now: Tick) -> Begun {
        let Some(sequence) = self.sequences.get(&id) else { return Begun::Waits };
        let Prefix { mut blocks, awaited } = self.find_prefix(sequence);
        if let Some(key) = awaited {
            self.await_prefix(id, key);
            return Begun::Moved;
        }
        let (begin, priority) = (sequence.blocks_to_begin(), sequence.priority());
        let may_grow = sequence.may_outgrow(begin);
        let needed = begin - blocks.len() as u32;
        let pool = &self.active.blocks;
        let needed_free = needed + pool.free_among(&blocks);
        if needed_free > pool.free_count() {
            // Some come back with the steps that name them.
            let awaits = needed_free <= pool.free_count() + pool.returning_count();
            return match !awaits && self.push_out_for(id, now) {
                true => Begun::Again,
                false => Begun::Waits,
            };
        }
        let kept = self.kept_for_growth(priority, may_grow);
        if needed_free + kept > self.active.blocks.free_count() + self.yielding(priority)
            && !self.has_less_than_another(id)
        {
            return Begun::Waits;
        }
        let shared = blocks.len();
        let pool = &mut self.active.blocks;
        pool.share(&blocks);
        let Some(own) = pool.take(needed) else {
            pool.give_back(&blocks);
            return Begun::Waits;
        };
        blocks.extend(own);
        let Some(sequence) = self.sequences.get_mut(&id) else { return Begun::Waits };
        let (queried, hit) = sequence.admit(blocks, shared, now);
        self.holders.add(sequence);
        if self.limits.prefix_cache {
            self.totals.prefix_queries += u64::from(queried);
            self.totals.prefix_hits += u64::from(hit);
        }
        if hit > 0 {
            let caller = sequence.caller();
            *self.served.entry((priority, caller)).or_default() -= i64::from(hit);
        }
        self.begin_demand[priority as usize] -= u64::from(begin);
        let line = self.holders.begin_to_read(sequence);
        if let Some((stand, ticket)) = sequence.place.take() {
            self.queue(stand).remove(ticket);
        }
        // Whoever waited for another's blocks, or begins again, is not behind those who came since.
        let ticket = self.prefilling.insert_in_line(priority, line, id);
        self.sequences.get_mut(&id).expect("it was let in").place =
            Some((Stand::Prefilling, ticket));
        self.compute_prefix(id, shared);
        Begun::Moved
    }

    /// Blocks that stay free when one more begins: one for each that may grow, so that it does not
    /// push out at once whom it should run beside. None when nobody runs. Batch gives way to
    /// interactive ones, so nothing is kept for it from them.
    fn kept_for_growth(&self, priority: Priority, may_grow: bool) -> u32 {
        let growing = match priority {
            Priority::Interactive => self.holders.class(Priority::Interactive).growing,
            Priority::Batch => self.holders.growing(),
        };
        growing + u32::from(may_grow && growing > 0)
    }

    /// Blocks that others give back when one of this class needs them.
    fn yielding(&self, priority: Priority) -> u32 {
        match priority {
            Priority::Interactive => self.holders.class(Priority::Batch).held_blocks,
            Priority::Batch => 0,
        }
    }

    /// Whether another caller of its class has more than its own would have with it.
    fn has_less_than_another(&self, id: SequenceId) -> bool {
        let Some(sequence) = self.sequences.get(&id) else { return false };
        let (priority, caller) = (sequence.priority(), sequence.caller());
        let own = self.holders.share(priority, caller).held_blocks;
        let own = own.saturating_add(sequence.blocks_to_begin());
        self.holders.callers(priority).any(|(_, share)| share.held_blocks > own)
    }

    /// Has somebody make room for one that is to begin: for an interactive one the last that came of
    /// batch; else the last of the caller who has most in its class, if he has as much without it as
    /// this one's caller with it. So every exchange makes shares more equal, and none is undone by
    /// another. Whether somebody did.
    fn push_out_for(&mut self, id: SequenceId, now: Tick) -> bool {
        let Some(sequence) = self.sequences.get(&id) else { return false };
        let (priority, caller) = (sequence.priority(), sequence.caller());
        let holds = |sequence: &&Sequence| !sequence.blocks.is_empty() && !sequence.is_probe();
        if priority == Priority::Interactive
            && let Some(batch) = self.last_of(Priority::Batch, None, holds)
        {
            self.push_out(batch, now);
            return true;
        }
        let own = self.holders.share(priority, caller).held_blocks;
        let own = own.saturating_add(sequence.blocks_to_begin());
        let most = self.holders.callers(priority).max_by_key(|(_, share)| share.held_blocks);
        let Some((other, share)) = most.filter(|&(other, _)| other != caller) else { return false };
        let last = self.last_of(priority, Some(other), holds);
        let Some(last) = last.and_then(|id| self.sequences.get(&id)) else { return false };
        if share.held_blocks.saturating_sub(last.held_blocks()) < own {
            return false;
        }
        self.push_out(last.id(), now);
        true
    }

    /// Has somebody give his place back while more are here than may be: of batch if there is any, else of
    /// all, the last that came of the caller who has most. The router sends one more only for a caller who
    /// still has less than that one with it.
    pub(super) fn keep_places(&mut self, now: Tick) {
        while self.stats().running > self.limits.running_requests {
            let mut counts = BTreeMap::<_, u32>::new();
            for sequence in self.sequences.values().filter(|sequence| !sequence.is_probe()) {
                *counts.entry((sequence.priority(), sequence.caller())).or_default() += 1;
            }
            // Of one alone the router counts the places.
            let is_one = counts.len() < 2;
            let most = counts.into_iter().max_by_key(|&((priority, _), count)| (priority, count));
            let Some(((priority, caller), _)) = most.filter(|_| !is_one) else { return };
            let Some(last) = self.last_of(priority, Some(caller), |s| !s.is_probe()) else {
                return;
            };
            self.push_out(last, now);
        }
    }

    /// The last that came of a class, and of a caller.
    fn last_of(
        &self,
        priority: Priority,
        caller: Option<Caller>,
        is: impl Fn(&&Sequence) -> bool,
    ) -> Option<SequenceId> {
        let is_one = |sequence: &&Sequence| {
            let is_his = caller.is_none_or(|caller| sequence.caller() == caller);
            sequence.priority() == priority && is_his && is(sequence)
        };
        self.sequences.values().rev().map(|sequence| &**sequence).find(is_one).map(Sequence::id)
    }

    /// A sequence goes back to the router, to be replayed from its token log where there is room.
    fn push_out(&mut self, id: SequenceId, now: Tick) {
        let Some(mut sequence) = self.detach(id) else { return };
        self.totals.preempted += 1;
        sequence.restart(now);
        self.pushed_out.push(sequence);
    }

    /// Those who had to make room since this was last asked: they go back to the router.
    pub fn take_pushed_out(&mut self) -> Vec<Box<Sequence>> {
        std::mem::take(&mut self.pushed_out)
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

    /// Who gives his blocks back first: batch before interactive, then of the caller who holds most,
    /// then the last that came; never the first of all, if there is another.
    fn matters_least(&self) -> Option<SequenceId> {
        let holding = || self.sequences.values().filter(|sequence| !sequence.blocks.is_empty());
        let first = holding().map(|sequence| (sequence.priority(), sequence.id())).min()?;
        let others = holding().filter(|s| (s.priority(), s.id()) != first);
        let least = others.max_by_key(|sequence| {
            let (priority, caller) = (sequence.priority(), sequence.caller());
            let held = self.holders.share(priority, caller).held_blocks;
            // Who is not read loses nothing by it.
            (sequence.is_parked, priority, held, caller, sequence.id())
        });
        Some(least.map_or(first.1, |sequence| sequence.id()))
    }

    /// Takes a sequence's blocks: it arrives again, before those that came after it, to be replayed
    /// from its token log. Steps on their way may still name the blocks: it gets others, or these once
    /// they are free.
    pub(super) fn begin_again(&mut self, id: SequenceId, now: Tick) {
        let Some(mut sequence) = self.sequences.remove(&id) else { return };
        self.leave_place(&mut sequence);
        self.leave_prefix(&mut sequence);
        self.holders.take(&sequence);
        self.holders.leave(&sequence);
        self.active.blocks.give_back(&sequence.blocks);
        sequence.begin_again(now);
        let demand = &mut self.begin_demand[sequence.priority() as usize];
        *demand += u64::from(sequence.blocks_to_begin());
        self.arrive(sequence);
    }

    /// A sequence stands in no queue any more.
    pub(super) fn leave_place(&mut self, sequence: &mut Sequence) {
        if std::mem::take(&mut sequence.is_parked) {
            self.holders.unpark(sequence.priority(), sequence.caller());
        }
        if let Some((stand, ticket)) = sequence.place.take() {
            self.queue(stand).remove(ticket);
            if stand == Stand::Prefilling && !sequence.is_probe() {
                self.holders.end_to_read(sequence.priority(), sequence.caller());
            }
        }
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
        let taken = u64::from(self.blocks_taken()) + self.begin_demand.iter().sum::<u64>();
        let promised: u64 = self.promised.iter().sum();
        let batch = self.holders.class(Priority::Batch);
        let of_batch = Priority::Batch as usize;
        let held = batch.held_blocks.min(self.blocks_taken());
        let batch_taken = u64::from(held) + self.begin_demand[of_batch];
        Growth {
            blocks: taken as i64 - promised as i64,
            grown_up: self.holders.grown_up(),
            batch_blocks: batch_taken as i64 - self.promised[of_batch] as i64,
            batch_grown_up: batch.grown_up,
        }
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
        assert_eq!(u64::from(self.holders.growing()), sum(&|s| is(s.is_growing())));
        assert_eq!(u64::from(self.holders.grown_up()), sum(&|s| is(s.is_grown_up())));
        assert_eq!(self.promised.iter().sum::<u64>(), sum(&|s| s.promised()));
        let begins = |s: &Sequence| if s.blocks.is_empty() { s.blocks_to_begin() } else { 0 };
        assert_eq!(self.begin_demand.iter().sum::<u64>(), sum(&begins));
        let mut holders = BTreeMap::new();
        for &block in self.sequences.values().flat_map(|sequence| &sequence.blocks) {
            *holders.entry(block).or_default() += 1;
        }
        self.active.blocks.check(&holders);
        self.check_prefixes();
        self.check_shares();
    }

    fn check_shares(&self) {
        let begun = self.sequences.values().filter(|s| !s.blocks.is_empty() && !s.is_probe());
        let mut found = BTreeMap::<_, (u32, u32, u32, u32)>::new();
        for sequence in begun {
            let share = found.entry((sequence.priority(), sequence.caller())).or_default();
            let reads = matches!(sequence.place, Some((Stand::Prefilling, _)));
            share.0 += 1;
            share.1 += u32::from(reads);
            share.2 += sequence.held_blocks();
            share.3 += u32::from(sequence.is_parked);
        }
        let counted = Priority::ALL.into_iter().flat_map(|priority| {
            self.holders.callers(priority).map(move |(caller, share)| {
                let Share { begun, prefilling, held_blocks, parked, .. } = share;
                ((priority, caller), (begun, prefilling, held_blocks, parked))
            })
        });
        assert_eq!(counted.collect::<BTreeMap<_, _>>(), found, "shares of callers");
    }
}
