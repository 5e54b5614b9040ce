//! One request on its way through the scheduler, and the rows that are made for it.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use proto::BLOCK_TOKENS;
use proto::generate::{FinishReason, Timings};
use proto::ids::{BlockId, NumericsClass, SequenceId};
use proto::step::{Output, Row, RowStatus, Sampled, SamplingParameters};

use super::blocks::BlockKey;
use super::leaving::{MAX_DEATHS, MAX_DEATHS_IN_ALL};
use super::queue::Ticket;
use super::types::{Caller, Finish, Priority, Request};
use super::{PROBES, Stand};
use crate::tick::Tick;
use crate::token_log::TokenLog;

/// An answer of open length is expected to have so many tokens: a few paragraphs.
const OPEN_ANSWER_TOKENS: u32 = 256;

/// A request as a log of tokens. It is made where prompts are tokenised (hashing a long one takes a
/// while), waits in the router, runs on a pipeline, and goes back to the router when that is lost.
#[derive(Clone, Debug)]
pub struct Sequence {
    id: SequenceId,
    pub(super) log: TokenLog,
    pub(super) request: Request,
    /// Tokens of the log that need no row any more in this generation: it was sent, or others have
    /// computed them.
    pub(super) sent: usize,
    /// Those of them that others have computed.
    pub(super) shared: usize,
    /// Held; empty while it waits.
    pub(super) blocks: Vec<BlockId>,
    /// Its first blocks, as many as are known to be full.
    pub(super) published: usize,
    /// Up to which block others wait for it to fill them.
    pub(super) computes: usize,
    /// The block that it waits for.
    pub(super) awaits: Option<BlockKey>,
    /// Tokens of the prompt that were shared when it first began.
    cached_tokens: u32,
    /// What the router counts for it until its pipeline says what it has.
    promised: u32,
    pub(super) scoring: Scoring,
    /// Came before the last of the prompt's scores; goes out after them.
    pub(super) held_back: Option<Sampled>,
    /// The residual stream after the last token sent, to draw the next from.
    pub(super) state: Option<Bytes>,
    /// In which of a scheduler's queues it is.
    pub(super) place: Option<(Stand, Ticket)>,
    /// Its client reads nothing at present.
    pub(super) is_held: bool,
    /// It would get a row of its answer if it were not held.
    pub(super) is_parked: bool,
    /// How often its pipeline was lost while it ran, since its last token.
    pub(super) deaths: u32,
    /// The same since it was taken, whatever came in between.
    pub(super) deaths_in_all: u32,
    /// How many tokens its answer had when that last happened.
    died_at: Option<usize>,
    /// How often it was replayed since its last token, because a stage had lost what it held of it.
    pub(super) replays: u32,
    /// Of the prompt; counted once, here, because the prompt does not change.
    prompt_counts: Vec<(u32, u32)>,
    /// Nobody asked for a length of the answer: it may be shorter where less fits.
    open_length: bool,
    /// The first forced token that ends the answer, and its index.
    stopped_at: Option<(u32, u32)>,
    /// Of the pipeline that it began on: others would go on with other tokens.
    class: Option<NumericsClass>,
    submitted: Tick,
    /// Since when it waits; later than `submitted` after it lost its pipeline.
    waiting_since: Tick,
    admitted: Option<Tick>,
    first_token: Option<Tick>,
}

/// Why a request makes no sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the prompt has no tokens")]
pub struct NotASequence;

/// The log probabilities of the prompt's tokens.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Scoring {
    /// Not asked for, or told already.
    Done,
    /// By position of the token before; `None` is still on its way.
    Collecting(Vec<Option<f32>>),
}

impl Sequence {
    /// The sequence of a request, before anyone has taken it. It computes: not for an async thread.
    ///
    /// # Errors
    ///
    /// [`NotASequence`]
    pub fn new(mut request: Request) -> Result<Self, NotASequence> {
        if request.prompt.is_empty() {
            return Err(NotASequence);
        }
        let log = TokenLog::new(&request.prompt, &request.forced);
        let stopped_at = (0..).zip(request.forced.iter().copied()).find(|&(index, token)| {
            index >= request.min_tokens && request.stop_tokens.contains(&token)
        });
        // The log holds them from here on.
        request.prompt = Vec::new();
        request.forced = Vec::new();
        let repetition = request.sampling.repetition_penalty != 1.0;
        let mut sequence = Self {
            id: SequenceId(0),
            prompt_counts: if repetition { log.prompt_counts() } else { Vec::new() },
            log,
            request,
            sent: 0,
            shared: 0,
            blocks: Vec::new(),
            published: 0,
            computes: 0,
            awaits: None,
            cached_tokens: 0,
            promised: 0,
            scoring: Scoring::Done,
            held_back: None,
            state: None,
            place: None,
            is_held: false,
            is_parked: false,
            deaths: 0,
            deaths_in_all: 0,
            died_at: None,
            replays: 0,
            open_length: false,
            stopped_at,
            class: None,
            submitted: Tick::ZERO,
            waiting_since: Tick::ZERO,
            admitted: None,
            first_token: None,
        };
        if sequence.request.score_prompt {
            sequence.scoring = sequence.nothing_scored();
        }
        Ok(sequence)
    }

    /// Another choice of the same request: its seed is drawn from for its own number.
    pub fn set_choice(&mut self, choice: u32) {
        self.request.sampling.choice = choice;
    }

    /// Its trace's parent.
    pub fn set_traceparent(&mut self, traceparent: String) {
        self.request.traceparent = traceparent;
    }

    /// When it is too late for the answer.
    pub fn set_deadline(&mut self, deadline: Tick) {
        self.request.deadline = Some(deadline);
    }

    /// The router takes it.
    pub(crate) fn submit(
        &mut self,
        id: SequenceId,
        max_tokens: u32,
        class: NumericsClass,
        since: Tick,
    ) {
        self.name(id);
        self.request.max_tokens = max_tokens;
        self.class = Some(class);
        self.submitted = since;
        self.waiting_since = since;
    }

    /// Length of its answer at most.
    pub(crate) fn set_max_tokens(&mut self, max_tokens: u32) {
        self.request.max_tokens = max_tokens;
    }

    /// Whether nobody asked for a length of the answer.
    pub(crate) fn set_open_length(&mut self, open_length: bool) {
        self.open_length = open_length;
    }

    /// Whether its answer may be made shorter.
    pub(crate) fn has_open_length(&self) -> bool {
        self.open_length
    }

    /// Its answer has so many tokens at most from now on, more than it has already; it waits anew.
    pub(crate) fn shorten(&mut self, max_tokens: u32, now: Tick) {
        self.request.max_tokens = max_tokens;
        self.waiting_since = now;
    }

    pub(super) fn name(&mut self, id: SequenceId) {
        self.id = id;
    }

    /// Its name, from when the router took it.
    pub fn id(&self) -> SequenceId {
        self.id
    }

    /// Whether it only asks a pipeline whether it computes.
    pub(super) fn is_probe(&self) -> bool {
        self.id.0 & PROBES != 0
    }

    /// Tokens of the prompt.
    pub fn prompt_tokens(&self) -> u32 {
        self.log.prompt().len() as u32
    }

    /// Tokens of the answer so far, those that were known at the start among them.
    pub fn output_tokens(&self) -> u32 {
        self.log.output().len() as u32
    }

    /// Length of the answer at most.
    pub fn max_tokens(&self) -> u32 {
        self.request.max_tokens
    }

    /// Length of the answer at least, unless it ends by its length.
    pub(crate) fn min_tokens(&self) -> u32 {
        self.request.min_tokens
    }

    /// Whose turn it is.
    pub fn priority(&self) -> Priority {
        self.request.priority
    }

    /// Who asks.
    pub(crate) fn caller(&self) -> Caller {
        self.request.caller
    }

    /// Another asks for it.
    #[cfg(test)]
    pub(crate) fn set_caller(&mut self, caller: Caller) {
        self.request.caller = caller;
    }

    /// Tokens that are known: those of the prompt, and of the answer so far.
    pub(crate) fn known_tokens(&self) -> u32 {
        self.log.tokens().len() as u32
    }

    /// Tokens that it will probably take, prompt and answer.
    pub(crate) fn tokens_expected(&self) -> u64 {
        let answer = self.request.max_tokens;
        let answer = if self.open_length { answer.min(OPEN_ANSWER_TOKENS) } else { answer };
        u64::from(self.prompt_tokens()) + u64::from(answer)
    }

    /// When it is too late for the answer.
    pub fn deadline(&self) -> Option<Tick> {
        self.request.deadline
    }

    /// Since when it waits.
    pub fn waiting_since(&self) -> Tick {
        self.waiting_since
    }

    /// Where it may run, once it was taken.
    pub(crate) fn class(&self) -> Option<NumericsClass> {
        self.class
    }

    /// Whether what is known of the answer ends it, if that has `max_tokens` at most.
    pub(crate) fn complete_already(&self, max_tokens: u32) -> Option<Finish> {
        if let Some((_, token)) = self.stopped_at.filter(|&(index, _)| index < max_tokens) {
            return Some(Finish { reason: FinishReason::Stop, stop_token: Some(token) });
        }
        let scores = self.request.score_prompt && self.prompt_tokens() > 1;
        let scores_only = max_tokens == 0 && scores && self.output_tokens() == 0;
        (self.output_tokens() >= max_tokens && !scores_only)
            .then_some(Finish { reason: FinishReason::Length, stop_token: None })
    }

    fn nothing_scored(&self) -> Scoring {
        Scoring::Collecting(vec![None; self.log.prompt().len() - 1])
    }

    /// Blocks for the prompt and the longest answer: what it holds at most.
    pub(crate) fn blocks_at_most(&self) -> u32 {
        blocks_for(self.log.prompt().len(), self.request.max_tokens)
    }

    /// Blocks for the tokens that are known and the next one: what it begins with.
    pub(crate) fn blocks_to_begin(&self) -> u32 {
        blocks_for(self.log.tokens().len(), 1).min(self.blocks_at_most())
    }

    /// Whether it may need more blocks than `held` some day.
    pub(crate) fn may_outgrow(&self, held: u32) -> bool {
        held < self.blocks_at_most()
    }

    /// The router gives it a pipeline and counts what it begins with.
    pub(crate) fn promise(&mut self) -> u32 {
        self.promised = self.blocks_to_begin();
        self.promised
    }

    /// What the router counts for it.
    pub(super) fn promised(&self) -> u32 {
        self.promised
    }

    /// Blocks that it lacks for its next token; only one that decodes lacks any.
    pub(super) fn blocks_lacking(&self) -> u32 {
        let needed = blocks_for(self.sent, 1);
        needed.saturating_sub(self.blocks.len() as u32)
    }

    /// It begins with these blocks, of which the first `shared` are full. Tokens of its prompt that
    /// were looked for in the prefix cache, and that were found, when it begins for the first time.
    pub(super) fn admit(&mut self, blocks: Vec<BlockId>, shared: usize, now: Tick) -> (u32, u32) {
        self.blocks = blocks;
        self.shared = shared * BLOCK_TOKENS as usize;
        self.sent = self.shared;
        if self.admitted.is_some() || self.scores() {
            self.admitted.get_or_insert(now);
            return (0, 0);
        }
        self.admitted = Some(now);
        self.cached_tokens = self.shared.min(self.log.prompt().len()) as u32;
        (self.prompt_tokens(), self.cached_tokens)
    }

    /// Whether its prompt is still to be scored.
    pub(crate) fn scores(&self) -> bool {
        self.scoring != Scoring::Done
    }

    /// What was known of it is computed after all.
    pub(super) fn knew_nothing(&mut self) {
        if self.first_token.is_none() {
            self.cached_tokens = 0;
        }
    }

    /// Whether it has ever run: it was taken on by a pipeline.
    pub(crate) fn was_admitted(&self) -> bool {
        self.admitted.is_some()
    }

    /// It waits anew from now on, for as long as others.
    pub(crate) fn wait_on(&mut self, now: Tick) {
        self.waiting_since = now;
    }

    /// Whether this pipeline has worked for it.
    pub(super) fn has_run(&self) -> bool {
        self.sent > self.shared || self.replays > 0
    }

    /// Its pipeline is lost. One that has got further since the last time was not what killed that.
    pub(super) fn pipeline_died(&mut self) {
        if !self.has_run() {
            return;
        }
        self.deaths_in_all = self.deaths_in_all.saturating_add(1);
        let tokens = self.log.output().len();
        self.deaths = match self.died_at.replace(tokens) {
            Some(before) if before == tokens => self.deaths.saturating_add(1),
            _ => 1,
        };
    }

    /// Whether it may be tried on another pipeline after those that it lost.
    pub(super) fn may_go_on(&self) -> bool {
        self.deaths < MAX_DEATHS && self.deaths_in_all < MAX_DEATHS_IN_ALL
    }

    /// Forgets what the lost pipeline held of it. What was told stays told: the log is kept.
    pub(super) fn restart(&mut self, now: Tick) {
        self.begin_again(now);
        self.replays = 0;
        // Where it goes on next is found again whether its client reads.
        self.is_held = false;
    }

    /// Forgets what its pipeline holds of it, and stays there.
    pub(super) fn begin_again(&mut self, now: Tick) {
        self.log.begin_generation();
        (self.sent, self.shared) = (0, 0);
        (self.published, self.computes, self.awaits) = (0, 0, None);
        self.blocks.clear();
        self.place = None;
        self.is_parked = false;
        self.held_back = None;
        self.state = None;
        self.waiting_since = now;
        if self.scores() {
            self.scoring = self.nothing_scored();
        }
    }

    /// Where the tokens end that are to be sent: an answer of no tokens needs only the scores.
    pub(super) fn feed_end(&self) -> usize {
        match self.request.max_tokens {
            0 => self.log.prompt().len() - 1,
            _ => self.log.tokens().len(),
        }
    }

    /// Tokens that have to be computed before one is drawn.
    pub(super) fn tokens_to_feed(&self) -> usize {
        self.feed_end() - self.shared
    }

    /// Tokens that are known and not sent.
    pub(super) fn unsent(&self) -> usize {
        self.feed_end() - self.sent
    }

    /// The next row, of at most `budget` tokens, and marks its tokens as sent.
    pub(super) fn next_row(&mut self, budget: usize) -> Row {
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
        self.row(begin..end, output)
    }

    /// The row to draw from the state after its last token, and that state; once.
    pub(super) fn draw_row(&mut self) -> Option<(Row, Bytes)> {
        let state = self.state.take()?;
        let output = Output::Draw(Box::new(self.sampling()));
        Some((self.row(self.sent.saturating_sub(1)..self.sent, output), state))
    }

    fn row(&self, positions: Range<usize>, output: Output) -> Row {
        Row {
            sequence: self.id,
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
        self.replays = 0;
        let index = self.log.append(token);
        (index, finish_at(&self.request, index, token))
    }

    pub(crate) fn timings(&self, now: Tick) -> Timings {
        let admitted = self.admitted.unwrap_or(now);
        let first_token = self.first_token.unwrap_or(now);
        Timings {
            queue_us: micros(admitted.since(self.submitted)),
            prefill_us: micros(first_token.since(admitted)),
            decode_us: micros(now.since(first_token)),
            cached_tokens: self.cached_tokens,
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
