//! What every pipeline has, and what of it is counted for whom.

use std::collections::BTreeMap;

use proto::ids::{NumericsClass, PipelineId, SequenceId};

use crate::scheduler::{Growth, Sequence};

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
    /// Their sum. More than `kv_blocks` for a moment when a pipeline goes on with less KV.
    sum: u32,
    /// How many of them could grow when they began.
    growing: u32,
    /// How they have by now, as the pipeline last said.
    growth: Growth,
    held: bool,
}

#[derive(Clone, Copy, Debug)]
struct Promise {
    blocks: u32,
    may_grow: bool,
}

impl Account {
    fn can_hold(&self, sequence: &Sequence) -> bool {
        sequence.class().is_none_or(|class| class == self.class)
            && sequence.blocks_at_most() <= self.kv_blocks
    }

    fn used(&self) -> u32 {
        let used = i64::from(self.sum).saturating_add(self.growth.blocks).max(0);
        u32::try_from(used).unwrap_or(u32::MAX)
    }

    fn free(&self) -> u32 {
        self.kv_blocks.saturating_sub(self.used())
    }

    /// One block for each that may grow, as the pipeline's scheduler keeps them.
    fn kept_for_growth(&self, sequence: &Sequence) -> u32 {
        let may_grow = sequence.may_outgrow(sequence.blocks_to_begin());
        let growing = self.growing.saturating_sub(self.growth.grown_up);
        growing + u32::from(may_grow && growing > 0)
    }

    fn has_room(&self, sequence: &Sequence, most_running: u32) -> bool {
        !self.held
            && sequence.blocks_to_begin() + self.kept_for_growth(sequence) <= self.free()
            && self.promised.len() < most_running as usize
    }
}

/// Whether there may be room for a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// Sooner or later.
    SomeTime,
    /// Not on these pipelines.
    Never,
}

impl Accounts {
    pub(super) fn new(most_running: u32) -> Self {
        Self { most_running, pipelines: BTreeMap::new() }
    }

    pub(super) fn set(&mut self, pipeline: PipelineId, kv_blocks: u32, class: NumericsClass) {
        let account = self.pipelines.entry(pipeline).or_insert_with(|| Account {
            class,
            kv_blocks,
            promised: BTreeMap::new(),
            sum: 0,
            growing: 0,
            growth: Growth::default(),
            held: false,
        });
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
    /// kept free for somebody else; of equal ones the one where fewer run, then the first.
    pub(super) fn choose(
        &self,
        sequence: &Sequence,
        kept_free: &[PipelineId],
    ) -> Option<PipelineId> {
        let candidates =
            self.pipelines.iter().filter(|(id, _)| self.has_room(**id, sequence, kept_free));
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

    /// Whether a sequence may go to a pipeline now.
    pub(super) fn has_room(
        &self,
        pipeline: PipelineId,
        sequence: &Sequence,
        kept_free: &[PipelineId],
    ) -> bool {
        let account = self.pipelines.get(&pipeline);
        let account = account.filter(|account| account.can_hold(sequence));
        account.is_some_and(|account| account.has_room(sequence, self.most_running))
            && !kept_free.contains(&pipeline)
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

    /// How many pipelines there are.
    pub(super) fn count(&self) -> usize {
        self.pipelines.len()
    }

    /// Notes the pipelines on which nobody may overtake a sequence.
    pub(super) fn keep_free_for(&self, sequence: &Sequence, kept_free: &mut Vec<PipelineId>) {
        for (&id, account) in &self.pipelines {
            if !account.held && account.can_hold(sequence) && !kept_free.contains(&id) {
                kept_free.push(id);
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
        let promise = Promise { blocks, may_grow: sequence.may_outgrow(blocks) };
        if let Some(account) = self.pipelines.get_mut(&pipeline) {
            account.promised.insert(sequence.id(), promise);
            account.sum += blocks;
            account.growing += u32::from(promise.may_grow);
        }
    }

    /// How those who run on a pipeline have grown since they began.
    pub(super) fn set_growth(&mut self, pipeline: PipelineId, growth: Growth) {
        if let Some(account) = self.pipelines.get_mut(&pipeline) {
            account.growth = growth;
        }
    }

    pub(super) fn release(&mut self, pipeline: PipelineId, sequence: SequenceId) {
        if let Some(account) = self.pipelines.get_mut(&pipeline) {
            let Some(promise) = account.promised.remove(&sequence) else { return };
            account.sum -= promise.blocks;
            account.growing -= u32::from(promise.may_grow);
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
