//! The weights of one stage, mapped and verified. No arithmetic.

use std::io;
use std::ops::Range;

use kernels::{FloatMatrix, ScreenMatrix};
use model::{
    EmbeddingShard, HeadShard, LayerShard, LayerWeights, ModelConfig, NormShard, ScreenShard,
    Store, StoreError, WeightFile,
};

use super::EngineError;

/// Contiguous layers of a model; the first stage also has the embedding, the last norm and head. The
/// first may have those too, to draw for the last.
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
    /// Maps the shards of `layers` and what belongs to them, and compares each with the manifest.
    ///
    /// # Errors
    ///
    /// [`EngineError::Layers`] if the range is empty or not the model's, [`EngineError::Store`] if
    /// a shard cannot be used.
    pub fn open(store: &Store, layers: Range<u32>) -> Result<Self, EngineError> {
        let has_head = layers.end == store.config().layers;
        Self::open_with(store, layers, has_head)
    }

    /// [`Self::open`] for a stage that is not the last and has norm and head all the same: to draw
    /// from residual streams that come back to it.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub fn open_to_draw(store: &Store, layers: Range<u32>) -> Result<Self, EngineError> {
        Self::open_with(store, layers, true)
    }

    fn open_with(store: &Store, layers: Range<u32>, has_head: bool) -> Result<Self, EngineError> {
        let config = store.config().clone();
        if layers.is_empty() || layers.end > config.layers {
            return Err(EngineError::Layers { layers, model_layers: config.layers });
        }
        let is_first = layers.start == 0;
        let shards = layers.clone().map(|layer| store.layer(layer)).collect::<Result<_, _>>()?;
        let embedding = is_first.then(|| store.embedding()).transpose()?;
        let end = match has_head {
            true => Some((store.final_norm()?, head_of(store, embedding.as_ref())?)),
            false => None,
        };
        let screen = if has_head { store.screen()? } else { None };
        let weight_bytes = stage_weight_bytes(store, &layers, has_head);
        Ok(Self { config, layers, shards, embedding, end, screen, weight_bytes })
    }

    /// The same weights in memory of this process alone, written by the calling thread.
    ///
    /// # Errors
    ///
    /// If there is not so much memory.
    pub(super) fn copied(&self) -> io::Result<Self> {
        let embedding = self.embedding.as_ref().map(EmbeddingShard::copied).transpose()?;
        let end = match (&self.end, &embedding) {
            (None, _) => None,
            (Some((norm, _)), Some(embedding)) if self.config.tied_head => {
                Some((norm.copied()?, embedding.as_head()))
            }
            (Some((norm, head)), _) => Some((norm.copied()?, head.copied()?)),
        };
        Ok(Self {
            config: self.config.clone(),
            layers: self.layers.clone(),
            shards: self.shards.iter().map(LayerShard::copied).collect::<Result<_, _>>()?,
            embedding,
            end,
            screen: self.screen.as_ref().map(ScreenShard::copied).transpose()?,
            weight_bytes: self.weight_bytes,
        })
    }

    /// Reads the weights that every step reads into memory now, if they are not there. Of an embedding a
    /// step reads some rows: it is left to be read when they are wanted. `read` hears of every file how many
    /// bytes it has.
    pub(crate) fn populate(&self, mut read: impl FnMut(u64)) {
        let mut is_read = |file: &WeightFile| read(file.bytes().len() as u64);
        for shard in &self.shards {
            shard.populate();
            is_read(shard.file());
        }
        if let Some(screen) = &self.screen {
            screen.populate();
            is_read(screen.file());
        }
        if let Some((_, head)) = &self.end {
            head.populate();
            is_read(head.file());
        }
    }

    /// Keeps all weights in memory, whatever else wants it.
    ///
    /// # Errors
    ///
    /// If the system does not let this process lock so much.
    pub(super) fn lock(&self) -> io::Result<()> {
        self.shards.iter().try_for_each(LayerShard::lock)?;
        self.embedding.iter().try_for_each(EmbeddingShard::lock)?;
        self.screen.iter().try_for_each(ScreenShard::lock)?;
        self.end.iter().try_for_each(|(norm, head)| norm.lock().and_then(|()| head.lock()))
    }

    /// The files whose bytes these weights are.
    pub(super) fn files(&self) -> impl Iterator<Item = &WeightFile> {
        let shares = self.is_first() && self.config.tied_head;
        let end = self.end.iter();
        let end = end.flat_map(move |(norm, head)| {
            [Some(norm.file()), (!shares).then(|| head.file())].into_iter().flatten()
        });
        let layers = self.shards.iter().map(LayerShard::file);
        let embedding = self.embedding.iter().map(EmbeddingShard::file);
        layers.chain(embedding).chain(end).chain(self.screen.iter().map(ScreenShard::file))
    }

    /// Whether nobody wrote to any of them since they were verified.
    pub(super) fn is_unchanged(&self) -> bool {
        self.files().all(WeightFile::is_unchanged)
    }

    /// Verifies those once more that somebody wrote to.
    ///
    /// # Errors
    ///
    /// The first that is not what it was.
    pub(super) fn verify_changed(&self) -> Result<(), StoreError> {
        self.files().filter(|file| !file.is_unchanged()).try_for_each(WeightFile::verify)
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

    /// Whether the model's last layer is here, and so norm and head.
    pub fn is_last(&self) -> bool {
        self.layers.end == self.config.layers
    }

    /// Whether norm and head are here.
    pub fn has_head(&self) -> bool {
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

    /// Weight of the final norm, and the head, where they are here.
    pub(super) fn end(&self) -> Option<(&[f32], FloatMatrix<'_>)> {
        self.end.as_ref().map(|(norm, head)| (norm.weight(), head.matrix()))
    }

    /// The screen of the head, where that is here and the model has one.
    pub(super) fn screen(&self) -> Option<ScreenMatrix<'_>> {
        self.screen.as_ref().map(ScreenShard::matrix)
    }
}

/// Bytes of the weights of a stage, a tied head counted once.
pub(crate) fn stage_weight_bytes(store: &Store, layers: &Range<u32>, has_head: bool) -> u64 {
    let layer_count = u64::from(layers.end.saturating_sub(layers.start));
    let is_first = layers.start == 0;
    let embedding = if is_first { store.embedding_bytes() } else { 0 };
    let (head, screen) = match has_head {
        // A tied head is the embedding's matrix, in memory once.
        true if is_first && store.config().tied_head => (0, store.screen_bytes()),
        true => (store.head_bytes(), store.screen_bytes()),
        false => (0, 0),
    };
    let layers = store.layer_bytes().saturating_mul(layer_count);
    layers.saturating_add(embedding).saturating_add(head).saturating_add(screen)
}

/// The head; of a tied model whose embedding is here, in the same memory.
fn head_of(store: &Store, embedding: Option<&EmbeddingShard>) -> Result<HeadShard, EngineError> {
    match embedding {
        Some(embedding) if store.config().tied_head => Ok(embedding.as_head()),
        _ => Ok(store.head()?),
    }
}
