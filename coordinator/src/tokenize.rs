//! Tokens of a text, for tools that measure a model and need no coordinator.

use std::error::Error;

use model::Store;

use crate::text::{Text, TextSetupError};

/// Why a text has no tokens.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizeError {
    /// The model's tokenizer cannot be used.
    #[error("failed to set up the tokenizer")]
    Setup(#[from] TextSetupError),
    /// The model came without a tokenizer.
    #[error("this model has no tokenizer: only token ids can be used")]
    NoTokenizer,
    /// The tokenizer gave up.
    #[error("failed to tokenize the text")]
    Encode(#[source] Box<dyn Error + Send + Sync>),
}

/// The tokens of `text` as those of a prompt, of any length. It computes: not for an async thread.
///
/// # Errors
///
/// [`TokenizeError`].
pub fn tokenize(store: &Store, text: &str) -> Result<Vec<u32>, TokenizeError> {
    let tools = Text::open(store)?;
    let tokenizer = tools.tokenizer().ok_or(TokenizeError::NoTokenizer)?;
    tokenizer.encode_plain(text).map_err(|error| TokenizeError::Encode(error.into()))
}
