//! Which rows go into the next step. Pure: continuous batching, chunked prefill, KV blocks,
//! admission; no clock, no sockets, no text.
//!
//! ```text
//! submit ─▶ waiting ──KV reserved──▶ prefilling ──first token──▶ decoding ─▶ finished
//!                                       └──── rows ──▶ next_step ─▶ pipeline ─▶ complete ──┘
//! ```
//!
//! The rules and their reasons are in `docs/scheduling.md`.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use proto::generate::{FinishReason, Timings};
use proto::ids::{Epoch, SequenceId, StepId};
use proto::step::{RowResult, RowStatus, RowValue, Sampled, StepResult};

use crate::tick::Tick;

mod blocks;
mod epoch;
mod microbatch;
mod picking;
mod sequence;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
mod types;

use blocks::BlockPool;
use epoch::{Active, SentRow, Wants};
pub use microbatch::{Line, StepCost, in_flight_limit};
use sequence::{Scoring, Sequence};
pub use types::{
    Class, Emission, EmissionEvent, Finish, Limits, PipelineShape, QueueStats, Rejected, Request,
    Running, ScheduledStep, SequenceError,
};

/// All requests of one pipeline.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    active: Option<Active>,
    /// Everyone who waits or runs. Ids ascend in the order of submission.
    sequences: BTreeMap<SequenceId, Sequence>,
    last_sequence: SequenceId,
    /// By class; each in order of arrival.
    waiting: BTreeMap<Class, VecDeque<SequenceId>>,
    /// Admitted and not wholly sent, in order of admission.
    prefilling: VecDeque<SequenceId>,
    /// Has one known token that was not sent, the one that went longest without a row first.
    decode_ready: VecDeque<SequenceId>,
    /// Has the residual stream from which the first stage will draw its next token.
    draw_ready: VecDeque<SequenceId>,
    held: bool,
    closed: bool,
    totals: Totals,
}

#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    prompt_tokens: u64,
    generated_tokens: u64,
    finished: u64,
    failed: u64,
    cancelled: u64,
}

impl Scheduler {
    /// A scheduler without a pipeline.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            active: None,
            sequences: BTreeMap::new(),
            last_sequence: SequenceId(0),
            waiting: BTreeMap::new(),
            prefilling: VecDeque::new(),
            decode_ready: VecDeque::new(),
            draw_ready: VecDeque::new(),
            held: false,
            closed: false,
            totals: Totals::default(),
        }
    }

    /// Takes a request into the queue. It is admitted by a later [`Self::next_step`].
    ///
    /// # Errors
    ///
    /// Why it was not taken; nothing is kept of it then.
    pub fn submit(&mut self, request: Request, now: Tick) -> Result<SequenceId, Rejected> {
        self.check(&request)?;
        self.last_sequence.0 += 1;
        let id = self.last_sequence;
        self.waiting.entry(request.class).or_default().push_back(id);
        self.sequences.insert(id, Sequence::new(request, now));
        Ok(id)
    }

    fn check(&self, request: &Request) -> Result<(), Rejected> {
        if request.prompt.is_empty() {
            return Err(Rejected::EmptyPrompt);
        }
        if let Some(finish) = complete_already(request) {
            return Err(Rejected::Complete { finish });
        }
        if self.closed {
            return Err(Rejected::Draining);
        }
        let Some(active) = &self.active else { return Err(Rejected::NoPipeline) };
        let kv_tokens = active.blocks.total().saturating_mul(proto::BLOCK_TOKENS);
        let limit = self.limits.context_tokens.min(kv_tokens);
        if request.prompt.len() as u64 + u64::from(request.max_tokens) > u64::from(limit) {
            let prompt_tokens = request.prompt.len().try_into().unwrap_or(u32::MAX);
            let max_tokens = request.max_tokens;
            return Err(Rejected::TooLong { prompt_tokens, max_tokens, limit });
        }
        if self.waiting_count() >= self.limits.waiting_requests as usize {
            return Err(Rejected::Full { limit: self.limits.waiting_requests });
        }
        Ok(())
    }

    /// The client went away. Nothing more is emitted for the sequence. Unknown ids are ignored.
    pub fn cancel(&mut self, sequence: SequenceId) {
        if self.remove(sequence).is_some() {
            self.totals.cancelled += 1;
        }
    }

    /// The caller ends an answer early (a stop string): nothing more is emitted for the sequence.
    /// `None` if it has ended already.
    pub fn finish(&mut self, sequence: SequenceId, now: Tick) -> Option<Timings> {
        let ended = self.remove(sequence)?;
        self.totals.finished += 1;
        Some(ended.timings(now))
    }

    /// The next step to send, if there is work and room for one more in flight. Call it until it
    /// returns `None`, after everything that may have made work: submit, complete, activation.
    pub fn next_step(&mut self, now: Tick) -> Option<ScheduledStep> {
        if !self.active.as_ref()?.has_room() {
            return None;
        }
        self.admit(now);
        let deadline = self.limits.step_deadline;
        let (rows, states) = self.pick_draws();
        if !rows.is_empty() {
            let step = self.active.as_mut()?.send(rows, states, true, now, deadline);
            return Some(ScheduledStep { step, deadline: now + deadline });
        }
        let (mut rows, decode_rows) = self.pick_rows();
        if rows.is_empty() {
            return None;
        }
        let decoding = self.running_count() - self.prefilling.len();
        let active = self.active.as_mut()?;
        active.share_draws(&mut rows, decoding);
        let step = active.send(rows, Bytes::new(), decode_rows > 0, now, deadline);
        Some(ScheduledStep { step, deadline: now + self.limits.step_deadline })
    }

    /// Takes a step's result. Results of unknown steps, of steps known already and of other
    /// epochs are ignored: sending again is safe.
    pub fn complete(&mut self, result: StepResult, now: Tick) -> Vec<Emission> {
        let Some(active) = &mut self.active else { return Vec::new() };
        if active.shape.epoch != result.epoch {
            return Vec::new();
        }
        let Some(step) = active.take_sent(result.step, now) else { return Vec::new() };

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
        if row.status != RowStatus::Ok {
            let (status, detail) = (row.status, row.detail);
            return Err(SequenceError::Row { status, position: sent.position, detail });
        }
        let sequence = self.sequences.get_mut(&sent.sequence).expect("the row is current");
        let prompt_len = sequence.log.prompt().len() as u32;
        let of_prompt = if sent.is_draw { 0 } else { prompt_len };
        let of_prompt = (sent.position + sent.token_count).min(of_prompt);
        self.totals.prompt_tokens += u64::from(of_prompt.saturating_sub(sent.position));
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
                self.draw_ready.push_back(sent.sequence);
                Ok(())
            }
            (Wants::Token, RowValue::Sampled(sampled)) => {
                sequence.held_back = Some(sampled);
                self.tell_scores(sent.sequence, now, emissions);
                Ok(())
            }
            (wants, _) => Err(bad_result(step, format!("{wants:?} was asked for, another came"))),
        }
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
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let (index, finish) = sequence.append(sampled.token, now);
        self.totals.generated_tokens += 1;
        emissions.push(Emission { sequence: id, event: EmissionEvent::Token { index, sampled } });
        match finish {
            Some(finish) => self.finished(id, finish, now, emissions),
            None => self.decode_ready.push_back(id),
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
        if self.remove(id).is_some() {
            self.totals.failed += 1;
            emissions.push(Emission { sequence: id, event: EmissionEvent::Failed(error) });
        }
    }

    /// Takes a sequence out of everything. Its blocks return to the pool, now or with the last
    /// step that names them.
    fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        let sequence = self.sequences.remove(&id)?;
        for queue in self.waiting.values_mut() {
            queue.retain(|&waiting| waiting != id);
        }
        self.prefilling.retain(|&other| other != id);
        self.decode_ready.retain(|&other| other != id);
        self.draw_ready.retain(|&other| other != id);
        if let Some(active) = &mut self.active {
            active.blocks.give_back(&sequence.blocks);
            if sequence.sent > 0 {
                active.ended.push_back(id);
            }
        }
        Some(sequence)
    }

    /// Fails what waited or ran for too long. Call it several times a second.
    pub fn expire(&mut self, now: Tick) -> Vec<Emission> {
        let mut late = Vec::new();
        for (&id, sequence) in &self.sequences {
            let waited = now.since(sequence.waiting_since);
            if sequence.request.deadline.is_some_and(|deadline| now >= deadline) {
                let tokens = sequence.log.output().len() as u32;
                late.push((id, SequenceError::DeadlineExceeded { tokens }));
            } else if self.is_waiting(id) && waited >= self.limits.wait {
                late.push((id, SequenceError::WaitedTooLong { waited }));
            }
        }
        let mut emissions = Vec::new();
        for (id, error) in late {
            self.fail(id, error, &mut emissions);
        }
        emissions
    }

    /// A pipeline serves from now on. What ran on an earlier one becomes what `running` says;
    /// steps of the earlier epoch are fenced: their results are ignored, their blocks are free.
    pub fn set_pipeline(
        &mut self,
        shape: PipelineShape,
        running: Running,
        now: Tick,
    ) -> Vec<Emission> {
        let mut emissions = self.clear_pipeline(running, now);
        for id in self.sequences.keys().copied().collect::<Vec<_>>() {
            let needed_blocks = self.sequences[&id].blocks_needed();
            if needed_blocks > shape.kv_blocks {
                let kv_blocks = shape.kv_blocks;
                let error = SequenceError::NeverFits { needed_blocks, kv_blocks };
                self.fail(id, error, &mut emissions);
            }
        }
        self.active = Some(Active::new(shape));
        emissions
    }

    /// No pipeline serves any more. Requests that wait go on waiting; new ones are rejected.
    pub fn clear_pipeline(&mut self, running: Running, now: Tick) -> Vec<Emission> {
        self.active = None;
        let ran: Vec<_> =
            self.sequences.keys().copied().filter(|&id| !self.is_waiting(id)).collect();
        let mut emissions = Vec::new();
        self.prefilling.clear();
        self.decode_ready.clear();
        self.draw_ready.clear();
        // From the last, so that the first comes first in its queue.
        for id in ran.into_iter().rev() {
            match &running {
                Running::Fail(reason) => {
                    let error = SequenceError::PipelineLost { reason: reason.clone() };
                    self.fail(id, error, &mut emissions);
                }
                Running::Keep => {
                    let Some(sequence) = self.sequences.get_mut(&id) else { continue };
                    sequence.restart(now);
                    self.waiting.entry(sequence.request.class).or_default().push_front(id);
                }
            }
        }
        emissions
    }

    /// Fails everyone, running and waiting.
    pub fn fail_all(&mut self, reason: &str) -> Vec<Emission> {
        let mut emissions = Vec::new();
        for id in self.sequences.keys().copied().collect::<Vec<_>>() {
            let error = SequenceError::PipelineLost { reason: reason.to_owned() };
            self.fail(id, error, &mut emissions);
        }
        emissions
    }

    /// While held, nobody is admitted: requests wait and those that run go on.
    pub fn hold_admission(&mut self, hold: bool) {
        self.held = hold;
    }

    /// From now on every new request is rejected as [`Rejected::Draining`].
    pub fn close(&mut self) {
        self.closed = true;
    }

    /// Whether nothing runs. Requests may wait, and rows of ended sequences be on their way.
    pub fn is_idle(&self) -> bool {
        self.running_count() == 0
    }

    /// The epoch that serves.
    pub fn epoch(&self) -> Option<Epoch> {
        self.active.as_ref().map(|active| active.shape.epoch)
    }

    /// The oldest step that has been on its way for so long that somebody should ask the workers.
    pub fn overdue(&self, now: Tick) -> Option<StepId> {
        let active = self.active.as_ref()?;
        let (&id, step) = active.in_flight.first_key_value()?;
        (now.since(step.sent) > active.patience()).then_some(id)
    }

    /// How full it is.
    pub fn stats(&self) -> QueueStats {
        let blocks = self.active.as_ref().map(|active| &active.blocks);
        QueueStats {
            running: self.running_count() as u32,
            waiting: self.waiting_count() as u32,
            kv_blocks_total: blocks.map_or(0, BlockPool::total),
            kv_blocks_used: blocks.map_or(0, |blocks| blocks.total() - blocks.free_count()),
            steps_in_flight: self.active.as_ref().map_or(0, |active| active.in_flight.len() as u32),
            prompt_tokens: self.totals.prompt_tokens,
            generated_tokens: self.totals.generated_tokens,
            finished: self.totals.finished,
            failed: self.totals.failed,
            cancelled: self.totals.cancelled,
        }
    }

    fn waiting_count(&self) -> usize {
        self.waiting.values().map(VecDeque::len).sum()
    }

    fn running_count(&self) -> usize {
        self.sequences.len() - self.waiting_count()
    }

    fn is_waiting(&self, id: SequenceId) -> bool {
        self.waiting.values().any(|queue| queue.contains(&id))
    }
}

fn bad_result(step: StepId, detail: String) -> SequenceError {
    SequenceError::BadResult { step, detail }
}

/// Whether what is known of the answer ends it.
fn complete_already(request: &Request) -> Option<Finish> {
    let ended = (0..).zip(&request.forced);
    let by_token = ended.into_iter().find_map(|(i, &token)| sequence::finish_at(request, i, token));
    let scores_only = request.score_prompt && request.prompt.len() > 1;
    let by_length = (request.max_tokens == 0 && !scores_only)
        .then_some(Finish { reason: FinishReason::Length, stop_token: None });
    by_token.or(by_length)
}
