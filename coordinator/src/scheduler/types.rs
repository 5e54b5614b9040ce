//! What goes into the scheduler and what comes out of it.

use std::time::Duration;

use proto::generate::{FinishReason, Timings};
use proto::ids::{Epoch, Incarnation, PipelineId, SequenceId, StepId, Term};
use proto::step::{RowStatus, Sampled, SamplingParameters, Step};

use super::microbatch::StepCost;
use crate::tick::Tick;

/// What the scheduler may hold and send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests that may wait for KV; one more is refused as [`Rejected::Full`].
    pub waiting_requests: u32,
    /// The longest that a request waits for KV before it fails.
    pub wait: Duration,
    /// Requests that may run at once, whatever the KV would hold.
    pub running_requests: u32,
    /// Tokens in one step: decode rows and prefill chunks together.
    pub step_tokens: u32,
    /// The longest sequence, prompt and answer, in tokens: the model's context.
    pub context_tokens: u32,
    /// How long a step may be on its way before workers drop it.
    pub step_deadline: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // A minute of short answers on one small machine.
            waiting_requests: 256,
            wait: Duration::from_secs(60),
            // Beyond this a token costs the same and everyone only waits longer.
            running_requests: 256,
            // 640 KB of activations for a width of 2560: under the 1 MB that one message may be.
            step_tokens: 64,
            context_tokens: 4096,
            step_deadline: Duration::from_secs(30),
        }
    }
}

/// The pipeline that steps are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PipelineShape {
    /// Which pipeline.
    pub pipeline: PipelineId,
    /// At which epoch; steps are numbered from 1 in each.
    pub epoch: Epoch,
    /// Under whose reign it was planned.
    pub term: Term,
    /// The process start of the first stage: where steps go.
    pub first_incarnation: Incarnation,
    /// How many stages.
    pub stages: u32,
    /// Block ids are `0..kv_blocks`.
    pub kv_blocks: u32,
    /// The first of several stages has the head too, and draws for about half of the rows.
    pub first_draws: bool,
    /// Of its slowest stage.
    pub cost: StepCost,
}

/// Whose turn it is when not all can be served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Someone waits for the answer: always before `Batch`.
    #[default]
    Interactive,
    /// Fills what is left.
    Batch,
}

/// A request for one answer, in token ids.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// At least one token.
    pub prompt: Vec<u32>,
    /// The first tokens of the answer when they are known already: never sampled again.
    pub forced: Vec<u32>,
    /// Length of the answer, forced tokens included. 0 only with `score_prompt`.
    pub max_tokens: u32,
    /// A stop token at a smaller index of the answer does not end it.
    pub min_tokens: u32,
    /// How tokens are drawn. The two counts are ignored: they are made from the token log.
    pub sampling: SamplingParameters,
    /// Tokens that end the answer; the one that does is part of it.
    pub stop_tokens: Vec<u32>,
    /// Log probabilities of the prompt's tokens from the second on.
    pub score_prompt: bool,
    /// Whose turn it is.
    pub class: Class,
    /// When it is too late for the answer.
    pub deadline: Option<Tick>,
    /// W3C trace parent; empty when the request is not sampled.
    pub traceparent: String,
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
    /// It can never be served: longer than the model's context or than the whole KV cache.
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
    /// There is no token to go on from.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// Forced tokens (or a length of 0) leave nothing to do: the answer is complete as it is.
    #[error("the answer is complete already")]
    Complete {
        /// Why it ended.
        finish: Finish,
    },
    /// No pipeline serves.
    #[error("no pipeline is serving")]
    NoPipeline,
    /// The coordinator is stopping.
    #[error("the coordinator is stopping")]
    Draining,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finish {
    /// In the client's words.
    pub reason: FinishReason,
    /// The stop token, when one ended it.
    pub stop_token: Option<u32>,
}

/// Why a sequence ended without being finished.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SequenceError {
    /// A stage refused its row.
    #[error("a stage refused to go on at position {position} ({status:?}): {detail}")]
    Row {
        /// How the row went.
        status: RowStatus,
        /// Of the row's first token.
        position: u32,
        /// The stage's words.
        detail: String,
    },
    /// A result did not match the step that was sent.
    #[error("the result of step {step} does not match what was asked: {detail}")]
    BadResult {
        /// Which step.
        step: StepId,
        /// What disagreed.
        detail: String,
    },
    /// Its pipeline ended under it, or there is none to run it.
    #[error("{reason}")]
    PipelineLost {
        /// In the cluster's words.
        reason: String,
    },
    /// It waited for KV for too long.
    #[error("waited {} s for room in the KV cache", waited.as_secs())]
    WaitedTooLong {
        /// How long.
        waited: Duration,
    },
    /// Its deadline passed.
    #[error("the deadline of the request passed after {tokens} tokens of the answer")]
    DeadlineExceeded {
        /// Length of the answer by then.
        tokens: u32,
    },
    /// The pipeline that serves now can never hold it.
    #[error("needs {needed_blocks} KV blocks, the pipeline has {kv_blocks}")]
    NeverFits {
        /// Blocks of prompt and answer.
        needed_blocks: u32,
        /// Blocks of the pipeline.
        kv_blocks: u32,
    },
}

/// Something to tell whoever asked for a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Emission {
    /// Which sequence.
    pub sequence: SequenceId,
    /// What happened.
    pub event: EmissionEvent,
}

/// What happened to a sequence. After `Finished` or `Failed` nothing more comes.
#[derive(Clone, Debug, PartialEq)]
pub enum EmissionEvent {
    /// ln p of the prompt's tokens from the second on; before the first token of the answer.
    PromptScores(Vec<f32>),
    /// The next token of the answer.
    Token {
        /// Its index in the answer, forced tokens counted.
        index: u32,
        /// The token.
        sampled: Sampled,
    },
    /// The answer is complete.
    Finished {
        /// Why it ended.
        finish: Finish,
        /// Where the time went.
        timings: Timings,
    },
    /// There will be no more of it.
    Failed(SequenceError),
}

/// A step to send to the first stage.
#[derive(Clone, Debug, PartialEq)]
pub struct ScheduledStep {
    /// Ready to be encoded: its header names the first stage's incarnation.
    pub step: Step,
    /// When workers drop it.
    pub deadline: Tick,
}

/// What becomes of running sequences when their pipeline's epoch ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Running {
    /// They fail with this reason.
    Fail(String),
    /// They start again from their token logs, before everyone who waits.
    Keep,
}

/// How full the scheduler is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// Admitted sequences.
    pub running: u32,
    /// Requests that wait for KV.
    pub waiting: u32,
    /// Blocks of the pipeline.
    pub kv_blocks_total: u32,
    /// Blocks that are reserved or still named by a step on its way.
    pub kv_blocks_used: u32,
    /// Steps on their way.
    pub steps_in_flight: u32,
    /// Prompt tokens that came back computed, since start.
    pub prompt_tokens: u64,
    /// Tokens sampled, since start.
    pub generated_tokens: u64,
    /// Answers that ended well, since start; those of [`Scheduler::finish`](super::Scheduler::finish) too.
    pub finished: u64,
    /// Sequences that failed, since start.
    pub failed: u64,
    /// Sequences whose client went away, since start.
    pub cancelled: u64,
}
