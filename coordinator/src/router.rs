//! Who runs where. Pure: it owns those who wait, and keeps the account of every pipeline's KV;
//! which block is whose, and what is sent, is each pipeline's scheduler's.
//!
//! ```text
//! submit ─▶ waiting ──assign──▶ a pipeline ─▶ ended: what was counted is free
//!              ▲                    │
//!              └──── returned ◀─────┘ lost, or gone as planned
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use proto::BLOCK_TOKENS;
use proto::ids::{NumericsClass, PipelineId, SequenceId, Term};

use crate::scheduler::{
    Caller, Charge, Emission, EmissionEvent, Finish, Growth, Limits, Priority, Sequence,
    SequenceError, first_of_term,
};
use crate::tick::Tick;

mod accounts;
mod homes;
#[cfg(test)]
mod latency;
mod lines;
mod queue;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use accounts::{Accounts, Kept, Room, Seeker};
use homes::Homes;
use queue::{Spot, Waiting};

/// Of how many of those who wait it is told anew at once whether a pipeline takes them: each costs a look
/// at every pipeline.
const SORTED_AT_ONCE: usize = 128;

/// How many of those who wait are looked at for a pipeline that the first of them can never use.
const LOOK_AHEAD: usize = 64;

/// How many callers are looked at who have less than one for whom everything is kept free: each costs a look at
/// every pipeline.
const PASS_AHEAD: usize = 8;

/// Those that are refused for one that comes, at most: one of a whole context takes the place of many short
/// ones.
const REFUSED_FOR_ONE: usize = 32;

/// An answer of open length is given room for so many tokens at least, where a pipeline has it: nearly
/// all answers of a conversation end before.
const ANSWER_TOKENS: u32 = 1024;

/// One more may run on the pipeline that computed the beginning of a prompt than on the freest one for
/// each so many blocks that it has ...
const HOME_BLOCKS: usize = 4;

/// ... and so many more at most: then the other computes it, too. What is computed once costs as much as
/// some answers' tokens; a beginning that all chats have draws nobody. Nor is it filled by half of its KV
/// more.
const HOME_LEAD: usize = 8;

/// The queue, and what is counted on every pipeline.
#[derive(Debug)]
pub struct Router {
    limits: Limits,
    waiting: Waiting,
    /// Who runs, where and for whom.
    running: BTreeMap<SequenceId, Running>,
    accounts: Accounts,
    homes: Homes,
    last_sequence: SequenceId,
    closed: bool,
    failed: u64,
    /// Were refused for newcomers, and were not told yet.
    gave_way: Vec<Emission>,
}

#[derive(Clone, Copy, Debug)]
struct Running {
    pipeline: PipelineId,
    priority: Priority,
    caller: Caller,
}

/// What a sequence is to be submitted with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// The length of the answer is to be filled in: as many tokens as the context holds, and every
    /// pipeline that has room for the prompt and `ANSWER_TOKENS`.
    pub as_many_as_fit: bool,
    /// The class it must have.
    pub class: Option<NumericsClass>,
}

/// A sequence that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Its name.
    pub sequence: SequenceId,
    /// Of the pipelines that it may run on.
    pub class: NumericsClass,
    /// Length of its answer at most.
    pub max_tokens: u32,
}

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Rejected {
    /// As many wait as may.
    #[error("{limit} requests are waiting already, the most that may")]
    Full {
        /// How many may wait.
        limit: u32,
    },
    /// Those who wait will take as many tokens as may.
    #[error("requests of {waiting} tokens are waiting already, of the {limit} that may")]
    FullOfTokens {
        /// How many tokens are expected of those who wait.
        waiting: u64,
        /// How many may be.
        limit: u64,
    },
    /// It can never be served: longer than the model's context or than the largest KV cache.
    #[error(
        "the prompt of {prompt_tokens} tokens and an answer of {max_tokens} make \
         {} tokens, more than the {limit} that this cluster can hold",
        u64::from(*prompt_tokens) + u64::from(*max_tokens)
    )]
    TooLong {
        /// Length of the prompt.
        prompt_tokens: u32,
        /// Asked-for length of the answer.
        max_tokens: u32,
        /// Tokens that one sequence may have.
        limit: u32,
    },
    /// Forced tokens (or a length of 0) leave nothing to do: the answer is complete as it is.
    #[error("the answer is complete already")]
    Complete {
        /// Why it ended.
        finish: Finish,
        /// Of the pipelines that it would have run on.
        class: NumericsClass,
        /// Length of the answer at most.
        max_tokens: u32,
    },
    /// Pipelines serve, but none of the class that was asked for.
    #[error("class {wanted} was asked for, class {served} is served")]
    Class {
        /// What was asked for.
        wanted: NumericsClass,
        /// What the largest pipeline has.
        served: NumericsClass,
    },
    /// No pipeline serves.
    #[error("no pipeline is serving")]
    NoPipeline,
    /// The coordinator is stopping.
    #[error("the coordinator is stopping")]
    Draining,
}

/// A sequence, and where it runs from now on.
#[derive(Debug)]
pub struct Assigned {
    /// It goes to the scheduler of ...
    pub sequence: Box<Sequence>,
    /// ... this pipeline.
    pub pipeline: PipelineId,
}

/// How full everything is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RouterStats {
    /// Those who wait.
    pub waiting: u32,
    /// Tokens that are expected of those of them that have never run, prompts and answers.
    pub waiting_tokens: u64,
    /// Those who run.
    pub running: u32,
    /// Blocks of all pipelines.
    pub kv_blocks_total: u32,
    /// Blocks that are held, or kept for those who were sent to a pipeline.
    pub kv_blocks_used: u32,
    /// Sequences that failed while they waited, since start.
    pub failed: u64,
}

impl Router {
    /// A router without pipelines.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            waiting: Waiting::new(limits.wait),
            running: BTreeMap::new(),
            accounts: Accounts::new(limits.running_requests),
            homes: Homes::default(),
            last_sequence: SequenceId(0),
            closed: false,
            failed: 0,
            gave_way: Vec::new(),
        }
    }

    /// A reign begins: sequences get names that no earlier one gave.
    pub fn begin_term(&mut self, term: Term) {
        self.last_sequence = self.last_sequence.max(first_of_term(term));
    }

    /// Takes a request into the queue. `since` is when it began to wait: earlier than now if it
    /// waited for the first pipeline.
    ///
    /// # Errors
    ///
    /// Why it was not taken; nothing is kept of it then.
    pub fn submit(
        &mut self,
        mut sequence: Box<Sequence>,
        wish: Wish,
        since: Tick,
    ) -> Result<Taken, Rejected> {
        if self.closed {
            return Err(Rejected::Draining);
        }
        let Some((served, _)) = self.accounts.largest(None) else {
            return Err(Rejected::NoPipeline);
        };
        let Some((class, kv_blocks)) = self.accounts.largest(wish.class) else {
            let wanted = wish.class.unwrap_or(served);
            return Err(Rejected::Class { wanted, served });
        };
        let limit = self.limits.context_tokens.min(kv_blocks.saturating_mul(BLOCK_TOKENS));
        let prompt_tokens = sequence.prompt_tokens();
        let max_tokens = match wish.as_many_as_fit {
            // The same wherever it runs, so that the answer does not depend on that.
            true => {
                // One that is resumed has a part of it already.
                let known = sequence.output_tokens().saturating_add(1).max(sequence.min_tokens());
                let wanted = prompt_tokens.saturating_add(ANSWER_TOKENS.max(known));
                let held = self.accounts.least_that_holds(class, wanted.div_ceil(BLOCK_TOKENS));
                let held = held.map_or(limit, |blocks| blocks.saturating_mul(BLOCK_TOKENS));
                held.min(limit).saturating_sub(prompt_tokens).max(1)
            }
            false => sequence.max_tokens(),
        };
        if let Some(finish) = sequence.complete_already(max_tokens) {
            return Err(Rejected::Complete { finish, class, max_tokens });
        }
        if u64::from(prompt_tokens) + u64::from(max_tokens) > u64::from(limit) {
            return Err(Rejected::TooLong { prompt_tokens, max_tokens, limit });
        }
        sequence.set_open_length(wish.as_many_as_fit);
        sequence.set_max_tokens(max_tokens);
        self.make_place(&sequence)?;
        self.last_sequence.0 += 1;
        let id = self.last_sequence;
        sequence.submit(id, max_tokens, class, since);
        self.wait(sequence);
        Ok(Taken { sequence: id, class, max_tokens })
    }

    /// Sees to it that a newcomer may wait. Others are refused for it: one of batch for an interactive one,
    /// else the last of a caller for whom more wait.
    fn make_place(&mut self, newcomer: &Sequence) -> Result<(), Rejected> {
        let mut gave_way = Vec::new();
        while let Some(full) = self.is_full(newcomer) {
            let more = (gave_way.len() < REFUSED_FOR_ONE).then(|| self.waiting.pop_for(newcomer));
            let Some(one) = more.flatten() else {
                // In vain: nobody is refused for one that is not taken.
                gave_way.into_iter().for_each(|sequence| self.wait(sequence));
                return Err(full);
            };
            gave_way.push(one);
        }
        let limit = self.limits.waiting_requests;
        self.failed += gave_way.len() as u64;
        self.gave_way.extend(gave_way.into_iter().map(|sequence| {
            let error = SequenceError::GaveWay { limit, retry_after: Duration::ZERO };
            Emission { sequence: sequence.id(), event: EmissionEvent::Failed(error) }
        }));
        Ok(())
    }

    fn is_full(&self, newcomer: &Sequence) -> Option<Rejected> {
        // Those who come back were taken before: they use up nobody's place.
        if self.waiting.newcomers() >= self.limits.waiting_requests as usize {
            return Some(Rejected::Full { limit: self.limits.waiting_requests });
        }
        let (waiting, limit) = (self.waiting.new_tokens(), self.limits.waiting_tokens);
        // One alone may wait, however long it is.
        let is_too_much = waiting > 0 && waiting.saturating_add(newcomer.tokens_expected()) > limit;
        is_too_much.then_some(Rejected::FullOfTokens { waiting, limit })
    }

    /// Those who were refused for newcomers since this was last asked.
    pub fn take_gave_way(&mut self) -> Vec<Emission> {
        std::mem::take(&mut self.gave_way)
    }

    fn wait(&mut self, sequence: Box<Sequence>) {
        let stranded = !self.accounts.is_open_to(&sequence);
        self.waiting.insert(sequence, stranded);
    }

    /// Gives to those who wait, in their order, the pipelines that have room: each goes to the one
    /// with the most free KV in proportion, or to the one that computed the longest beginning of its
    /// prompt, if not many more run there. Where none has room he goes where others have to make it.
    /// Nobody is overtaken on a pipeline that could hold him, but by callers who have less of it: a long
    /// request is never kept waiting for ever by short ones.
    pub fn assign(&mut self) -> Vec<Assigned> {
        let mut assigned = Vec::new();
        let mut kept_free: Vec<Kept> = Vec::new();
        let mut looked_at = 0;
        let mut passed = 0;
        let mut after: Option<Spot> = None;
        loop {
            // Where everything is kept for those who were looked at, only callers are who have less.
            let is_all_kept = kept_free.len() >= self.accounts.open_count();
            let next = match after {
                Some(after) if is_all_kept && passed < PASS_AHEAD => self.waiting.next_line(after),
                _ if is_all_kept || looked_at >= LOOK_AHEAD => None,
                after => self.waiting.next(after),
            };
            let Some((spot, sequence)) = next else { break };
            passed += usize::from(is_all_kept);
            let seeker = Seeker { sequence, home: self.home_of(sequence) };
            let Some(freest) = self.accounts.choose(seeker, &kept_free) else {
                self.accounts.keep_free_for(sequence, &mut kept_free);
                looked_at += 1;
                after = Some(spot);
                continue;
            };
            let pipeline = self.settle(seeker, freest, &kept_free);
            let (priority, caller) = (sequence.priority(), sequence.caller());
            // What is computed again was paid for.
            let tokens = if sequence.was_admitted() { 0 } else { sequence.known_tokens() };
            let lines = self.waiting.lines(priority);
            // Before he leaves the line, so that he is not forgotten in between.
            lines.begin(caller);
            lines.charge(caller, i64::from(tokens));
            let Some(mut sequence) = self.waiting.take((priority, spot.id())) else { break };
            if self.limits.prefix_cache {
                self.homes.note(&sequence, pipeline);
            }
            self.accounts.promise(pipeline, &mut sequence);
            self.running.insert(sequence.id(), Running { pipeline, priority, caller });
            assigned.push(Assigned { sequence, pipeline });
        }
        assigned
    }

    /// Where the beginning of its prompt was sent last, if that is of use to it.
    fn home_of(&self, sequence: &Sequence) -> Option<(PipelineId, usize)> {
        // Whose prompt is scored computes all of it.
        let shares = self.limits.prefix_cache && !sequence.scores();
        shares.then(|| self.homes.find(sequence)).flatten()
    }

    /// Where a sequence goes that may go to `freest`.
    fn settle(&self, seeker: Seeker<'_>, freest: PipelineId, kept_free: &[Kept]) -> PipelineId {
        let home = seeker.home.filter(|&(home, blocks)| {
            let lead = (blocks / HOME_BLOCKS).min(HOME_LEAD);
            let most_running = self.accounts.running_count(freest) + lead;
            home == freest
                || self.accounts.has_room(home, seeker, kept_free)
                    && self.accounts.running_count(home) < most_running
                    && !self.accounts.is_much_fuller(home, freest)
        });
        home.map_or(freest, |(home, _)| home)
    }

    /// A sequence has ended on its pipeline: what it began with is free. Unknown ones are
    /// ignored.
    pub fn ended(&mut self, sequence: SequenceId) {
        if let Some(Running { pipeline, priority, caller }) = self.running.remove(&sequence) {
            self.accounts.release(pipeline, sequence);
            self.waiting.lines(priority).end(caller);
        }
    }

    /// What those who run were served since that was last told.
    pub fn charge(&mut self, charges: &[Charge]) {
        for &Charge { priority, caller, tokens } in charges {
            self.waiting.lines(priority).charge(caller, tokens);
        }
    }

    /// Its pipeline gave a sequence back: it waits before everyone who came after it. There may be
    /// more who wait than [`Limits::waiting_requests`] then.
    pub fn returned(&mut self, sequence: Box<Sequence>) {
        self.ended(sequence.id());
        self.wait(sequence);
    }

    /// Takes one that waits out of the queue: nobody wants it any more.
    pub fn withdraw(&mut self, sequence: SequenceId) -> Option<Box<Sequence>> {
        self.waiting.withdraw(sequence)
    }

    /// Fails what waited for too long, but for those that have run before: however they lost their
    /// pipeline, they wait until their own deadline. `at_most` so many: call it several times a second,
    /// and again if it gives so many.
    pub fn expire(&mut self, now: Tick, at_most: usize) -> Vec<Emission> {
        let mut emissions = Vec::new();
        for _ in 0..at_most {
            let Some(mut late) = self.waiting.pop_late(now) else { break };
            if self.shorten(&mut late, now) {
                self.wait(late);
                continue;
            }
            let is_in_time = late.deadline().is_none_or(|deadline| now < deadline);
            if late.was_admitted() && is_in_time {
                late.wait_on(now);
                self.wait(late);
                continue;
            }
            let error = self.late(&late, now);
            emissions.push(Emission { sequence: late.id(), event: EmissionEvent::Failed(error) });
        }
        self.failed += emissions.len() as u64;
        emissions
    }

    /// Makes an answer of open length as short as the largest pipeline holds, when those that hold
    /// more did not come back for as long as it waits. Whether there is room for it then.
    fn shorten(&self, late: &mut Sequence, now: Tick) -> bool {
        let is_stranded = self.accounts.room_for(late) == Room::Never;
        let is_in_time = late.deadline().is_none_or(|deadline| now < deadline);
        let Some((_, kv_blocks)) = self.accounts.largest(late.class()) else { return false };
        let holds = self.limits.context_tokens.min(kv_blocks.saturating_mul(BLOCK_TOKENS));
        let max_tokens = holds.saturating_sub(late.prompt_tokens());
        let may = late.has_open_length() && is_stranded && is_in_time;
        if !may || max_tokens <= late.output_tokens() {
            return false;
        }
        late.shorten(max_tokens, now);
        true
    }

    fn late(&self, late: &Sequence, now: Tick) -> SequenceError {
        if late.deadline().is_some_and(|deadline| deadline <= now) {
            return SequenceError::DeadlineExceeded { tokens: late.output_tokens() };
        }
        let waited: Duration = now.since(late.waiting_since());
        let (needed_blocks, class) = (late.blocks_at_most(), late.class());
        match (self.accounts.largest(class), class) {
            (Some((_, kv_blocks)), _) if kv_blocks < needed_blocks => {
                SequenceError::NeverFits { needed_blocks, kv_blocks }
            }
            (None, Some(class)) => SequenceError::NoPipeline { class, waited },
            // Those that could hold it stand still.
            (_, Some(class)) if !self.accounts.is_open_to(late) => {
                SequenceError::NoPipeline { class, waited }
            }
            _ => SequenceError::WaitedTooLong { waited },
        }
    }

    /// Fails those who wait, `at_most` so many of them: call it until it gives none.
    pub fn fail_waiting(&mut self, reason: &str, at_most: usize) -> Vec<Emission> {
        let first = std::iter::from_fn(|| self.waiting.pop_first());
        let failed = |sequence: Box<Sequence>| {
            let error = SequenceError::PipelineLost { reason: reason.to_owned() };
            Emission { sequence: sequence.id(), event: EmissionEvent::Failed(error) }
        };
        let emissions: Vec<_> = first.take(at_most).map(failed).collect();
        self.failed += emissions.len() as u64;
        emissions
    }

    /// A pipeline serves from now on, or goes on with other KV. What is counted on it stays so.
    pub fn set_pipeline(&mut self, pipeline: PipelineId, kv_blocks: u32, class: NumericsClass) {
        self.accounts.set(pipeline, kv_blocks, class);
        self.homes.begins(pipeline);
        self.sort();
    }

    /// A pipeline is gone. Those who ran on it have been given back, or are forgotten here.
    pub fn remove_pipeline(&mut self, pipeline: PipelineId) {
        self.accounts.remove(pipeline);
        self.homes.ends(pipeline);
        let ran: Vec<_> = self.running.extract_if(.., |_, on| on.pipeline == pipeline).collect();
        for (_, Running { priority, caller, .. }) in ran {
            self.waiting.lines(priority).end(caller);
        }
        self.sort();
    }

    /// How those who run on a pipeline have grown by now. Tell it before [`Self::assign`].
    pub fn set_growth(&mut self, pipeline: PipelineId, growth: Growth) {
        self.accounts.set_growth(pipeline, growth);
    }

    /// While a pipeline is held nobody new goes to it.
    pub fn hold(&mut self, pipeline: PipelineId, hold: bool) {
        if self.accounts.hold(pipeline, hold) {
            self.sort();
        }
    }

    /// Whether nothing runs on a pipeline.
    pub fn is_idle(&self, pipeline: PipelineId) -> bool {
        self.accounts.is_idle(pipeline)
    }

    /// Where a sequence runs.
    pub fn pipeline_of(&self, sequence: SequenceId) -> Option<PipelineId> {
        self.running.get(&sequence).map(|running| running.pipeline)
    }

    /// Puts those aside whom no pipeline takes as they are now, and takes back the others: the first
    /// ones at once, the rest as [`Router::sort_some`] is called.
    fn sort(&mut self) {
        self.waiting.begin_to_sort();
        self.sort_some();
    }

    /// Goes on with what a change of the pipelines left to be sorted, some of it: call it until
    /// [`Router::is_sorting`] says that nothing is left.
    pub fn sort_some(&mut self) {
        let accounts = &self.accounts;
        self.waiting.sort(SORTED_AT_ONCE, |sequence| !accounts.is_open_to(sequence));
    }

    /// Whether a change of the pipelines left something to be sorted.
    pub fn is_sorting(&self) -> bool {
        self.waiting.is_sorting()
    }

    /// From now on every new request is rejected as [`Rejected::Draining`].
    pub fn close(&mut self) {
        self.closed = true;
    }

    /// Whether nobody waits or runs.
    pub fn is_empty(&self) -> bool {
        self.waiting.len() == 0 && self.running.is_empty()
    }

    /// How full everything is.
    pub fn stats(&self) -> RouterStats {
        let (kv_blocks_total, kv_blocks_used) = self.accounts.totals();
        RouterStats {
            waiting: self.waiting.len() as u32,
            waiting_tokens: self.waiting.new_tokens(),
            running: self.running.len() as u32,
            kv_blocks_total,
            kv_blocks_used,
            failed: self.failed,
        }
    }
}

/// Names those who wait: by priority, then by arrival.
type Key = (Priority, SequenceId);
