//! What a model is on disk: import, store, shards, memory maps, shapes, ids.
//!
//! ```text
//! Hugging Face directory ─┐                          ┌─▶ LayerShard::weights()  mapped, used in place
//! GGUF file ──────────────┼─ import ─▶ Store (dir) ──┼─▶ EmbeddingShard, HeadShard, NormShard
//! SynthShape ─────────────┘            manifest.json └─▶ ModelConfig, tokenizer, chat template
//! ```
//!
//! Everything that has a fixed answer is decided when a model is imported, so that a worker only
//! maps files. Nothing here computes an activation, opens a socket or awaits.

mod blocks;
pub mod bundled;
pub mod config;
mod file;
pub mod gguf;
pub mod id;
mod identity;
pub mod import;
mod layout;
pub mod manifest;
mod progress;
pub mod safetensors;
mod sampling;
pub mod shard;
mod sigbus;
mod special;
mod staging;
pub mod store;
pub mod synth;
pub mod tokenizer;
mod values;
mod weights;
mod writer;

pub use bundled::{BundledModel, bundled, import_bundled};
pub use config::{Activation, ConfigError, ModelConfig};
pub use file::read_limited;
pub use id::ModelId;
pub use import::{
    I2sLayout, IMPORT_REVISION, ImportError, ImportOptions, Imported, Scales, TextToTry, TriedText,
    TryText, import,
};
pub use manifest::{FileEntry, FileHash, Layout, Manifest, ManifestError, Provenance};
pub use progress::Progress;
pub use sampling::SamplingDefaults;
pub use shard::{
    EmbeddingShard, HeadShard, LayerShard, LayerWeights, NormShard, ScreenShard, ShardError,
};
pub use special::{SpecialText, SpecialTexts};
pub use staging::{WriteError, stop_writing};
pub use store::{Store, StoreError, find_stores};
pub use synth::{SynthError, SynthShape, synth};
pub use tokenizer::{Bpe, TokenizerFile, TokenizerFileError, TokenizerModel};
pub use weights::{FileWatch, WeightFile};
