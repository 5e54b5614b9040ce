//! Turns a checkpoint of the outside into a store.

use std::path::{Path, PathBuf};

use crate::config::ModelConfig;
use crate::id::ModelId;
use crate::progress::Progress;

/// Choices that only a person can make.
#[derive(Clone, Debug, Default)]
pub struct ImportOptions {
    /// Name of the model in place of the one that the source suggests.
    pub name: Option<String>,
}

/// What was imported, and what was decided on the way.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The model's id.
    pub id: ModelId,
    /// Where the store is.
    pub store: PathBuf,
    /// Shapes and constants.
    pub config: ModelConfig,
    /// Container and weight format, such as `gguf i2_s`.
    pub format: String,
    /// Decisions, one sentence each: scale rule, head, tokenizer, template, what was rounded.
    pub notes: Vec<String>,
}

/// Why a checkpoint was not imported. Nothing was left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {}

/// Reads the model at `source` and writes it to `dest`, which must not exist.
///
/// # Errors
///
/// [`ImportError`]; then `dest` does not exist.
pub fn import(
    _source: &Path,
    _dest: &Path,
    _options: &ImportOptions,
    _progress: &mut dyn FnMut(&Progress<'_>),
) -> Result<Imported, ImportError> {
    unimplemented!("first landing: the interface")
}
