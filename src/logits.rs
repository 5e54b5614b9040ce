//! The logits of a model after every token of a sequence, however the work is cut: what
//! `tercet debug logits` prints, and what the tests of exactness compare.

use model::Store;
use proto::ids::{BlockId, SequenceId};
use proto::step::{Output, RowValue, SamplingParameters};

use crate::pipeline::{Feed, Pipeline, PipelineError, PipelineOptions, blocks_for};
use crate::random::Random;

/// The longest row of a sequence that only keeps company.
const COMPANY_CHUNK: usize = 32;

/// How the sequence is computed. None of it but the KV type may change a bit.
#[derive(Clone, Copy, Debug, Default)]
pub struct LogitsOptions {
    /// Stages, kernels, threads, KV type.
    pub pipeline: PipelineOptions,
    /// Tokens of the sequence in one step; `None`: all of them.
    pub chunk: Option<usize>,
    /// Other sequences in the same steps, of random tokens.
    pub among: usize,
    /// Of what the others are made.
    pub seed: u64,
}

/// Why there are no logits.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogitsError {
    /// There is nothing to compute.
    #[error("at least one token is needed")]
    NoTokens,
    /// More than the model can hold.
    #[error("{tokens} tokens do not fit the model's context of {context}")]
    Context {
        /// How many there are.
        tokens: usize,
        /// What the model can hold.
        context: u32,
    },
    /// The model has no such token.
    #[error("token {token} is not below the vocabulary's size {vocab}")]
    Token {
        /// Which.
        token: u32,
        /// How many tokens there are.
        vocab: u32,
    },
    /// A chunk of nothing never ends.
    #[error("a chunk must have at least one token")]
    Chunk,
    /// The pipeline failed.
    #[error("failed to compute the logits")]
    Pipeline(#[from] PipelineError),
}

/// The logits after every token: `[tokens][vocab]`.
///
/// # Errors
///
/// [`LogitsError`].
pub fn logits(
    store: &Store,
    options: &LogitsOptions,
    tokens: &[u32],
) -> Result<Vec<Vec<f32>>, LogitsError> {
    let config = store.config();
    check(tokens, config.context, config.vocab)?;
    let chunk = options.chunk.unwrap_or(tokens.len()).min(tokens.len());
    if chunk == 0 {
        return Err(LogitsError::Chunk);
    }
    let mut random = Random(options.seed);
    let blocks_each = blocks_for(tokens.len());
    let mut blocks: Vec<BlockId> =
        (0..(blocks_each * (options.among + 1)) as u32).map(BlockId).collect();
    if options.among > 0 {
        // Nobody's blocks lie side by side.
        random.shuffle(&mut blocks);
    }
    let mut blocks = blocks.chunks(blocks_each).map(<[BlockId]>::to_vec);
    let mut feed = |sequence, tokens| {
        Feed::new(SequenceId(sequence), tokens, blocks.next().unwrap_or_default())
    };
    let mut wanted = feed(1, tokens.to_vec());
    let mut others: Vec<Feed> = (0..options.among)
        .map(|index| {
            let tokens = tokens.iter().map(|_| random.below(config.vocab)).collect();
            feed(index as u64 + 2, tokens)
        })
        .collect();

    let kv_blocks = blocks_each * (options.among + 1);
    let step_tokens = chunk + options.among * COMPANY_CHUNK;
    let mut pipeline =
        Pipeline::open(store, &options.pipeline, kv_blocks as u32, step_tokens as u32)?;
    let mut logits = Vec::with_capacity(tokens.len());
    while let Some(row) = wanted.row(chunk, Output::Logits) {
        let place = random.below(others.len() as u32 + 1) as usize;
        let mut rows: Vec<_> =
            others.iter_mut().filter_map(|other| company(other, &mut random)).collect();
        let place = place.min(rows.len());
        rows.insert(place, row);
        if let RowValue::Logits(bytes) = &pipeline.forward(&rows)?[place] {
            logits.extend(bytes.chunks_exact(config.vocab as usize * 4).map(floats));
        }
    }
    Ok(logits)
}

/// A row of a sequence that only keeps company: of any length, and wanting this or that.
fn company(feed: &mut Feed, random: &mut Random) -> Option<proto::step::Row> {
    let count = 1 + random.below(COMPANY_CHUNK as u32) as usize;
    let output = match random.below(3) {
        0 => Output::None,
        1 => Output::Sample(Box::default()),
        _ => Output::Sample(Box::new(SamplingParameters {
            temperature: 1.0,
            top_k: 5,
            seed: 7,
            ..SamplingParameters::default()
        })),
    };
    feed.row(count, output)
}

fn check(tokens: &[u32], context: u32, vocab: u32) -> Result<(), LogitsError> {
    if tokens.is_empty() {
        return Err(LogitsError::NoTokens);
    }
    if tokens.len() > context as usize {
        return Err(LogitsError::Context { tokens: tokens.len(), context });
    }
    match tokens.iter().find(|&&token| token >= vocab) {
        Some(&token) => Err(LogitsError::Token { token, vocab }),
        None => Ok(()),
    }
}

/// f32 little endian.
fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|&four| f32::from_le_bytes(four)).collect()
}

#[cfg(test)]
mod tests;
