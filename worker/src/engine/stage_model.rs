//! The weights of one stage, mapped. No arithmetic.

use std::ops::Range;

use kernels::{FloatMatrix, ScreenMatrix};
use model::{
    EmbeddingShard, HeadShard, LayerShard, LayerWeights, ModelConfig, NormShard, ScreenShard, Store,
};

use super::EngineError;

/// Contiguous layers of a model; the first stage also has the embedding, the last norm and head.
pub struct StageModel {
    config: ModelConfig,
    layers: Range<u32>,
    shards: Vec<LayerShard>,
    embedding: Option<EmbeddingShard>,
    end: Option<(NormShard, HeadShard)>,
    screen: Option<ScreenShard>,
    weight_bytes: u64,
}

impl StageModel {
    /// Maps the shards of `layers` and what belongs to them.
    ///
    /// # Errors
    ///
    /// [`EngineError::Layers`] if the range is empty or not the model's, [`EngineError::Store`] if
    /// a shard cannot be used.
    pub fn open(store: &Store, layers: Range<u32>) -> Result<Self, EngineError> {
        let config = store.config().clone();
        if layers.is_empty() || layers.end > config.layers {
            return Err(EngineError::Layers { layers, model_layers: config.layers });
        }
        let is_first = layers.start == 0;
        let is_last = layers.end == config.layers;
        let shards = layers.clone().map(|layer| store.layer(layer)).collect::<Result<_, _>>()?;
        let embedding = is_first.then(|| store.embedding()).transpose()?;
        let end = if is_last { Some((store.final_norm()?, store.head()?)) } else { None };
        let screen = if is_last { store.screen()? } else { None };
        let mut weight_bytes =
            store.layer_bytes().saturating_mul(u64::from(layers.end - layers.start));
        if is_first {
            weight_bytes += store.embedding_bytes();
        }
        // A tied head is the embedding's file: mapped twice, in memory once.
        if is_last && !(is_first && config.tied_head) {
            weight_bytes += store.head_bytes();
        }
        if is_last {
            weight_bytes += store.screen_bytes();
        }
        Ok(Self { config, layers, shards, embedding, end, screen, weight_bytes })
    }

    /// The whole model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Which layers, half-open.
    pub fn layers(&self) -> Range<u32> {
        self.layers.clone()
    }

    /// How many layers.
    pub fn layer_count(&self) -> u32 {
        self.layers.end - self.layers.start
    }

    /// Whether the embedding is here.
    pub fn is_first(&self) -> bool {
        self.embedding.is_some()
    }

    /// Whether norm and head are here.
    pub fn is_last(&self) -> bool {
        self.end.is_some()
    }

    /// Bytes of the mapped weights, a tied head counted once.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// The weights of each layer, in order.
    pub(super) fn layer_weights(&self) -> impl Iterator<Item = LayerWeights<'_>> {
        self.shards.iter().map(LayerShard::weights)
    }

    /// The embedding, on the first stage.
    pub(super) fn embedding(&self) -> Option<FloatMatrix<'_>> {
        self.embedding.as_ref().map(EmbeddingShard::matrix)
    }

    /// Weight of the final norm, and the head, on the last stage.
    pub(super) fn end(&self) -> Option<(&[f32], FloatMatrix<'_>)> {
        self.end.as_ref().map(|(norm, head)| (norm.weight(), head.matrix()))
    }

    /// The screen of the head, on the last stage, if the model has one.
    pub(super) fn screen(&self) -> Option<ScreenMatrix<'_>> {
        self.screen.as_ref().map(ScreenShard::matrix)
    }
}
