//! A request for tokens and what comes back, as coordinator and client see them.

/// A request for one answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerateRequest {
    /// Name or id; empty: the one that is served.
    pub model: String,
    /// What to go on from.
    pub prompt: Prompt,
    /// 0: as many as the context allows.
    pub max_tokens: u32,
    /// Not fewer than these before an end token counts.
    pub min_tokens: u32,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// Tokens that end the answer, beside the model's own.
    pub stop_token_ids: Vec<u32>,
    /// Keep the stop string in the text.
    pub include_stop: bool,
    /// Go on past the model's end tokens.
    pub ignore_eos: bool,
    /// Absent: derived from the idempotency key.
    pub seed: Option<u64>,
    /// Empty: made by the coordinator.
    pub idempotency_key: String,
    /// Hex; the numerics class this answer must have; empty: any.
    pub class: String,
    /// Index of the next token the client lacks; equals the length of `received_ids`.
    pub resume_index: u64,
    /// The tokens it has: forced, never sampled again.
    pub received_ids: Vec<u32>,
    /// `None`: no logprobs; 0: the sampled token's only.
    pub top_logprobs: Option<u32>,
    /// Log probabilities of the prompt's tokens too.
    pub score_prompt: bool,
    /// 0: the server's default.
    pub deadline_ms: u32,
    /// Only prompts of the same salt share KV; empty: those of the same `user`.
    pub cache_salt: String,
    /// Who asks, in the client's words; empty: whoever has its address. Callers get fair shares.
    pub user: String,
    /// Whose turn it is when not all can be served.
    pub priority: Priority,
}

/// Whose turn it is when not all can be served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Someone waits for the answer: always before `Batch`.
    #[default]
    Interactive,
    /// Fills what is left.
    Batch,
}

impl Priority {
    /// In their order.
    pub const ALL: [Self; 2] = [Self::Interactive, Self::Batch];
}

/// What to go on from.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// Completed as it is.
    Text(String),
    /// Completed as they are.
    Tokens(Vec<u32>),
    /// The chat template is applied.
    Conversation {
        /// In order.
        messages: Vec<ChatMessage>,
        /// A JSON object for the template; empty: nothing.
        template_arguments_json: String,
    },
}

impl Default for Prompt {
    fn default() -> Self {
        Self::Text(String::new())
    }
}

/// One turn of a conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChatMessage {
    /// system, user, assistant …
    pub role: String,
    /// Plain text; never parsed for special tokens.
    pub content: String,
}

/// How tokens are drawn; an absent field is the server's default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampling {
    /// Default 1.
    pub temperature: Option<f32>,
    /// Default off.
    pub top_k: Option<u32>,
    /// Default 1.
    pub top_p: Option<f32>,
    /// Default 0.
    pub min_p: Option<f32>,
    /// Default 1.
    pub repetition_penalty: Option<f32>,
    /// Default 0.
    pub presence_penalty: Option<f32>,
    /// Default 0.
    pub frequency_penalty: Option<f32>,
    /// Added to logits.
    pub logit_bias: Vec<(u32, f32)>,
}

/// What comes back, in this order: one `Started`, deltas, one `Finished`.
#[derive(Clone, Debug, PartialEq)]
pub enum GenerateEvent {
    /// Admitted.
    Started(Started),
    /// More of the answer.
    Delta(Delta),
    /// The end.
    Finished(Finished),
}

/// The request was admitted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Started {
    /// The server's name for it.
    pub request_id: String,
    /// Name of the model.
    pub model: String,
    /// Numerics class, hex.
    pub class: String,
    /// The seed in force.
    pub seed: u64,
    /// Length of the prompt.
    pub prompt_tokens: u32,
    /// As admitted.
    pub max_tokens: u32,
    /// When asked for: of every prompt token but the first.
    pub prompt_logprobs: Vec<Logprobs>,
}

/// More of the answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delta {
    /// Index of the first of `tokens` in the answer.
    pub index: u64,
    /// The tokens.
    pub tokens: Vec<u32>,
    /// Whole characters only; may be empty, may lag behind the tokens.
    pub text: String,
    /// One a token, when asked for.
    pub logprobs: Vec<Logprobs>,
}

/// Log probabilities at one place of the answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Logprobs {
    /// What was drawn.
    pub token: u32,
    /// ln p.
    pub logprob: f32,
    /// The token's bytes.
    pub token_bytes: Vec<u8>,
    /// The most probable, best first.
    pub top: Vec<Candidate>,
}

/// One of the most probable tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Candidate {
    /// The token.
    pub token: u32,
    /// ln p.
    pub logprob: f32,
    /// The token's bytes.
    pub token_bytes: Vec<u8>,
}

/// The end of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// Why it ended.
    pub reason: FinishReason,
    /// The stop string, or `<id>` of a stop token, when one matched.
    pub stop_reason: String,
    /// Length of the prompt.
    pub prompt_tokens: u32,
    /// Length of the answer.
    pub completion_tokens: u32,
    /// Where the time went.
    pub timings: Timings,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token or a stop string.
    Stop,
    /// As many tokens as were asked for.
    Length,
}

impl FinishReason {
    /// As OpenAI's API writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// Where the time of an answer went, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Timings {
    /// Waiting for admission.
    pub queue_us: u64,
    /// From admission to the first token.
    pub prefill_us: u64,
    /// From the first token to the last.
    pub decode_us: u64,
    /// Tokens of the prompt that took none: others had computed them.
    pub cached_tokens: u32,
}
