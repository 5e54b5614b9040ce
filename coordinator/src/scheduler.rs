//! Which rows go into the next step of one pipeline. Pure: continuous batching, chunked prefill,
//! KV blocks; no clock, no sockets, no text. Who runs here is the router's choice.
//!
//! ```text
//! admit ─▶ arriving ──blocks free──▶ prefilling ──first token──▶ decoding ─▶ finished
//!                                       └──── rows ──▶ next_step ─▶ pipeline ─▶ complete ──┘
//! ```
//!
//! The rules and their reasons are in `docs/scheduling.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use proto::BLOCK_TOKENS;
use proto::generate::{FinishReason, Timings};
use proto::ids::{Epoch, Generation, PipelineId, SequenceId, StepId, Term};
use proto::status::StepBudget;
use proto::step::{Row, RowResult, RowStatus, RowValue, Sampled, StepResult};

use crate::tick::Tick;

mod blocks;
mod epoch;
#[cfg(test)]
mod fairness;
mod growing;
mod holding;
mod leaving;
mod microbatch;
mod picking;
mod prefix;
mod queue;
mod sequence;
mod shares;
mod sizing;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod types;

pub(crate) use blocks::BlockKey;
use epoch::{Active, SentRow, StepKind, Wants};
pub use leaving::{Lost, MAX_DEATHS};
pub use microbatch::{Line, StepCost, in_flight_limit};
use picking::Picked;
use prefix::Prefixes;
use queue::Queue;
use sequence::Scoring;
pub use sequence::{NotASequence, Sequence};
use shares::Holders;
use sizing::{Fit, Room};
pub use types::{
    Caller, Charge, Emission, EmissionEvent, Finish, Growth, Limits, PipelineShape, PipelineStats,
    Priority, Request, ScheduledStep, SequenceError,
};

/// Replays of one sequence without a token in between. A row that overtook the one before it, which
/// was damaged or refused on the way, costs one; a stage that keeps no state at all is a fault that no
/// replay mends.
const MAX_REPLAYS: u32 = 8;

/// What runs on one pipeline.
#[derive(Debug)]
pub struct PipelineScheduler {
    limits: Limits,
    active: Active,
    /// Everyone who was admitted and has not ended.
    sequences: BTreeMap<SequenceId, Box<Sequence>>,
    /// Have no blocks: until there are enough that no step on its way names. Interactive before batch,
    /// then in order of arrival at the router.
    arriving: Queue,
    /// Have blocks and are not wholly sent, in order of admission.
    prefilling: Queue,
    /// Has one known token that was not sent, the one that went longest without a row first.
    decode_ready: Queue,
    /// Has the residual stream from which the first stage will draw its next token.
    draw_ready: Queue,
    deadlines: BTreeSet<(Tick, SequenceId)>,
    paused: bool,
    totals: Totals,
    /// When a row last came back well.
    last_row: Option<Tick>,
    /// A token was sampled in this epoch.
    proven: bool,
    /// The probe that is on its way.
    probe: Option<SequenceId>,
    probes: u32,
    /// Blocks that those who arrive begin with, by class.
    begin_demand: [u64; Priority::ALL.len()],
    /// What the router counts for all who are here, by class.
    promised: [u64; Priority::ALL.len()],
    holders: Holders,
    /// Had to make room, and were not given back yet.
    #[expect(clippy::vec_box, reason = "sequences are large, and go on as they are")]
    pushed_out: Vec<Box<Sequence>>,
    /// What callers were served since that was last told.
    served: BTreeMap<(Priority, Caller), i64>,
    /// What steps take, by what they took.
    fit: Fit,
    prefixes: Prefixes,
}

/// Where a sequence stands while no row of it is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stand {
    Arriving,
    Prefilling,
    Decoding,
    Drawing,
}

#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    prompt_tokens: u64,
    generated_tokens: u64,
    finished: u64,
    failed: u64,
    cancelled: u64,
    preempted: u64,
    prefix_queries: u64,
    prefix_hits: u64,
}

impl PipelineScheduler {
    /// Nothing runs yet.
    pub fn new(limits: Limits, shape: PipelineShape) -> Self {
        Self {
            limits,
            active: Active::new(shape),
            sequences: BTreeMap::new(),
            arriving: Queue::default(),
            prefilling: Queue::default(),
            decode_ready: Queue::default(),
            draw_ready: Queue::default(),
            deadlines: BTreeSet::new(),
            paused: false,
            totals: Totals::default(),
            last_row: None,
            proven: false,
            probe: None,
            probes: 0,
            begin_demand: [0; Priority::ALL.len()],
            promised: [0; Priority::ALL.len()],
            holders: Holders::default(),
            pushed_out: Vec::new(),
            served: BTreeMap::new(),
            fit: Fit::default(),
            prefixes: Prefixes::default(),
        }
    }

    /// Takes a sequence that the router has counted. It gets blocks in a later [`Self::next_step`],
    /// when there are enough that no step on its way names.
    pub fn admit(&mut self, sequence: Box<Sequence>) {
        let class = sequence.priority() as usize;
        self.begin_demand[class] += u64::from(sequence.blocks_to_begin());
        self.promised[class] += u64::from(sequence.promised());
        if let Some(deadline) = sequence.request.deadline {
            self.deadlines.insert((deadline, sequence.id()));
        }
        self.arrive(sequence);
    }

    fn queue(&mut self, stand: Stand) -> &mut Queue {
        match stand {
            Stand::Arriving => &mut self.arriving,
            Stand::Prefilling => &mut self.prefilling,
            Stand::Decoding => &mut self.decode_ready,
            Stand::Drawing => &mut self.draw_ready,
        }
    }

    fn enqueue(&mut self, stand: Stand, id: SequenceId) {
        let Some(sequence) = self.sequences.get(&id) else { return };
        let (priority, caller) = (sequence.priority(), sequence.caller());
        if stand == Stand::Decoding && sequence.is_held {
            return self.park(id);
        }
        let ticket = match stand {
            Stand::Decoding => {
                let turn = self.holders.next_row(priority, caller);
                self.decode_ready.push_turn(priority, turn, id)
            }
            _ => self.queue(stand).push_back(id),
        };
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.place = Some((stand, ticket));
        }
    }

    /// The client went away. Nothing more is emitted for the sequence. Unknown ids are ignored.
    /// Whether it was here.
    pub fn cancel(&mut self, sequence: SequenceId) -> bool {
        let was_here = self.remove(sequence).is_some();
        self.totals.cancelled += u64::from(was_here);
        was_here
    }

    /// The caller ends an answer early (a stop string): nothing more is emitted for the sequence.
    /// `None` if it has ended already.
    pub fn finish(&mut self, sequence: SequenceId, now: Tick) -> Option<Timings> {
        let ended = self.remove(sequence)?;
        self.totals.finished += 1;
        Some(ended.timings(now))
    }

    /// The next step to send, if there is work and room for one more in flight. Call it until it
    /// returns `None`, after everything that may have made work: admit, complete, resume.
    pub fn next_step(&mut self, now: Tick) -> Option<ScheduledStep> {
        self.keep_places(now);
        if self.paused || !self.active.has_room() {
            return None;
        }
        self.let_in(now);
        let deadline = self.limits.step_deadline;
        let (rows, states) = self.pick_draws();
        if !rows.is_empty() {
            let takes = Duration::ZERO;
            let kind = StepKind { decodes: true, only_batch: false, takes };
            let step = self.active.send(rows, states, kind, now, deadline);
            return Some(ScheduledStep { step, deadline: now + deadline });
        }
        if !self.may_queue() {
            return None;
        }
        let Picked { mut rows, decode_rows, room } = self.pick_rows(now);
        if rows.is_empty() {
            return None;
        }
        let is_batch = |row: &Row| {
            let sequence = self.sequences.get(&row.sequence);
            sequence.is_some_and(|sequence| sequence.priority() == Priority::Batch)
        };
        let only_batch = rows.iter().all(is_batch);
        let decoding = self.decoding_count();
        self.active.share_draws(&mut rows, decoding);
        let kind = StepKind { decodes: decode_rows > 0, only_batch, takes: room.spent() };
        let step = self.active.send(rows, Bytes::new(), kind, now, deadline);
        Some(ScheduledStep { step, deadline: now + deadline })
    }

    /// Takes a step's result. Results of unknown steps, of steps known already and of other
    /// epochs are ignored: sending again is safe.
    pub fn complete(&mut self, result: StepResult, now: Tick) -> Vec<Emission> {
        if self.active.shape.epoch != result.epoch {
            return Vec::new();
        }
        let Some(step) = self.active.take_sent(result.step, now) else { return Vec::new() };
        let mut emissions = Vec::new();
        let (want, found) = (step.rows.len(), result.rows.len());
        if want != found {
            let detail = format!("{found} rows came back for {want}");
            for sent in step.rows {
                if self.is_current(&sent) {
                    let error = bad_result(result.step, detail.clone());
                    self.fail(sent.sequence, error, &mut emissions);
                }
            }
            return emissions;
        }
        // Stages do not work for rows that they refuse.
        if result.rows.iter().all(|row| row.status == RowStatus::Ok) {
            self.fit.learn(&self.active.shape.cost, &step.rows, &result.stage_times);
        }
        for (sent, row) in step.rows.into_iter().zip(result.rows) {
            // Ended or restarted while its row was on the way.
            if !self.is_current(&sent) {
                continue;
            }
            if let Err(error) = self.complete_row(result.step, &sent, row, now, &mut emissions) {
                self.fail(sent.sequence, error, &mut emissions);
            }
        }
        emissions
    }

    fn is_current(&self, sent: &SentRow) -> bool {
        let sequence = self.sequences.get(&sent.sequence);
        sequence.is_some_and(|sequence| sequence.log.generation() == sent.generation)
    }

    fn complete_row(
        &mut self,
        step: StepId,
        sent: &SentRow,
        row: RowResult,
        now: Tick,
        emissions: &mut Vec<Emission>,
    ) -> Result<(), SequenceError> {
        let named = (row.sequence, row.generation, row.position, row.token_count);
        if named != (sent.sequence, sent.generation, sent.position, sent.token_count) {
            let detail = format!(
                "sequence {} at {} came back for sequence {} at {}",
                row.sequence, row.position, sent.sequence, sent.position
            );
            return Err(bad_result(step, detail));
        }
        if row.status == RowStatus::NeedState && self.replay(sent, now) {
            return Ok(());
        }
        if row.status != RowStatus::Ok {
            let (status, detail) = (row.status, row.detail);
            return Err(SequenceError::Row { status, position: sent.position, detail });
        }
        self.publish_prefix(sent.sequence, sent.position + sent.token_count);
        let sequence = self.sequences.get_mut(&sent.sequence).expect("the row is current");
        self.last_row = Some(now);
        if self.probe != Some(sent.sequence) {
            let prompt_len = sequence.log.prompt().len() as u32;
            let of_prompt = if sent.is_draw { 0 } else { prompt_len };
            let of_prompt = (sent.position + sent.token_count).min(of_prompt);
            self.totals.prompt_tokens += u64::from(of_prompt.saturating_sub(sent.position));
        }
        match (sent.wants, row.value) {
            (Wants::Nothing, _) => Ok(()),
            (Wants::Scores, RowValue::Scores(scores))
                if scores.len() == sent.token_count as usize =>
            {
                sequence.add_scores(sent.position, &scores);
                self.tell_scores(sent.sequence, now, emissions);
                Ok(())
            }
            (Wants::State, RowValue::State(state)) => {
                sequence.state = Some(state);
                self.enqueue(Stand::Drawing, sent.sequence);
                Ok(())
            }
            (Wants::Token, RowValue::Sampled(sampled)) => {
                sequence.held_back = Some(sampled);
                self.proven = true;
                self.tell_scores(sent.sequence, now, emissions);
                Ok(())
            }
            (wants, _) => Err(bad_result(step, format!("{wants:?} was asked for, another came"))),
        }
    }

    /// A stage does not hold the tokens before a row: one that came earlier is late, or was refused
    /// and will be sent again. The sequence begins again from its token log, and goes on with the same
    /// tokens. Whether it does: the first row goes on from nothing.
    fn replay(&mut self, sent: &SentRow, now: Tick) -> bool {
        let is_probe = self.probe == Some(sent.sequence);
        let Some(sequence) = self.sequences.get_mut(&sent.sequence) else { return false };
        if sent.position == 0 || is_probe || sequence.replays == MAX_REPLAYS {
            return false;
        }
        sequence.replays += 1;
        sequence.knew_nothing();
        // Where its first own row finds nothing to go on from, what it shares is lost; else what it has
        // computed itself, mostly because an earlier row is late. Whoever else goes on from blocks that
        // are lost finds the same by himself.
        let shared = sequence.shared / BLOCK_TOKENS as usize;
        let (shared, own) = sequence.blocks.split_at(shared.min(sequence.blocks.len()));
        let is_first = sent.position as usize == sequence.shared;
        self.active.blocks.forget(if is_first { shared } else { own });
        self.begin_again(sent.sequence, now);
        true
    }

    /// Emits the prompt's scores once they are whole, and then what waited for them.
    fn tell_scores(&mut self, id: SequenceId, now: Tick, emissions: &mut Vec<Emission>) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        if let Scoring::Collecting(scores) = &sequence.scoring {
            let Some(scores) = scores.iter().copied().collect::<Option<Vec<f32>>>() else { return };
            sequence.scoring = Scoring::Done;
            emissions.push(Emission { sequence: id, event: EmissionEvent::PromptScores(scores) });
            if sequence.request.max_tokens == 0 {
                let finish = Finish { reason: FinishReason::Length, stop_token: None };
                return self.finished(id, finish, now, emissions);
            }
        }
        if let Some(sampled) = sequence.held_back.take() {
            self.accept(id, sampled, now, emissions);
        }
    }

    fn accept(
        &mut self,
        id: SequenceId,
        sampled: Sampled,
        now: Tick,
        emissions: &mut Vec<Emission>,
    ) {
        if self.probe == Some(id) {
            self.remove(id);
            return;
        }
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        *self.served.entry((sequence.priority(), sequence.caller())).or_default() += 1;
        let (index, finish) = sequence.append(sampled.token, now);
        self.totals.generated_tokens += 1;
        emissions.push(Emission { sequence: id, event: EmissionEvent::Token { index, sampled } });
        match finish {
            Some(finish) => self.finished(id, finish, now, emissions),
            None => self.enqueue(Stand::Decoding, id),
        }
    }

    fn finished(
        &mut self,
        id: SequenceId,
        finish: Finish,
        now: Tick,
        emissions: &mut Vec<Emission>,
    ) {
        let Some(sequence) = self.remove(id) else { return };
        self.totals.finished += 1;
        let event = EmissionEvent::Finished { finish, timings: sequence.timings(now) };
        emissions.push(Emission { sequence: id, event });
    }

    fn fail(&mut self, id: SequenceId, error: SequenceError, emissions: &mut Vec<Emission>) {
        let is_probe = self.probe == Some(id);
        if self.remove(id).is_some() && !is_probe {
            self.totals.failed += 1;
            emissions.push(Emission { sequence: id, event: EmissionEvent::Failed(error) });
        }
    }

    /// Takes a sequence out of everything. Its blocks return to the pool, now or with the last
    /// step that names them.
    fn remove(&mut self, id: SequenceId) -> Option<Box<Sequence>> {
        let sequence = self.detach(id)?;
        // One that was preempted has had rows, too.
        if sequence.sent > sequence.shared || sequence.log.generation() != Generation(0) {
            self.active.ended.push_back(id);
        }
        Some(sequence)
    }

    /// The same, of one that may come back.
    fn detach(&mut self, id: SequenceId) -> Option<Box<Sequence>> {
        let mut sequence = self.sequences.remove(&id)?;
        self.leave_place(&mut sequence);
        if let Some(deadline) = sequence.request.deadline {
            self.deadlines.remove(&(deadline, id));
        }
        self.probe = self.probe.filter(|&probe| probe != id);
        self.leave_prefix(&mut sequence);
        self.holders.take(&sequence);
        self.holders.leave(&sequence);
        self.active.blocks.give_back(&sequence.blocks);
        let class = sequence.priority() as usize;
        self.promised[class] -= u64::from(sequence.promised());
        if sequence.blocks.is_empty() {
            self.begin_demand[class] -= u64::from(sequence.blocks_to_begin());
        }
        Some(sequence)
    }

    /// What is to be charged to callers since this was last asked.
    pub fn take_charges(&mut self) -> Vec<Charge> {
        let served = std::mem::take(&mut self.served).into_iter();
        served.map(|((priority, caller), tokens)| Charge { priority, caller, tokens }).collect()
    }

    /// Fails those whose deadline passed. Call it several times a second.
    pub fn expire(&mut self, now: Tick) -> Vec<Emission> {
        let mut emissions = Vec::new();
        while let Some(&(deadline, id)) = self.deadlines.first()
            && deadline <= now
        {
            let tokens = self.sequences.get(&id).map_or(0, |late| late.log.output().len() as u32);
            self.fail(id, SequenceError::DeadlineExceeded { tokens }, &mut emissions);
            // Gone with its sequence; and if there were none, it must not be met again.
            self.deadlines.remove(&(deadline, id));
        }
        emissions
    }

    /// Asks the pipeline for one token, before everyone else, to prove that it computes; unless it
    /// is being asked already, or all blocks are taken: then the others prove it. What comes of it
    /// is told to nobody: see [`Self::proven`].
    pub fn probe(&mut self, token: u32) {
        if self.probe.is_some() {
            return;
        }
        let Ok(mut probe) = Sequence::new(Request::probe(token)) else { return };
        let Some(blocks) = self.active.blocks.take(probe.blocks_at_most()) else { return };
        let (_, Epoch(epoch)) = self.pipeline();
        let number = (epoch as u32).wrapping_add(self.probes);
        self.probes = self.probes.wrapping_add(1);
        let id = SequenceId(PROBES | first_of_term(self.active.shape.term).0 | u64::from(number));
        probe.name(id);
        probe.blocks = blocks;
        probe.place = Some((Stand::Prefilling, self.prefilling.push_front(id)));
        self.probe = Some(id);
        self.sequences.insert(id, Box::new(probe));
    }

    /// When this epoch last computed something, if it has sampled a token.
    pub fn proven(&self) -> Option<Tick> {
        self.last_row.filter(|_| self.proven)
    }

    /// While paused no step is sent; those on their way come back.
    pub fn pause(&mut self, paused: bool) {
        self.paused = paused;
    }

    /// Steps carry this coordinator's reign, which may be younger than the pipeline.
    pub fn set_term(&mut self, term: Term) {
        self.active.shape.term = term;
    }

    /// Whether nothing runs. Rows of ended sequences may be on their way.
    pub fn is_idle(&self) -> bool {
        self.sequences.keys().all(|&id| self.probe == Some(id))
    }

    /// Which pipeline at which epoch.
    pub fn pipeline(&self) -> (PipelineId, Epoch) {
        (self.active.shape.pipeline, self.active.shape.epoch)
    }

    /// The oldest step that has been on its way for so long that somebody should ask the workers.
    pub fn overdue(&self, now: Tick) -> Option<StepId> {
        let (&id, step) = self.active.in_flight.first_key_value()?;
        (now.since(step.sent) > self.active.patience()).then_some(id)
    }

    /// How full it is.
    pub fn stats(&self) -> PipelineStats {
        let blocks = &self.active.blocks;
        let probing = u32::from(self.probe.is_some());
        PipelineStats {
            running: self.sequences.len() as u32 - probing,
            kv_blocks_total: blocks.total(),
            kv_blocks_used: self.blocks_taken(),
            steps_in_flight: self.active.in_flight.len() as u32,
            prompt_tokens: self.totals.prompt_tokens,
            generated_tokens: self.totals.generated_tokens,
            finished: self.totals.finished,
            failed: self.totals.failed,
            cancelled: self.totals.cancelled,
            preempted: self.totals.preempted,
            prefix_queries: self.totals.prefix_queries,
            prefix_hits: self.totals.prefix_hits,
            growth: self.growth(),
        }
    }

    /// How much of prompts its steps read, and why.
    pub fn budget(&self) -> StepBudget {
        let Limits { step_time, step_tokens, context_tokens, .. } = self.limits;
        let (cost, rate) = (self.active.shape.cost, self.fit.rate());
        let room = Room::new(cost, rate, step_tokens as usize, step_time, None);
        let chunk = |position| room.chunk(position, usize::MAX, true) as u32;
        let ms = |ns: f64| ns / 1e6;
        StepBudget {
            target_ms: ms(step_time.as_nanos() as f64),
            chunk_tokens: chunk(0),
            chunk_tokens_last: chunk(context_tokens as usize),
            step_ms: ms(cost.prompt.step_ns as f64),
            token_ms: ms(cost.prompt.row_ns as f64),
            scale: rate.scale,
            context_ms: ms(1000.0 * rate.attention_ns),
        }
    }

    /// Those that have been prefilled and go on token by token.
    fn decoding_count(&self) -> usize {
        let begun = self.sequences.len() - self.arriving.len() - self.prefixes.awaiting_count();
        begun - self.prefilling.len() - self.holders.parked()
    }
}

/// Set in the ids of probes alone.
const PROBES: u64 = 1 << 63;

/// Before the first id of a reign: workers remember sequences for longer than a coordinator leads,
/// so no id means two of them.
pub fn first_of_term(term: Term) -> SequenceId {
    SequenceId((term.0 << 32) & !PROBES)
}

fn bad_result(step: StepId, detail: String) -> SequenceError {
    SequenceError::BadResult { step, detail }
}
