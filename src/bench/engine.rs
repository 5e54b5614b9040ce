//! Prefill, decode and batched decode of one engine in this process, against what the machine
//! could do at best.
//!
//! One stage that holds the whole model, and no network. Prompts are random tokens, and every
//! sequence has its own keys and values. A prompt is cut into chunks as the scheduler of a
//! coordinator would that had nothing else to do: whole steps, and what is left in the last one.
//! Drawing is greedy if nothing else is asked for; every decoded token goes through the head, a prompt's tokens do not.

mod limited;
mod runner;
mod sequences;

use std::time::Instant;

use kernels::Backend;
use model::{ModelConfig, Store};
use proto::plan::KvType;
use proto::step::{RowStatus, SamplingParameters};
use serde::Serialize;
use worker::engine::{
    Engine, EngineConfig, EngineError, Placement, Shortcuts, StageModel, StepProfile,
};

pub use self::limited::Limited;
pub use self::runner::Parts;
use self::runner::{Runner, share};
use self::sequences::Sequences;
use super::limits::{self, Memory, TokenWork};
use super::machine::{self, Machine};
use super::{Report, Spread};

/// Chunks of a prompt whose time is taken apart.
const PROFILED_CHUNKS: usize = 2;

/// Steps of decoding whose time is taken apart, at most.
const PROFILED_STEPS: usize = 8;

/// What to measure, and how it is computed.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which kernels.
    pub backend: Backend,
    /// Threads that compute.
    pub threads: usize,
    /// How keys and values are stored.
    pub kv_type: KvType,
    /// Which work is left out where that cannot be seen.
    pub shortcuts: Shortcuts,
    /// Where weights and threads are.
    pub placement: Placement,
    /// Tokens of the prompt whose prefill is measured.
    pub prompt: usize,
    /// Tokens of a prompt in one step.
    pub chunk: usize,
    /// Tokens that every decoding sequence has behind it.
    pub context: usize,
    /// Tokens that every sequence generates.
    pub generate: usize,
    /// Sequences that decode together.
    pub batches: Vec<usize>,
    /// Times everything is measured; the middle counts.
    pub repeats: usize,
    /// How tokens are drawn: temperature and cuts. Each sequence has a seed of its own.
    pub sampling: SamplingParameters,
    /// Of what the prompts are made.
    pub seed: u64,
    /// Memory that is read for the limit of the bandwidth, in bytes.
    pub read_bytes: usize,
}

impl Default for Options {
    /// The fastest kernels and every core; prompts in steps of a coordinator's default.
    fn default() -> Self {
        Self {
            backend: Backend::detect(),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            kv_type: KvType::default(),
            shortcuts: Shortcuts::default(),
            placement: Placement::default(),
            prompt: 512,
            chunk: coordinator::LimitsConfig::default().step_tokens as usize,
            context: 16,
            generate: 32,
            batches: vec![1, 2, 4, 8, 16],
            repeats: 3,
            sampling: SamplingParameters::default(),
            seed: 0,
            read_bytes: limits::READ_BYTES,
        }
    }
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// Something must be at least one.
    #[error("{what} must be at least 1")]
    Zero {
        /// What was 0.
        what: &'static str,
    },
    /// More than the model can hold.
    #[error("{what} needs {tokens} tokens, more than the model's context of {context}")]
    Context {
        /// For what.
        what: &'static str,
        /// Tokens of one sequence.
        tokens: usize,
        /// What the model can hold.
        context: u32,
    },
    /// The engine could not be set up.
    #[error("failed to set up the engine")]
    Engine(#[from] EngineError),
    /// A row was not computed.
    #[error("the tokens from position {position} on were not computed ({status:?}): {detail}")]
    Row {
        /// Of the row's first token.
        position: u32,
        /// What the engine says.
        status: RowStatus,
        /// In words.
        detail: String,
    },
    /// The system does not say how much memory was used.
    #[error("failed to read the peak of the resident memory")]
    Peak(#[source] std::io::Error),
    /// The system does not say what pages this process's memory is on.
    #[error("failed to read how much memory is on huge pages")]
    HugePages(#[source] std::io::Error),
}

/// What was measured: what `tercet bench engine --json` prints.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// Version of the program.
    pub version: &'static str,
    /// Where.
    pub machine: Machine,
    /// Name of the model.
    pub model: String,
    /// Which kernels.
    pub isa: &'static str,
    /// Threads that computed.
    pub threads: usize,
    /// How keys and values were stored.
    pub kv_type: &'static str,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens of a prompt in one step.
    pub chunk: usize,
    /// Tokens that every decoding sequence had behind it.
    pub context: usize,
    /// Tokens that every sequence generated.
    pub generate: usize,
    /// At which tokens were drawn; 0 is greedy.
    pub temperature: f32,
    /// From how many of the most probable tokens they were drawn; 0 is all.
    pub top_k: u32,
    /// From which share of the distribution they were drawn.
    pub top_p: f32,
    /// Times everything was measured.
    pub repeats: usize,
    /// Of the prompt; no head in it. The median, as every rate here.
    pub prefill_tokens_per_s: f64,
    /// Of one sequence.
    pub decode_tokens_per_s: f64,
    /// Of several sequences, all of them together.
    pub batched: Vec<Batched>,
    /// What the repeats gave.
    pub spread: Spreads,
    /// What the machine can do, and what it would allow.
    pub limits: Limited,
    /// How much of what it would allow was reached.
    pub shares: Shares,
    /// What one token needs, whatever computes it.
    pub work: TokenWork,
    /// What one token of one sequence really read.
    pub bytes_per_token: BytesPerToken,
    /// Where the time goes.
    pub parts: PartsOf,
    /// Zeros met by one sequence.
    pub zeros: Zeros,
    /// Share of the head's rows that one sequence did not compute exactly.
    pub screened: f64,
    /// Which work was left out.
    pub shortcuts: ShortcutsUsed,
    /// The most memory that was resident while the engine ran.
    pub peak_rss_bytes: u64,
    /// Memory on huge pages, weights among it: with small pages decoding is slower.
    pub huge_page_bytes: u64,
    /// Bytes of the weights' files.
    pub weight_bytes: u64,
    /// Bytes of keys and values, if every block were used.
    pub kv_bytes: u64,
}

/// Decoding of several sequences together.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Batched {
    /// How many.
    pub batch: usize,
    /// Of all of them together.
    pub tokens_per_s: f64,
    /// What the repeats gave.
    pub spread: Spread,
    /// Of the rate that multiply-adds allow, or for a batch that memory holds back more, of the one
    /// that it allows when every weight is read once a step.
    pub share_of_limit: f64,
    /// Where the time goes.
    pub parts: Parts,
}

/// What the repeats gave, in tokens per second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spreads {
    /// Of prefill.
    pub prefill: Spread,
    /// Of one sequence.
    pub decode: Spread,
}

/// Measured rates over what the machine would allow.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Shares {
    /// Of `limits.dense_decode_tokens_per_s`.
    pub decode: f64,
    /// Of `limits.prefill_tokens_per_s`.
    pub prefill: f64,
    /// Of the bandwidth, by the bytes that decoding one sequence really read.
    pub read: f64,
}

/// Bytes that are read for one token of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct BytesPerToken {
    /// Matrices and embedding rows.
    pub weights: f64,
    /// Keys and values.
    pub kv: f64,
}

impl BytesPerToken {
    fn sum(self) -> f64 {
        self.weights + self.kv
    }
}

/// Bytes of the keys and values of `tokens` tokens in all layers.
fn kv_read(config: &ModelConfig, kv_type: KvType, tokens: usize) -> f64 {
    let of_layer = 2 * u64::from(config.kv_heads) * u64::from(config.head_dim);
    let of_token = u64::from(config.layers) * of_layer * u64::from(kv_type.value_bytes());
    of_token as f64 * tokens as f64
}

/// Where the time goes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PartsOf {
    /// In steps of a prompt.
    pub prefill: Parts,
    /// In steps of one sequence.
    pub decode: Parts,
}

/// Shares of values that were zero while one sequence decoded.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Zeros {
    /// Of gates behind a squared ReLU.
    pub gate: f64,
    /// Of the int8 values that enter down-projections.
    pub down: f64,
}

impl Zeros {
    fn of(profile: &StepProfile) -> Self {
        Self {
            gate: share(profile.gate_zeros, profile.gate_values),
            down: share(profile.down_zeros, profile.down_values),
        }
    }
}

/// Which work was left out where that cannot be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ShortcutsUsed {
    /// Work on zeros.
    pub zeros: bool,
    /// Rows of the head that provably do not win.
    pub screen: bool,
}

/// Measures an engine that holds the whole of `store`.
///
/// # Errors
///
/// [`BenchError`].
pub fn measure(
    store: &Store,
    options: &Options,
    report: Report<'_>,
) -> Result<Measured, BenchError> {
    check(options, store.config().context)?;
    let &Options { backend, threads, repeats, .. } = options;
    // Limits before and after, what is filled, the profile, and every repeat.
    let total = (repeats * (2 + options.batches.len()) + 4) as u64;
    let mut done = 0;
    let mut next = |what: &str| {
        report(what, done, total);
        done += 1;
    };

    next("limits");
    let before = limits::measure(backend, threads, &Memory::new(options.read_bytes)).limits;
    // The memory that was read for them is no part of the engine's peak. Where the system does not
    // forget, the peak is at most too high.
    let _ = machine::forget_peak();

    next("first steps");
    let most = options.batches.iter().copied().max().unwrap_or(1).max(1);
    let sequences = Sequences::new(options, store.config(), most);
    let model = StageModel::open(store, 0..store.config().layers)?;
    let config = EngineConfig {
        backend,
        threads,
        kv_type: options.kv_type,
        kv_blocks: sequences.block_count(),
        max_step_tokens: options.chunk.max(most) as u32,
        shortcuts: options.shortcuts,
        placement: options.placement,
    };
    let mut runner = Runner::new(Engine::new(model, config)?);
    sequences.fill(&mut runner)?;
    // Maps the pages of the head, too.
    sequences.decode(&mut runner, 1, 1)?;

    let mut prefill = Vec::new();
    let mut decode = Vec::new();
    let mut batched = vec![Vec::new(); options.batches.len()];
    for _ in 0..repeats {
        next("prefill");
        let seconds = timed(|| sequences.prefill(&mut runner, usize::MAX))?;
        prefill.push(options.prompt as f64 / seconds);
        next("decode");
        let seconds = timed(|| sequences.decode(&mut runner, 1, options.generate))?;
        decode.push(options.generate as f64 / seconds);
        for (&batch, rates) in options.batches.iter().zip(&mut batched) {
            next(&format!("batch of {batch}"));
            let seconds = timed(|| sequences.decode(&mut runner, batch, options.generate))?;
            rates.push((batch * options.generate) as f64 / seconds);
        }
    }
    next("where the time goes");
    let of_prefill = runner.profiled(|runner| sequences.prefill(runner, PROFILED_CHUNKS))?;
    let steps = options.generate.min(PROFILED_STEPS);
    let of_decode = runner.profiled(|runner| sequences.decode(runner, 1, steps))?;
    let of_batches = options
        .batches
        .iter()
        .map(|&batch| runner.profiled(|runner| sequences.decode(runner, batch, steps)));
    let of_batches = of_batches.collect::<Result<Vec<_>, _>>()?;
    let peak_rss_bytes = machine::peak_rss_bytes().map_err(BenchError::Peak)?;
    let huge_page_bytes = machine::huge_page_bytes().map_err(BenchError::HugePages)?;
    let (weight_bytes, kv_bytes) = (runner.engine().weight_bytes(), runner.engine().kv_bytes());
    drop(runner);

    next("limits");
    let after = limits::measure(backend, threads, &Memory::new(options.read_bytes)).limits;
    let work = TokenWork::of(store.config());
    let limits = Limited::new(before, after, &work);
    let (prefill, decode) = (Spread::of(&prefill), Spread::of(&decode));
    let batched = options.batches.iter().zip(batched).zip(of_batches);
    let batched = batched.map(|((&batch, rates), profile)| {
        let spread = Spread::of(&rates);
        let share_of_limit = spread.median / limits.batch_tokens_per_s(batch);
        let parts = Parts::of(&profile);
        Batched { batch, tokens_per_s: spread.median, spread, share_of_limit, parts }
    });
    let bytes_per_token = BytesPerToken {
        weights: of_decode.weight_bytes as f64 / steps as f64,
        // Of the middle step.
        kv: kv_read(
            store.config(),
            options.kv_type,
            options.context + options.generate.div_ceil(2),
        ),
    };
    Ok(Measured {
        version: env!("CARGO_PKG_VERSION"),
        machine: Machine::this(),
        model: store.config().name.clone(),
        isa: backend.name(),
        threads,
        kv_type: options.kv_type.name(),
        prompt: options.prompt,
        chunk: options.chunk,
        context: options.context,
        generate: options.generate,
        temperature: options.sampling.temperature,
        top_k: options.sampling.top_k,
        top_p: options.sampling.top_p,
        repeats,
        prefill_tokens_per_s: prefill.median,
        decode_tokens_per_s: decode.median,
        batched: batched.collect(),
        spread: Spreads { prefill, decode },
        shares: Shares {
            decode: decode.median / limits.dense_decode_tokens_per_s,
            prefill: prefill.median / limits.prefill_tokens_per_s,
            read: decode.median * bytes_per_token.sum() / (limits.best.read_gb_per_s * 1e9),
        },
        bytes_per_token,
        parts: PartsOf { prefill: Parts::of(&of_prefill), decode: Parts::of(&of_decode) },
        zeros: Zeros::of(&of_decode),
        screened: share(of_decode.screened_rows, of_decode.screened_rows + of_decode.exact_rows),
        shortcuts: ShortcutsUsed {
            zeros: options.shortcuts.zeros,
            screen: options.shortcuts.screen,
        },
        limits,
        work,
        peak_rss_bytes,
        huge_page_bytes,
        weight_bytes,
        kv_bytes,
    })
}

/// The seconds that `work` took.
fn timed(work: impl FnOnce() -> Result<(), BenchError>) -> Result<f64, BenchError> {
    let begin = Instant::now();
    work()?;
    // A clock that stands still between two looks would divide by nothing.
    Ok(begin.elapsed().as_secs_f64().max(1e-9))
}

/// Refuses what cannot be measured, before anything is.
fn check(options: &Options, context: u32) -> Result<(), BenchError> {
    let sequences = options.batches.iter().min().copied().unwrap_or(1);
    for (what, count) in [
        ("the number of threads", options.threads),
        ("the number of tokens of the prompt", options.prompt),
        ("the number of tokens in a chunk", options.chunk),
        ("the number of tokens to generate", options.generate),
        ("the number of sequences in a batch", sequences),
        ("the number of repeats", options.repeats),
    ] {
        if count == 0 {
            return Err(BenchError::Zero { what });
        }
    }
    for (what, tokens) in [
        ("the prompt", options.prompt),
        ("decoding", options.context.saturating_add(options.generate)),
    ] {
        if tokens > context as usize {
            return Err(BenchError::Context { what, tokens, context });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
