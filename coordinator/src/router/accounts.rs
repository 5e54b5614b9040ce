//! What every pipeline has, and what of it is counted for whom.

use std::collections::{BTreeMap, BTreeSet};

use proto::ids::{NumericsClass, PipelineId, SequenceId};

use crate::scheduler::{Caller, Growth, Priority, Sequence};

/// The accounts of all pipelines.
#[derive(Debug)]
pub(super) struct Accounts {
    /// Sequences that may run at once on one pipeline.
    most_running: u32,
    pipelines: BTreeMap<PipelineId, Account>,
}

#[derive(Debug)]
struct Account {
    class: NumericsClass,
    kv_blocks: u32,
    /// What each that runs began with.
    promised: BTreeMap<SequenceId, Promise>,
    /// Their sums, by class. More than `kv_blocks` for a moment when a pipeline goes on with less KV, or
    /// when somebody has to make room.
    sums: [Sum; Priority::ALL.len()],
    shares: Shares,
    /// How they have by now, as the pipeline last said.
    growth: Growth,
    held: bool,
}

#[derive(Clone, Copy, Debug)]
struct Promise {
    blocks: u32,
    may_grow: bool,
    priority: Priority,
    caller: Caller,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    blocks: u32,
    /// How many could grow when they began.
    growing: u32,
    count: u32,
}

/// What the callers of each class have of a pipeline, and who has most.
#[derive(Debug, Default)]
struct Shares {
    callers: BTreeMap<(Priority, Caller), Share>,
    by_blocks: BTreeSet<(Priority, u32, Caller)>,
    by_count: BTreeSet<(Priority, u32, Caller)>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Share {
    blocks: u32,
    count: u32,
}

impl Shares {
    fn of(&self, priority: Priority, caller: Caller) -> Share {
        self.callers.get(&(priority, caller)).copied().unwrap_or_default()
    }

    fn set(&mut self, priority: Priority, caller: Caller, share: Share) {
        let before = self.of(priority, caller);
        self.by_blocks.remove(&(priority, before.blocks, caller));
        self.by_count.remove(&(priority, before.count, caller));
        if share.count == 0 {
            self.callers.remove(&(priority, caller));
            return;
        }
        self.by_blocks.insert((priority, share.blocks, caller));
        self.by_count.insert((priority, share.count, caller));
        self.callers.insert((priority, caller), share);
    }

    /// The most blocks and the largest number of sequences that one caller has.
    fn most(&self, priority: Priority) -> Share {
        let most = |set: &BTreeSet<(Priority, u32, Caller)>| {
            let all =
                (priority, 0, Caller::default())..=(priority, u32::MAX, Caller([u8::MAX; 16]));
            set.range(all).next_back().map_or(0, |&(_, most, _)| most)
        };
        Share { blocks: most(&self.by_blocks), count: most(&self.by_count) }
    }
}

impl Account {
    fn new(class: NumericsClass, kv_blocks: u32) -> Self {
        Self {
            class,
            kv_blocks,
            promised: BTreeMap::new(),
            sums: Default::default(),
            shares: Shares::default(),
            growth: Growth::default(),
            held: false,
        }
    }

    fn can_hold(&self, sequence: &Sequence) -> bool {
        sequence.class().is_none_or(|class| class == self.class)
            && sequence.blocks_at_most() <= self.kv_blocks
    }

    /// What is taken that somebody of this class cannot have: batch makes room for interactive ones.
    fn taken_from(&self, priority: Priority) -> Sum {
        let [interactive, batch] = self.sums;
        let Growth { blocks, grown_up, batch_blocks, batch_grown_up } = self.growth;
        let (sum, growth, grown_up) = match priority {
            Priority::Interactive => {
                (interactive, blocks - batch_blocks, grown_up.saturating_sub(batch_grown_up))
            }
            Priority::Batch => (interactive.and(batch), blocks, grown_up),
        };
        let used = i64::from(sum.blocks).saturating_add(growth).max(0);
        Sum {
            blocks: u32::try_from(used).unwrap_or(u32::MAX),
            growing: sum.growing.saturating_sub(grown_up),
            count: sum.count,
        }
    }

    fn used(&self) -> u32 {
        self.taken_from(Priority::Batch).blocks
    }

    fn free(&self) -> u32 {
        self.kv_blocks.saturating_sub(self.used())
    }

    /// Whether a sequence has the blocks to begin with beside what is `taken`, and one for each that
    /// may grow, as the pipeline's scheduler keeps them.
    fn has_blocks(&self, sequence: &Sequence, begin: u32, taken: Sum) -> bool {
        let may_grow = sequence.may_outgrow(sequence.blocks_to_begin());
        let kept = taken.growing + u32::from(may_grow && taken.growing > 0);
        begin.saturating_add(kept) <= self.kv_blocks.saturating_sub(taken.blocks)
    }

    /// Whether there is room for a sequence.
    fn has_room(&self, sequence: &Sequence, begin: u32, most_running: u32) -> bool {
        let taken = self.taken_from(Priority::Batch);
        !self.held && taken.count < most_running && self.has_blocks(sequence, begin, taken)
    }

    /// Whether others have to make room for a sequence: batch for interactive ones, or a caller who has
    /// more even without one of his than this one's with it.
    fn makes_room(&self, sequence: &Sequence, begin: u32, most_running: u32) -> bool {
        let priority = sequence.priority();
        let taken = self.taken_from(priority);
        let own = self.shares.of(priority, sequence.caller());
        let most = self.shares.most(priority);
        // Those who were sent before and for whom somebody makes room just now. Those who were
        // preempted there want blocks, too, but wait for their turn.
        let over = taken.count.saturating_sub(most_running);
        let over_blocks = self.sums[priority as usize].blocks.saturating_sub(self.kv_blocks);
        let has_place = taken.count < most_running
            || most.count.saturating_sub(over) > own.count.saturating_add(1);
        let has_blocks = self.has_blocks(sequence, begin, taken)
            || most.blocks.saturating_sub(over_blocks) > own.blocks.saturating_add(begin);
        !self.held && has_place && has_blocks
    }

    /// Whether a sequence's caller would have less with it than the one for whom the pipeline is kept
    /// free has: of the same class, for others do not pass.
    fn has_less(&self, sequence: &Sequence, begin: u32, kept: Kept) -> bool {
        let priority = sequence.priority();
        let own = self.shares.of(priority, sequence.caller());
        let other = self.shares.of(priority, kept.caller);
        kept.priority == priority
            && other.count > own.count.saturating_add(1)
            && other.blocks > own.blocks.saturating_add(begin)
    }

    fn add(&mut self, promise: Promise, sign: i32) {
        let Promise { blocks, may_grow, priority, caller } = promise;
        let change = |value: &mut u32, by: u32| {
            *value = if sign > 0 { *value + by } else { *value - by };
        };
        let sum = &mut self.sums[priority as usize];
        change(&mut sum.blocks, blocks);
        change(&mut sum.growing, u32::from(may_grow));
        change(&mut sum.count, 1);
        let mut share = self.shares.of(priority, caller);
        change(&mut share.blocks, blocks);
        change(&mut share.count, 1);
        self.shares.set(priority, caller, share);
    }
}

impl Sum {
    fn and(self, other: Self) -> Self {
        Self {
            blocks: self.blocks.saturating_add(other.blocks),
            growing: self.growing + other.growing,
            count: self.count + other.count,
        }
    }
}

/// One who looks for room.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seeker<'s> {
    pub(super) sequence: &'s Sequence,
    /// The pipeline that was last sent the beginning of its prompt, and how many blocks that is: those it
    /// shares.
    pub(super) home: Option<(PipelineId, usize)>,
}

impl Seeker<'_> {
    /// Blocks that it begins with on a pipeline and that others have not filled.
    fn begin_on(&self, pipeline: PipelineId) -> u32 {
        let begin = self.sequence.blocks_to_begin();
        match self.home {
            // The last known token is computed in any case.
            Some((home, blocks)) if home == pipeline => {
                begin.saturating_sub(u32::try_from(blocks).unwrap_or(u32::MAX)).max(1)
            }
            _ => begin,
        }
    }
}

/// A pipeline that is kept free for one who waits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kept {
    pipeline: PipelineId,
    priority: Priority,
    caller: Caller,
}

/// Whether there may be room for a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// Sooner or later.
    SomeTime,
    /// Not on these pipelines.
    Never,
}

fn is_kept(kept_free: &[Kept], pipeline: PipelineId) -> bool {
    kept_free.iter().any(|kept| kept.pipeline == pipeline)
}

impl Accounts {
    pub(super) fn new(most_running: u32) -> Self {
        Self { most_running, pipelines: BTreeMap::new() }
    }

    pub(super) fn set(&mut self, pipeline: PipelineId, kv_blocks: u32, class: NumericsClass) {
        let account = self.pipelines.entry(pipeline);
        let account = account.or_insert_with(|| Account::new(class, kv_blocks));
        (account.kv_blocks, account.class) = (kv_blocks, class);
    }

    pub(super) fn remove(&mut self, pipeline: PipelineId) {
        self.pipelines.remove(&pipeline);
    }

    /// Whether that changed anything.
    pub(super) fn hold(&mut self, pipeline: PipelineId, hold: bool) -> bool {
        let account = self.pipelines.get_mut(&pipeline);
        account.is_some_and(|account| std::mem::replace(&mut account.held, hold) != hold)
    }

    pub(super) fn is_idle(&self, pipeline: PipelineId) -> bool {
        self.pipelines.get(&pipeline).is_none_or(|account| account.promised.is_empty())
    }

    /// Class and blocks of the pipeline with the most KV, of those that have `class`.
    pub(super) fn largest(&self, class: Option<NumericsClass>) -> Option<(NumericsClass, u32)> {
        self.pipelines
            .values()
            .filter(|account| class.is_none_or(|class| class == account.class))
            .map(|account| (account.class, account.kv_blocks))
            // Of equal ones the first, so that the choice does not change when one is added.
            .reduce(|most, next| if next.1 > most.1 { next } else { most })
    }

    /// Blocks of the smallest pipeline of a class that has so many.
    pub(super) fn least_that_holds(&self, class: NumericsClass, blocks: u32) -> Option<u32> {
        let accounts = self.pipelines.values();
        let holds =
            accounts.filter(|account| account.class == class && account.kv_blocks >= blocks);
        holds.map(|account| account.kv_blocks).min()
    }

    pub(super) fn room_for(&self, sequence: &Sequence) -> Room {
        match self.pipelines.values().any(|account| account.can_hold(sequence)) {
            true => Room::SomeTime,
            false => Room::Never,
        }
    }

    /// Whether a pipeline that somebody new may go to can hold a sequence, now or sooner or later.
    pub(super) fn is_open_to(&self, sequence: &Sequence) -> bool {
        self.pipelines.values().any(|account| !account.held && account.can_hold(sequence))
    }

    /// The pipeline with the most free KV in proportion among those that have room and are not
    /// kept free for somebody else, or else among those where others make room; of equal ones the one
    /// where fewer run, then the first.
    pub(super) fn choose(&self, seeker: Seeker<'_>, kept_free: &[Kept]) -> Option<PipelineId> {
        let (sequence, most_running) = (seeker.sequence, self.most_running);
        let best = self.freest(seeker, kept_free, |account, begin| {
            account.has_room(sequence, begin, most_running)
        });
        let best = best.or_else(|| {
            self.freest(seeker, kept_free, |account, begin| {
                account.makes_room(sequence, begin, most_running)
            })
        });
        best.or_else(|| {
            // Past those who have more.
            let passes = |kept: &&Kept| {
                let account = self.pipelines.get(&kept.pipeline);
                account.is_some_and(|account| {
                    let begin = seeker.begin_on(kept.pipeline);
                    account.can_hold(sequence)
                        && account.has_less(sequence, begin, **kept)
                        && account.makes_room(sequence, begin, most_running)
                })
            };
            kept_free.iter().find(passes).map(|kept| kept.pipeline)
        })
    }

    fn freest(
        &self,
        seeker: Seeker<'_>,
        kept_free: &[Kept],
        takes: impl Fn(&Account, u32) -> bool,
    ) -> Option<PipelineId> {
        let candidates = self.pipelines.iter().filter(|(id, account)| {
            let can = account.can_hold(seeker.sequence);
            can && !is_kept(kept_free, **id) && takes(account, seeker.begin_on(**id))
        });
        let freer = |a: &Account, b: &Account| {
            let of_a = u64::from(a.free()) * u64::from(b.kv_blocks);
            let of_b = u64::from(b.free()) * u64::from(a.kv_blocks);
            of_a.cmp(&of_b).then(b.promised.len().cmp(&a.promised.len()))
        };
        let best = candidates.reduce(|best, next| match freer(next.1, best.1) {
            std::cmp::Ordering::Greater => next,
            _ => best,
        });
        best.map(|(&id, _)| id)
    }

    /// Whether a sequence may go to a pipeline now, and nobody has to make room for it.
    pub(super) fn has_room(
        &self,
        pipeline: PipelineId,
        seeker: Seeker<'_>,
        kept_free: &[Kept],
    ) -> bool {
        let (sequence, begin) = (seeker.sequence, seeker.begin_on(pipeline));
        let account = self.pipelines.get(&pipeline);
        let account = account.filter(|account| account.can_hold(sequence));
        account.is_some_and(|account| account.has_room(sequence, begin, self.most_running))
            && !is_kept(kept_free, pipeline)
    }

    /// Whether more of a pipeline's KV is taken than of another's, by half of it all.
    pub(super) fn is_much_fuller(&self, pipeline: PipelineId, than: PipelineId) -> bool {
        let of = |id| self.pipelines.get(&id).map(|account| (account.used(), account.kv_blocks));
        let (Some((used, all)), Some((used_there, all_there))) = (of(pipeline), of(than)) else {
            return false;
        };
        let [used, all, used_there, all_there] = [used, all, used_there, all_there].map(u128::from);
        2 * used * all_there > 2 * used_there * all + all * all_there
    }

    /// How many run on a pipeline.
    pub(super) fn running_count(&self, pipeline: PipelineId) -> usize {
        self.pipelines.get(&pipeline).map_or(0, |account| account.promised.len())
    }

    /// Notes the pipelines on which nobody may overtake a sequence.
    pub(super) fn keep_free_for(&self, sequence: &Sequence, kept_free: &mut Vec<Kept>) {
        let (priority, caller) = (sequence.priority(), sequence.caller());
        for (&pipeline, account) in &self.pipelines {
            let can = !account.held && account.can_hold(sequence);
            if can && !is_kept(kept_free, pipeline) {
                kept_free.push(Kept { pipeline, priority, caller });
            }
        }
    }

    /// Pipelines that somebody new may go to.
    pub(super) fn open_count(&self) -> usize {
        self.pipelines.values().filter(|account| !account.held).count()
    }

    /// Counts what a sequence begins with.
    pub(super) fn promise(&mut self, pipeline: PipelineId, sequence: &mut Sequence) {
        let blocks = sequence.promise();
        let may_grow = sequence.may_outgrow(blocks);
        let (priority, caller) = (sequence.priority(), sequence.caller());
        let promise = Promise { blocks, may_grow, priority, caller };
        if let Some(account) = self.pipelines.get_mut(&pipeline) {
            account.promised.insert(sequence.id(), promise);
            account.add(promise, 1);
        }
    }

    /// How those who run on a pipeline have grown since they began.
    pub(super) fn set_growth(&mut self, pipeline: PipelineId, growth: Growth) {
        if let Some(account) = self.pipelines.get_mut(&pipeline) {
            account.growth = growth;
        }
    }

    pub(super) fn release(&mut self, pipeline: PipelineId, sequence: SequenceId) {
        if let Some(account) = self.pipelines.get_mut(&pipeline)
            && let Some(promise) = account.promised.remove(&sequence)
        {
            account.add(promise, -1);
        }
    }

    /// Blocks of all pipelines, and how many of them are not free.
    pub(super) fn totals(&self) -> (u32, u32) {
        self.pipelines.values().fold((0, 0), |(total, used), account| {
            let of_it = account.used().min(account.kv_blocks);
            (total.saturating_add(account.kv_blocks), used.saturating_add(of_it))
        })
    }
}
