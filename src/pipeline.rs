//! A whole model as engines one after the other in this thread: what a cluster computes, without
//! its network. For measuring and checking, not for serving.

use model::Store;
use proto::ids::{BlockId, Generation, PrefixHash, SequenceId};
use proto::plan::KvType;
use proto::step::{Output, Row, RowStatus, RowValue};
use worker::engine::{Engine, EngineConfig, EngineError, Placement, Shortcuts, StageModel};

/// How a pipeline is cut and computed.
#[derive(Clone, Copy, Debug)]
pub struct PipelineOptions {
    /// Contiguous parts of nearly equal length.
    pub stages: u32,
    /// Which kernels.
    pub backend: kernels::Backend,
    /// Threads that compute, of each stage.
    pub threads: usize,
    /// How KV is stored.
    pub kv_type: KvType,
    /// Which work is left out where that cannot be seen.
    pub shortcuts: Shortcuts,
    /// Where weights and threads are.
    pub placement: Placement,
}

impl Default for PipelineOptions {
    /// One stage, the fastest kernels, every core, KV in f16.
    fn default() -> Self {
        Self {
            stages: 1,
            backend: kernels::Backend::detect(),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            kv_type: KvType::default(),
            shortcuts: Shortcuts::default(),
            placement: Placement::default(),
        }
    }
}

/// Why a pipeline could not be set up, or gave no result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PipelineError {
    /// Every stage has at least one layer.
    #[error("{stages} stages do not fit a model of {layers} layers")]
    Stages {
        /// What was asked for.
        stages: u32,
        /// What there is.
        layers: u32,
    },
    /// An engine could not be set up.
    #[error("failed to set up stage {stage}")]
    Engine {
        /// Index of the stage.
        stage: u32,
        /// Why.
        source: EngineError,
    },
    /// Somebody wrote to the weights meanwhile.
    #[error("stage {stage} refuses to compute")]
    Weights {
        /// Index of the stage.
        stage: u32,
        /// Why.
        source: EngineError,
    },
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
}

/// All stages of a model.
pub struct Pipeline {
    engines: Vec<Engine>,
}

impl Pipeline {
    /// Maps `store` as `options.stages` stages with `kv_blocks` blocks each, for steps of at most
    /// `max_step_tokens` tokens.
    ///
    /// # Errors
    ///
    /// [`PipelineError::Stages`] and [`PipelineError::Engine`].
    pub fn open(
        store: &Store,
        options: &PipelineOptions,
        kv_blocks: u32,
        max_step_tokens: u32,
    ) -> Result<Self, PipelineError> {
        let PipelineOptions { stages, backend, threads, kv_type, shortcuts, placement } = *options;
        let layers = store.config().layers;
        check_stages(stages, layers)?;
        let config = EngineConfig {
            backend,
            threads,
            kv_type,
            kv_blocks,
            max_step_tokens,
            shortcuts,
            placement,
        };
        let cut = |stage: u32| (u64::from(layers) * u64::from(stage) / u64::from(stages)) as u32;
        let engines = (0..stages).map(|stage| {
            StageModel::open(store, cut(stage)..cut(stage + 1))
                .and_then(|model| Engine::new(model, config))
                .map_err(|source| PipelineError::Engine { stage, source })
        });
        Ok(Self { engines: engines.collect::<Result<_, _>>()? })
    }

    /// One step through all stages: what every row asked for.
    ///
    /// # Errors
    ///
    /// [`PipelineError::Row`] if any row was not computed, [`PipelineError::Weights`] if the weights
    /// are not any more what they were.
    pub fn forward(&mut self, rows: &[Row]) -> Result<Vec<RowValue>, PipelineError> {
        let mut activations = Vec::new();
        let mut values = Vec::new();
        for (stage, engine) in (0..).zip(&mut self.engines) {
            let output = engine
                .forward_verified(rows, &activations)
                .map_err(|source| PipelineError::Weights { stage, source })?;
            let refused = output.rows.iter().zip(rows).find(|(out, _)| out.status != RowStatus::Ok);
            if let Some((outcome, row)) = refused {
                return Err(PipelineError::Row {
                    position: row.position,
                    status: outcome.status,
                    detail: outcome.detail.clone(),
                });
            }
            activations = output.activations;
            values = output.rows.into_iter().map(|outcome| outcome.value).collect();
        }
        Ok(values)
    }
}

/// Refuses a number of stages that `layers` layers cannot be cut into.
///
/// # Errors
///
/// [`PipelineError::Stages`].
pub fn check_stages(stages: u32, layers: u32) -> Result<(), PipelineError> {
    if (1..=layers).contains(&stages) {
        Ok(())
    } else {
        Err(PipelineError::Stages { stages, layers })
    }
}

/// Blocks that `tokens` tokens fill.
pub fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(proto::BLOCK_TOKENS as usize)
}

/// A sequence on its way through a pipeline: makes its rows, one chunk after the other.
#[derive(Clone, Debug)]
pub struct Feed {
    sequence: SequenceId,
    tokens: Vec<u32>,
    blocks: Vec<BlockId>,
    /// Tokens that have been made into rows.
    position: usize,
    /// Of those.
    hash: PrefixHash,
}

impl Feed {
    /// A sequence that has sent nothing yet.
    ///
    /// # Panics
    ///
    /// If the blocks do not hold the tokens: a caller's bug.
    pub fn new(sequence: SequenceId, tokens: Vec<u32>, blocks: Vec<BlockId>) -> Self {
        assert!(blocks.len() >= blocks_for(tokens.len()), "the blocks must hold the tokens");
        Self { sequence, tokens, blocks, position: 0, hash: PrefixHash::EMPTY }
    }

    /// Tokens that are still to be sent.
    pub fn remaining(&self) -> usize {
        self.tokens.len() - self.position
    }

    /// The next at most `count` tokens as a row that wants `output`; `None` at the end.
    pub fn row(&mut self, count: usize, output: Output) -> Option<Row> {
        let tokens = self.tokens[self.position..].iter().copied().take(count).collect::<Vec<_>>();
        if tokens.is_empty() {
            return None;
        }
        let (position, before) = (self.position as u32, self.hash);
        self.position += tokens.len();
        self.hash = before.then_all(&tokens);
        Some(Row {
            sequence: self.sequence,
            generation: Generation(1),
            position,
            tokens,
            prefix_hash_before: before,
            prefix_hash_after: self.hash,
            blocks: self.blocks[..blocks_for(self.position)].to_vec(),
            output,
            status: RowStatus::Ok,
            detail: String::new(),
            traceparent: String::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_chain_and_name_the_blocks_they_need() {
        let tokens: Vec<u32> = (0..40).collect();
        let blocks = vec![BlockId(7), BlockId(3)];
        let mut feed = Feed::new(SequenceId(1), tokens.clone(), blocks.clone());
        let first = feed.row(32, Output::None).unwrap();
        assert_eq!((first.position, first.tokens.len(), feed.remaining()), (0, 32, 8));
        assert_eq!(first.blocks, [BlockId(7)]);
        let second = feed.row(32, Output::Logits).unwrap();
        assert_eq!((second.position, second.tokens.len(), feed.remaining()), (32, 8, 0));
        assert_eq!(second.blocks, blocks);
        assert_eq!(second.prefix_hash_before, first.prefix_hash_after);
        assert_eq!(second.prefix_hash_after, PrefixHash::EMPTY.then_all(&tokens));
        assert!(feed.row(1, Output::None).is_none());
    }

    #[test]
    fn stages_have_at_least_one_layer_each() {
        check_stages(1, 1).unwrap();
        check_stages(6, 6).unwrap();
        assert!(check_stages(0, 6).is_err());
        let error = check_stages(7, 6).unwrap_err().to_string();
        assert_eq!(error, "7 stages do not fit a model of 6 layers");
    }
}
