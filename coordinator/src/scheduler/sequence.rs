//! One request on its way through the scheduler, and the rows that are made for it.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use proto::BLOCK_TOKENS;
use proto::generate::{FinishReason, Timings};
use proto::ids::{BlockId, SequenceId};
use proto::step::{Output, Row, RowStatus, Sampled, SamplingParameters};

use super::types::{Finish, Request};
use crate::tick::Tick;
use crate::token_log::TokenLog;

/// A request that was taken.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) log: TokenLog,
    pub(super) request: Request,
    /// Tokens of the log whose rows were sent in this generation.
    pub(super) sent: usize,
    /// Reserved; empty while it waits.
    pub(super) blocks: Vec<BlockId>,
    pub(super) scoring: Scoring,
    /// Came before the last of the prompt's scores; goes out after them.
    pub(super) held_back: Option<Sampled>,
    /// The residual stream after the last token sent, to draw the next from.
    pub(super) state: Option<Bytes>,
    /// Of the prompt; counted once, here, because the prompt does not change.
    prompt_counts: Vec<(u32, u32)>,
    submitted: Tick,
    /// Since when it waits; later than `submitted` after it lost its pipeline.
    pub(super) waiting_since: Tick,
    admitted: Option<Tick>,
    first_token: Option<Tick>,
}

/// The log probabilities of the prompt's tokens.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Scoring {
    /// Not asked for, or told already.
    Done,
    /// By position of the token before; `None` is still on its way.
    Collecting(Vec<Option<f32>>),
}

impl Sequence {
    pub(super) fn new(mut request: Request, now: Tick) -> Self {
        let log = TokenLog::new(&request.prompt, &request.forced);
        // The log holds them from here on.
        request.prompt = Vec::new();
        request.forced = Vec::new();
        let repetition = request.sampling.repetition_penalty != 1.0;
        let mut sequence = Self {
            prompt_counts: if repetition { log.prompt_counts() } else { Vec::new() },
            log,
            request,
            sent: 0,
            blocks: Vec::new(),
            scoring: Scoring::Done,
            held_back: None,
            state: None,
            submitted: now,
            waiting_since: now,
            admitted: None,
            first_token: None,
        };
        if sequence.request.score_prompt {
            sequence.scoring = sequence.nothing_scored();
        }
        sequence
    }

    fn nothing_scored(&self) -> Scoring {
        Scoring::Collecting(vec![None; self.log.prompt().len() - 1])
    }

    /// Blocks for prompt and answer together.
    pub(super) fn blocks_needed(&self) -> u32 {
        blocks_for(self.log.prompt().len(), self.request.max_tokens)
    }

    pub(super) fn admit(&mut self, blocks: Vec<BlockId>, now: Tick) {
        self.blocks = blocks;
        self.admitted.get_or_insert(now);
    }

    /// Forgets what the lost pipeline held of it. What was told stays told: the log is kept.
    pub(super) fn restart(&mut self, now: Tick) {
        self.log.begin_generation();
        self.sent = 0;
        self.blocks.clear();
        self.held_back = None;
        self.state = None;
        self.waiting_since = now;
        if self.scoring != Scoring::Done {
            self.scoring = self.nothing_scored();
        }
    }

    /// Where the tokens end that are to be sent: an answer of no tokens needs only the scores.
    fn feed_end(&self) -> usize {
        match self.request.max_tokens {
            0 => self.log.prompt().len() - 1,
            _ => self.log.tokens().len(),
        }
    }

    /// Tokens that have to be computed before one is drawn.
    pub(super) fn prompt_tokens(&self) -> usize {
        self.feed_end()
    }

    /// Tokens that are known and not sent.
    pub(super) fn unsent(&self) -> usize {
        self.feed_end() - self.sent
    }

    /// The next row, of at most `budget` tokens, and marks its tokens as sent.
    pub(super) fn next_row(&mut self, id: SequenceId, budget: usize) -> Row {
        let begin = self.sent;
        let mut end = self.feed_end().min(begin + budget);
        // A row wants one thing back: those that score end before the one that samples.
        let score_end = match self.scoring {
            Scoring::Collecting(_) => self.log.prompt().len() - 1,
            Scoring::Done => 0,
        };
        let output = if begin < score_end {
            end = end.min(score_end);
            Output::Score(self.log.tokens()[begin + 1..end + 1].to_vec())
        } else if end == self.log.tokens().len() {
            Output::Sample(Box::new(self.sampling()))
        } else {
            Output::None
        };
        self.sent = end;
        self.row(id, begin..end, output)
    }

    /// The row to draw from the state after its last token, and that state; once.
    pub(super) fn draw_row(&mut self, id: SequenceId) -> Option<(Row, Bytes)> {
        let state = self.state.take()?;
        let output = Output::Draw(Box::new(self.sampling()));
        Some((self.row(id, self.sent.saturating_sub(1)..self.sent, output), state))
    }

    fn row(&self, id: SequenceId, positions: Range<usize>, output: Output) -> Row {
        Row {
            sequence: id,
            generation: self.log.generation(),
            position: positions.start as u32,
            tokens: self.log.tokens()[positions.clone()].to_vec(),
            prefix_hash_before: self.log.hash_at(positions.start),
            prefix_hash_after: self.log.hash_at(positions.end),
            blocks: self.blocks[..positions.end.div_ceil(BLOCK_TOKENS as usize)].to_vec(),
            output,
            status: RowStatus::Ok,
            detail: String::new(),
            traceparent: self.request.traceparent.clone(),
        }
    }

    /// The request's parameters, with the counts as the log has them now.
    fn sampling(&self) -> SamplingParameters {
        let mut sampling = self.request.sampling.clone();
        let repetition = sampling.repetition_penalty != 1.0;
        let presence = sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0;
        sampling.prompt_counts = self.prompt_counts.clone();
        sampling.output_counts =
            if repetition || presence { self.log.output_counts() } else { Vec::new() };
        sampling
    }

    /// Notes the scores of the tokens behind those at `position` and after.
    pub(super) fn add_scores(&mut self, position: u32, scores: &[f32]) {
        if let Scoring::Collecting(all) = &mut self.scoring {
            for (slot, &score) in all[position as usize..].iter_mut().zip(scores) {
                *slot = Some(score);
            }
        }
    }

    /// Adds a sampled token and says its index, and whether the answer ends with it.
    pub(super) fn append(&mut self, token: u32, now: Tick) -> (u32, Option<Finish>) {
        self.first_token.get_or_insert(now);
        let index = self.log.append(token);
        (index, finish_at(&self.request, index, token))
    }

    pub(super) fn timings(&self, now: Tick) -> Timings {
        let admitted = self.admitted.unwrap_or(now);
        let first_token = self.first_token.unwrap_or(now);
        Timings {
            queue_us: micros(admitted.since(self.submitted)),
            prefill_us: micros(first_token.since(admitted)),
            decode_us: micros(now.since(first_token)),
        }
    }
}

/// Whether `token` at `index` ends the answer of `request`.
pub(super) fn finish_at(request: &Request, index: u32, token: u32) -> Option<Finish> {
    if index >= request.min_tokens && request.stop_tokens.contains(&token) {
        return Some(Finish { reason: FinishReason::Stop, stop_token: Some(token) });
    }
    (index + 1 >= request.max_tokens)
        .then_some(Finish { reason: FinishReason::Length, stop_token: None })
}

/// Blocks for a prompt and an answer.
pub(super) fn blocks_for(prompt_tokens: usize, max_tokens: u32) -> u32 {
    let tokens = prompt_tokens as u64 + u64::from(max_tokens);
    tokens.div_ceil(u64::from(BLOCK_TOKENS)).try_into().unwrap_or(u32::MAX)
}

fn micros(span: Duration) -> u64 {
    span.as_micros().try_into().unwrap_or(u64::MAX)
}
