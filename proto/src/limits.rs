//! The bounds of everything that arrives over the wire, each with its reason.

use std::time::Duration;

/// Tokens in one step. At a width of 8192 their activations are 32 MiB, half of [`MESSAGE_BYTES`].
pub const STEP_TOKENS: usize = 1024;

/// Rows in one step: a step of nothing but decode rows.
pub const STEP_ROWS: usize = 1024;

/// Blocks that one row may name: contexts of up to 262,144 tokens.
pub const ROW_BLOCKS: usize = 8192;

/// Bytes of one gRPC message between coordinator and workers: the activations of a full step of a
/// wide model, or the logits of a few tokens, with room to spare.
pub const MESSAGE_BYTES: usize = 64 << 20;

/// Bytes of one message between client and coordinator: a prompt of a whole context as token ids
/// fits many times.
pub const CLIENT_MESSAGE_BYTES: usize = 4 << 20;

/// Stages of one pipeline: no known model has more layers.
pub const STAGES: usize = 512;

/// The highest id of a pipeline. They are numbered from 1, so that none comes near it.
pub const PIPELINE_ID: u64 = 1 << 53;

/// Stages that one worker may say it holds: one active and one prepared of many pipelines.
pub const HELD_STAGES: usize = 64;

/// Bytes of what a worker says of itself: [`HELD_STAGES`] of them, each of some hundred bytes, and
/// room to spare.
pub const DESCRIPTION_BYTES: usize = 64 << 10;

/// Workers whose distance one worker may tell: racks full of them, in a value of some kilobytes.
pub const ROUND_TRIPS: usize = 256;

/// The longest round trip that is told, in microseconds: a second, after which nobody is waited for.
pub const ROUND_TRIP_US: u32 = 1_000_000;

/// Sequences that one step may report as ended: more ended ones wait for the next step.
pub const ENDED_SEQUENCES: usize = 4096;

/// Entries of a sparse list of token counts: a full context of distinct tokens.
pub const TOKEN_COUNTS: usize = 262_144;

/// Biased tokens in one request, as in OpenAI's API.
pub const LOGIT_BIAS: usize = 300;

/// Most probable tokens reported at one place, as in OpenAI's API.
pub const TOP_LOGPROBS: u32 = 20;

/// Tokens of a prompt, or ids that a resuming client has.
pub const PROMPT_TOKENS: usize = 262_144;

/// Messages of one conversation.
pub const CHAT_MESSAGES: usize = 4096;

/// Bytes of a chat template's own arguments as JSON: a few switches. As values they take sixteen
/// times as much memory.
pub const TEMPLATE_ARGUMENT_BYTES: usize = 64 << 10;

/// Stop strings of one request. OpenAI allows four.
pub const STOP_STRINGS: usize = 4;

/// Bytes of one stop string. The answer's last bytes are held back by as many.
pub const STOP_STRING_BYTES: usize = 64;

/// Stop tokens of one request.
pub const STOP_TOKENS: usize = 64;

/// Bytes of a name, an address, an idempotency key or a trace parent.
pub const NAME_BYTES: usize = 256;

/// Bytes of what tells one caller's prompts from another's: `user`, `cache_salt`.
pub const CALLER_BYTES: usize = 1024;

/// Bytes of a text for people that travels with a status.
pub const DETAIL_BYTES: usize = 1024;

/// HTTP/2 flow control of one stream: more than a LAN's bandwidth times delay (25 Gbit/s times
/// 0.5 ms is 1.5 MB).
pub const STREAM_WINDOW_BYTES: u32 = 2 << 20;

/// HTTP/2 flow control of one connection: it has one stream that carries much. So much may lie
/// unread in a worker for each of them.
pub const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;

/// How often a quiet connection of the data plane is probed.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_millis(500);

/// How long a probe may go unanswered: a silent host is found within two seconds.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_millis(1500);
