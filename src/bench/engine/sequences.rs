//! The sequences that an engine is measured with: their tokens, their blocks, and their steps.

use std::ops::Range;

use model::ModelConfig;
use proto::ids::{BlockId, Generation, PrefixHash, SequenceId};
use proto::step::{Output, Row, RowStatus, SamplingParameters};

use super::runner::Runner;
use super::{BenchError, Options};
use crate::pipeline::blocks_for;
use crate::random::Random;

/// Sequences of random tokens, each with blocks of its own.
///
/// The first has the prompt whose prefill is measured; what it has generated is forgotten when it
/// is measured again, for its blocks are written anew.
pub(super) struct Sequences {
    /// Of each sequence, at least as many as it has behind it when it decodes.
    tokens: Vec<Vec<u32>>,
    blocks: Vec<Vec<BlockId>>,
    prompt: usize,
    chunk: usize,
    context: usize,
    sampling: SamplingParameters,
}

impl Sequences {
    /// `count` sequences for a model of this shape.
    pub(super) fn new(options: &Options, model: &ModelConfig, count: usize) -> Self {
        let &Options { prompt, chunk, context, generate, seed, .. } = options;
        let mut random = Random(seed);
        let mut next_block = 0;
        let mut of = |tokens: usize, most: usize| {
            let blocks = next_block..next_block + blocks_for(most) as u32;
            next_block = blocks.end;
            let tokens: Vec<u32> = (0..tokens).map(|_| random.below(model.vocab)).collect();
            (tokens, blocks.map(BlockId).collect::<Vec<_>>())
        };
        let (tokens, blocks) = (0..count)
            .map(|index| {
                let read = if index == 0 { prompt.max(context) } else { context };
                // One more, for the first step to go on from.
                of(read + 1, read.max(context + generate))
            })
            .unzip();
        let sampling = options.sampling.clone();
        Self { tokens, blocks, prompt, chunk, context, sampling }
    }

    /// Blocks of all of them.
    pub(super) fn block_count(&self) -> u32 {
        self.blocks.iter().map(|blocks| blocks.len() as u32).sum()
    }

    /// Computes what every sequence has behind it.
    pub(super) fn fill(&self, runner: &mut Runner) -> Result<(), BenchError> {
        (0..self.tokens.len()).try_for_each(|sequence| self.read(runner, sequence, self.context))
    }

    /// The prompt of the first sequence, or as much of it as fills `chunks` chunks.
    pub(super) fn prefill(&self, runner: &mut Runner, chunks: usize) -> Result<(), BenchError> {
        self.read(runner, 0, self.prompt.min(chunks.saturating_mul(self.chunk)))
    }

    /// The first `count` tokens of a sequence, in chunks.
    fn read(&self, runner: &mut Runner, sequence: usize, count: usize) -> Result<(), BenchError> {
        for start in (0..count).step_by(self.chunk) {
            let end = count.min(start + self.chunk);
            let tokens = self.tokens[sequence][start..end].to_vec();
            runner.forward(&[self.row(sequence, start, tokens, Output::None)])?;
        }
        Ok(())
    }

    /// Generates `count` tokens of each of the first `batch` sequences, one of each in every step.
    pub(super) fn decode(
        &self,
        runner: &mut Runner,
        batch: usize,
        count: usize,
    ) -> Result<(), BenchError> {
        let mut last: Vec<u32> =
            self.tokens[..batch].iter().map(|tokens| tokens[self.context]).collect();
        for position in self.positions(count) {
            let row = |(sequence, token): (usize, &u32)| {
                let seed = sequence as u64;
                let parameters = SamplingParameters { seed, ..self.sampling.clone() };
                self.row(sequence, position, vec![*token], Output::Sample(Box::new(parameters)))
            };
            let rows: Vec<Row> = last.iter().enumerate().map(row).collect();
            last = runner.forward(&rows)?;
        }
        Ok(())
    }

    /// Where `count` tokens are decoded.
    fn positions(&self, count: usize) -> Range<usize> {
        self.context..self.context + count
    }

    fn row(&self, sequence: usize, position: usize, tokens: Vec<u32>, output: Output) -> Row {
        Row {
            sequence: SequenceId(sequence as u64 + 1),
            generation: Generation(1),
            position: position as u32,
            // The hashes are between coordinator and session; the engine does not look at them.
            prefix_hash_before: PrefixHash::EMPTY,
            prefix_hash_after: PrefixHash::EMPTY,
            blocks: self.blocks[sequence][..blocks_for(position + tokens.len())].to_vec(),
            tokens,
            output,
            status: RowStatus::Ok,
            detail: String::new(),
            traceparent: String::new(),
        }
    }
}
