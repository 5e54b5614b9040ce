//! What goes into router and schedulers and what comes out of them.

use std::time::Duration;

pub use proto::generate::Priority;
use proto::generate::{FinishReason, Timings};
use proto::ids::{
    Epoch, Incarnation, NumericsClass, PipelineId, PrefixHash, SequenceId, StepId, Term,
};
use proto::step::{RowStatus, Sampled, SamplingParameters, Step};

use super::microbatch::StepCost;
use crate::tick::Tick;

/// What may wait, run and be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests that may wait for KV; one more is refused.
    pub waiting_requests: u32,
    /// Tokens that are expected of those who wait, prompts and answers; a request that would make them more
    /// is refused.
    pub waiting_tokens: u64,
    /// The longest that a request waits for KV before it fails.
    pub wait: Duration,
    /// Requests that may run at once on one pipeline, whatever its KV would hold.
    pub running_requests: u32,
    /// Tokens in one step: decode rows and prefill chunks together.
    pub step_tokens: u32,
    /// The longest sequence, prompt and answer, in tokens: the model's context.
    pub context_tokens: u32,
    /// How long a step that reads prompts should take on the slowest stage.
    pub step_time: Duration,
    /// How long a step may be on its way before workers drop it.
    pub step_deadline: Duration,
    /// Sequences go on from the KV of others that began with the same tokens.
    pub prefix_cache: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // A minute of short answers on one small machine.
            waiting_requests: 256,
            // As many contexts of 4096.
            waiting_tokens: 1 << 20,
            wait: Duration::from_secs(60),
            // Beyond this a token costs the same and everyone only waits longer.
            running_requests: 256,
            // 640 KB of activations for a width of 2560: under the 1 MB that one message may be.
            step_tokens: 64,
            context_tokens: 4096,
            // A running answer waits for every step: five tokens a second are as fast as people read.
            step_time: Duration::from_millis(200),
            step_deadline: Duration::from_secs(30),
            prefix_cache: true,
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

/// Who asks, by a hash of what tells callers apart: those of one class get equal shares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Caller(pub [u8; 16]);

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
    pub priority: Priority,
    /// Who asks.
    pub caller: Caller,
    /// Only sequences of the same salt go on from each other's KV.
    pub salt: PrefixHash,
    /// When it is too late for the answer.
    pub deadline: Option<Tick>,
    /// W3C trace parent; empty when the request is not sampled.
    pub traceparent: String,
}

impl Request {
    /// For one token after `token`.
    pub fn probe(token: u32) -> Self {
        Self {
            prompt: vec![token],
            forced: Vec::new(),
            max_tokens: 1,
            min_tokens: 0,
            sampling: SamplingParameters::default(),
            stop_tokens: Vec::new(),
            score_prompt: false,
            priority: Priority::Interactive,
            caller: Caller::default(),
            salt: PrefixHash::EMPTY,
            deadline: None,
            traceparent: String::new(),
        }
    }
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
    /// Every pipeline of its class was gone for too long: those of others go on with other tokens.
    #[error("waited {} s for a pipeline of class {class}", waited.as_secs())]
    NoPipeline {
        /// Of the pipeline that it was taken for.
        class: NumericsClass,
        /// How long.
        waited: Duration,
    },
    /// The queue was full, and others wait for fewer requests, or wait while this is batch.
    #[error("{limit} requests are waiting, the most that may, and others go first")]
    GaveWay {
        /// How many may wait.
        limit: u32,
        /// When there may be room again, as far as whoever tells it knows.
        retry_after: Duration,
    },
    /// Its deadline passed.
    #[error("the deadline of the request passed after {tokens} tokens of the answer")]
    DeadlineExceeded {
        /// Length of the answer by then.
        tokens: u32,
    },
    /// No pipeline that serves now can ever hold it.
    #[error("needs {needed_blocks} KV blocks, no pipeline has more than {kv_blocks}")]
    NeverFits {
        /// Blocks of prompt and answer.
        needed_blocks: u32,
        /// Blocks of the largest pipeline.
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

/// How full one pipeline is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PipelineStats {
    /// Sequences that were admitted and have not ended.
    pub running: u32,
    /// Blocks of the pipeline.
    pub kv_blocks_total: u32,
    /// Blocks that are held or still named by a step on its way.
    pub kv_blocks_used: u32,
    /// Steps on their way.
    pub steps_in_flight: u32,
    /// Prompt tokens that came back computed, since start.
    pub prompt_tokens: u64,
    /// Tokens sampled, since start.
    pub generated_tokens: u64,
    /// Answers that ended well, since start; those of
    /// [`PipelineScheduler::finish`](super::PipelineScheduler::finish) too.
    pub finished: u64,
    /// Sequences that failed, since start.
    pub failed: u64,
    /// Sequences whose client went away, since start.
    pub cancelled: u64,
    /// Times that a sequence gave its blocks back, to begin again later, since start.
    pub preempted: u64,
    /// Tokens of prompts that were looked for in the prefix cache, since start.
    pub prefix_queries: u64,
    /// Those of them that were found.
    pub prefix_hits: u64,
    /// What the router has not counted.
    pub growth: Growth,
}

/// What a caller was served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Charge {
    /// In which class.
    pub priority: Priority,
    /// Who.
    pub caller: Caller,
    /// Tokens of answers, less those of prompts that others had computed.
    pub tokens: i64,
}

/// How those who run on a pipeline have grown since the router sent them there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Growth {
    /// Blocks that are taken, or that those who arrive will take at first, over those that the router
    /// has counted for them.
    pub blocks: i64,
    /// Of those that began with fewer blocks than they may need, how many have all by now.
    pub grown_up: u32,
    /// The part of `blocks` that is for batch.
    pub batch_blocks: i64,
    /// Those of `grown_up` that are batch.
    pub batch_grown_up: u32,
}
