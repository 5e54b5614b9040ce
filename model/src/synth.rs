//! Random models of exact shapes, for benchmarks and tests.

use std::path::Path;
use std::str::FromStr;

use crate::id::ModelId;
use crate::import::ImportError;
use crate::progress::Progress;

/// The shape of a random model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SynthShape {
    /// Layers.
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Inner width of the feed-forward block.
    pub ffn: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Vocabulary.
    pub vocab: u32,
}

/// A text names no shape.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("shape {0:?} is neither 2b4t, 700m, 8b, tiny nor LxDxFxHxKVxV")]
pub struct ParseShapeError(String);

impl FromStr for SynthShape {
    type Err = ParseShapeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Err(ParseShapeError(text.into()))
    }
}

/// Writes a random model to `dest`, which must not exist.
///
/// # Errors
///
/// [`ImportError`]; then `dest` does not exist.
pub fn synth(
    _shape: &SynthShape,
    _seed: u64,
    _dest: &Path,
    _progress: &mut dyn FnMut(&Progress<'_>),
) -> Result<ModelId, ImportError> {
    unimplemented!("first landing: the interface")
}
