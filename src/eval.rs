//! Perplexity of a model on given tokens.
//!
//! The tokens are cut into windows of `window` inputs without overlap, and the token after every
//! input is scored with the window's own context only: 2049 tokens give 2048 scores.

use std::ops::Range;

use model::Store;
use proto::ids::{BlockId, SequenceId};
use proto::step::{Output, RowValue};
use serde::Serialize;

use crate::pipeline::{Feed, Pipeline, PipelineError, PipelineOptions, blocks_for};

/// Inputs in one step: enough rows that weights are unpacked for many, few enough to stay in the
/// cache.
const STEP_TOKENS: usize = 256;

/// What `tercet eval --json` prints.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Tokens that were scored.
    pub tokens: u64,
    /// Mean negative log likelihood of one, in nats.
    pub nll: f64,
    /// e to that.
    pub perplexity: f64,
}

/// Why there is no evaluation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// A score needs a token before it.
    #[error("at least 2 tokens are needed to score one, found {found}")]
    TooFew {
        /// How many there are.
        found: usize,
    },
    /// A window is one sequence.
    #[error("a window must have 1 to {context} inputs, the model's context, found {window}")]
    Window {
        /// What was asked for.
        window: usize,
        /// What the model can hold.
        context: u32,
    },
    /// The pipeline failed.
    #[error("failed to score the tokens")]
    Pipeline(#[from] PipelineError),
}

/// Scores `tokens`. `progress` is told how many of how many inputs are done.
///
/// # Errors
///
/// [`EvalError`].
pub fn evaluate(
    store: &Store,
    options: &PipelineOptions,
    tokens: &[u32],
    window: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Evaluation, EvalError> {
    let context = store.config().context;
    if window == 0 || window > context as usize {
        return Err(EvalError::Window { window, context });
    }
    if tokens.len() < 2 {
        return Err(EvalError::TooFew { found: tokens.len() });
    }
    let kv_blocks = blocks_for(window) as u32;
    let step_tokens = STEP_TOKENS.min(window);
    let mut pipeline = Pipeline::open(store, options, kv_blocks, step_tokens as u32)?;
    let inputs = tokens.len() - 1;
    // In f64: the sum of millions of logarithms keeps more digits than any of them has.
    let mut log_likelihood = 0.0;
    for (index, range) in windows(tokens.len(), window).enumerate() {
        let blocks = (0..kv_blocks).map(BlockId).collect();
        // A sequence of its own, in blocks that the one before has left.
        let sequence = SequenceId(index as u64 + 1);
        let mut feed = Feed::new(sequence, tokens[range.clone()].to_vec(), blocks);
        let mut from = range.start;
        while feed.remaining() > 0 {
            let count = feed.remaining().min(step_tokens);
            let targets = tokens[from + 1..=from + count].to_vec();
            let row = feed.row(count, Output::Score(targets));
            for value in pipeline.forward(row.as_slice())? {
                if let RowValue::Scores(scores) = value {
                    log_likelihood += scores.iter().map(|&score| f64::from(score)).sum::<f64>();
                }
            }
            from += count;
            progress(from, inputs);
        }
    }
    let nll = -log_likelihood / inputs as f64;
    Ok(Evaluation { tokens: inputs as u64, nll, perplexity: nll.exp() })
}

/// The inputs of each window: all tokens but the last, cut without overlap.
fn windows(tokens: usize, window: usize) -> impl Iterator<Item = Range<usize>> {
    let inputs = tokens.saturating_sub(1);
    (0..inputs).step_by(window).map(move |start| start..(start + window).min(inputs))
}

#[cfg(test)]
mod tests;
