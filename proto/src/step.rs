//! Steps, rows and results as the rooms see them. Units: positions and counts in tokens.

use std::time::Duration;

use bytes::Bytes;

use crate::ids::{
    BlockId, Epoch, Generation, Incarnation, PipelineId, PipelineRef, PrefixHash, SequenceId,
    StepId, Term,
};

/// One microbatch on its way through a pipeline.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Who it is for and which it is.
    pub header: StepHeader,
    /// What to compute.
    pub rows: Vec<Row>,
    /// Sequences that send no more rows.
    pub ended_sequences: Vec<SequenceId>,
    /// What earlier stages took.
    pub stage_times: Vec<StageTime>,
    /// f32 little endian, `[tokens of the step][hidden]`; empty before the first stage, except of
    /// rows to draw from ([`Output::Draw`]), and empty behind it once they are drawn.
    pub activations: Bytes,
}

impl Step {
    /// Whether tokens are drawn from residual streams that it brings, and nothing else is done.
    pub fn is_draw(&self) -> bool {
        let is_draw = |row: &Row| matches!(row.output, Output::Draw(_));
        !self.rows.is_empty() && self.rows.iter().all(is_draw)
    }

    /// Whether nothing is left to do: every row was drawn, or refused, by an earlier stage.
    pub fn is_drawn(&self) -> bool {
        let is_over = |row: &Row| {
            let is_drawn = matches!(row.output, Output::Drawn(_));
            is_drawn || (row.status != RowStatus::Ok && matches!(row.output, Output::Draw(_)))
        };
        !self.rows.is_empty() && self.rows.iter().all(is_over)
    }
}

/// What every data message carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepHeader {
    /// Which pipeline.
    pub pipeline: PipelineId,
    /// At which epoch.
    pub epoch: Epoch,
    /// Under which coordinator.
    pub term: Term,
    /// The process start this is meant for.
    pub dst_incarnation: Incarnation,
    /// The step's number.
    pub step: StepId,
    /// Every step up to this one needs no keeping any more.
    pub acked_step: StepId,
    /// Time left; zero means expired.
    pub deadline_remaining: Duration,
}

/// Consecutive tokens of one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Which sequence.
    pub sequence: SequenceId,
    /// Which of its lives.
    pub generation: Generation,
    /// Of the first token.
    pub position: u32,
    /// At least one.
    pub tokens: Vec<u32>,
    /// Hash of the tokens before `position`.
    pub prefix_hash_before: PrefixHash,
    /// Hash of those and `tokens`.
    pub prefix_hash_after: PrefixHash,
    /// Blocks of positions `0..position + tokens`.
    pub blocks: Vec<BlockId>,
    /// What is wanted back.
    pub output: Output,
    /// What an earlier stage refused stays refused.
    pub status: RowStatus,
    /// For people, when `status` is not OK.
    pub detail: String,
    /// W3C trace parent; empty when the request is not sampled.
    pub traceparent: String,
}

/// What a row wants back.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Only the KV.
    None,
    /// One token from the logits after the last token.
    Sample(Box<SamplingParameters>),
    /// The log probability of each target: one for every token of the row.
    Score(Vec<u32>),
    /// All logits after every token.
    Logits,
    /// The residual stream after the last token: the first stage will draw from it.
    State,
    /// One token from the residual stream after the row's only token, which comes with the step.
    /// Nothing of the row is computed but norm, head and draw; its KV is filled already.
    Draw(Box<SamplingParameters>),
    /// What an earlier stage drew: passed on.
    Drawn(Box<Sampled>),
}

/// How a row went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RowStatus {
    /// Computed.
    #[default]
    Ok,
    /// Of an older generation than the stage has seen.
    Stale,
    /// The stage's blocks do not chain to the row's prefix hash.
    NeedState,
    /// Its step's deadline had passed.
    Expired,
    /// A value was infinite or not a number.
    NotFinite,
    /// It broke the contract (a block id, a token or a length out of range).
    Invalid,
}

/// How to draw a token. The sampler's order of operations is in `docs/numerics.md`.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParameters {
    /// 0: greedy.
    pub temperature: f32,
    /// 0: off.
    pub top_k: u32,
    /// 1: off.
    pub top_p: f32,
    /// 0: off.
    pub min_p: f32,
    /// 1: off. Applies to tokens of prompt and output.
    pub repetition_penalty: f32,
    /// 0: off. Applies once to tokens of the output.
    pub presence_penalty: f32,
    /// 0: off. Applies by count to tokens of the output.
    pub frequency_penalty: f32,
    /// Key of the draws, with `choice` and the position.
    pub seed: u64,
    /// Which of several answers to one request.
    pub choice: u32,
    /// Added to the logits.
    pub logit_bias: Vec<(u32, f32)>,
    /// Sparse counts of the prompt's tokens, ascending by token; only with a repetition penalty.
    pub prompt_counts: Vec<(u32, u32)>,
    /// Sparse counts of the output's tokens, ascending by token; only with a penalty.
    pub output_counts: Vec<(u32, u32)>,
    /// `None`: no logprobs; 0: the sampled token's only.
    pub top_logprobs: Option<u32>,
}

impl Default for SamplingParameters {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            choice: 0,
            logit_bias: Vec::new(),
            prompt_counts: Vec::new(),
            output_counts: Vec::new(),
            top_logprobs: None,
        }
    }
}

/// What one stage took for one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageTime {
    /// Index of the stage.
    pub stage: u32,
    /// In the engine.
    pub compute: Duration,
    /// Between arriving and entering the engine.
    pub wait: Duration,
    /// The part of `wait` in which the engine computed steps that came before. The rest is what
    /// waking up took.
    pub behind: Duration,
}

/// Exactly one for every step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepResult {
    /// At which epoch.
    pub epoch: Epoch,
    /// Of which step.
    pub step: StepId,
    /// One for every row, in the rows' order.
    pub rows: Vec<RowResult>,
    /// Of every stage.
    pub stage_times: Vec<StageTime>,
}

/// Where a result comes from, as its message says. Who reads results believes none from elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResultSource {
    /// Which pipeline.
    pub pipeline: PipelineId,
    /// As the reader asked.
    pub term: Term,
    /// The process start that computed it.
    pub incarnation: Incarnation,
}

/// What became of one row.
#[derive(Clone, Debug, PartialEq)]
pub struct RowResult {
    /// Which sequence.
    pub sequence: SequenceId,
    /// Which of its lives.
    pub generation: Generation,
    /// Of the row's first token.
    pub position: u32,
    /// How many tokens the row had.
    pub token_count: u32,
    /// How it went.
    pub status: RowStatus,
    /// For people, when `status` is not OK.
    pub detail: String,
    /// What was asked for, when `status` is OK.
    pub value: RowValue,
}

/// What a row asked for.
#[derive(Clone, Debug, PartialEq)]
pub enum RowValue {
    /// Nothing, or the row failed.
    None,
    /// The drawn token.
    Sampled(Sampled),
    /// One log probability for every target.
    Scores(Vec<f32>),
    /// f32 little endian, `[tokens][vocab]`.
    Logits(Bytes),
    /// f32 little endian, `[hidden]`.
    State(Bytes),
}

/// A drawn token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Its log probability before temperature and cuts, when asked for.
    pub logprob: Option<f32>,
    /// The most probable tokens, best first.
    pub top: Vec<TokenLogprob>,
}

/// A token and its log probability (natural logarithm).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: u32,
    /// ln p.
    pub logprob: f32,
}

/// What a receiver says of a step to its sender.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepReply {
    /// The step's pipeline, with the receiver's epoch when it fenced, else the step's.
    pub at: PipelineRef,
    /// Which step; 0 when the reply is about the link.
    pub step: StepId,
    /// Index of the stage that speaks.
    pub stage: u32,
    /// What it says.
    pub verdict: StepVerdict,
    /// For people.
    pub detail: String,
}

/// What a receiver decided about a whole step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepVerdict {
    /// It will be computed.
    Accepted,
    /// An older epoch or another incarnation.
    Fenced,
    /// An epoch this worker was not prepared for.
    NotPrepared,
    /// Header or checksum disagree: it was damaged on its way, and may be sent again once.
    Corrupt,
    /// The link to the stage after the one that speaks is down.
    DownstreamLost,
    /// More in flight than was agreed.
    Busy,
    /// It arrived whole and breaks the contract, or the receiver cannot decode it: the same bytes
    /// would be refused again.
    Invalid,
}

/// Gets a worker ready to be one stage of a pipeline at a new epoch.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepare {
    /// Scopes the epoch.
    pub cluster_id: String,
    /// Which pipeline.
    pub pipeline: PipelineId,
    /// At which epoch.
    pub epoch: Epoch,
    /// Under which coordinator.
    pub term: Term,
    /// The process start this is meant for.
    pub dst_incarnation: Incarnation,
    /// Which model.
    pub model: crate::ids::ModelId,
    /// How KV is stored.
    pub kv_type: crate::plan::KvType,
    /// Index of the worker's stage.
    pub stage: u32,
    /// Every stage, in order.
    pub stages: Vec<crate::plan::StagePlan>,
    /// Block ids are `0..kv_blocks` on every stage.
    pub kv_blocks: u32,
    /// The most tokens in one step.
    pub max_step_tokens: u32,
    /// The most steps sent and not acknowledged.
    pub max_in_flight: u32,
    /// It holds norm and head too, though it is not the last stage: for [`Output::Draw`].
    pub draws: bool,
}
