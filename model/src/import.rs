//! Turns a checkpoint of the outside into a store.
//!
//! ```text
//! Hugging Face directory ─ huggingface.rs ─┐
//!                                          ├─▶ Checkpoint: borrowed tensors, config, text ─▶ writer
//! GGUF file ────────────── gguf.rs ────────┘
//! ```
//!
//! What is not supported is refused by name; nothing is guessed in silence. `docs/models.md` lists
//! what imports and what does not.

mod checkpoint;
mod gguf;
mod gguf_tokenizer;
mod huggingface;
mod matrix;
mod source;
mod text;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

pub use crate::blocks::{I2sLayout, ParseI2sLayoutError};
use crate::config::{Activation, ConfigError, ModelConfig};
use crate::file::MappedFile;
use crate::gguf::{Gguf, GgufError};
use crate::id::ModelId;
use crate::manifest::Provenance;
use crate::progress::Progress;
use crate::safetensors::SafetensorsError;
use crate::special::SpecialTexts;
use crate::staging::WriteError;
use crate::tokenizer::TokenizerFileError;
use crate::writer::{Content, write_store};
use checkpoint::Checkpoint;

/// Changes when an import of the same files gives another store: those in a cache are then made
/// anew.
pub const IMPORT_REVISION: u32 = 2;

/// The text of a model that is about to be imported.
#[derive(Clone, Copy, Debug)]
pub struct TextToTry<'a> {
    /// Vocabulary and special tokens.
    pub config: &'a ModelConfig,
    /// `tokenizer.json`.
    pub tokenizer: Option<&'a [u8]>,
    /// Jinja source.
    pub chat_template: Option<&'a str>,
    /// Text of the BOS token, for the template.
    pub bos_text: Option<&'a str>,
    /// Text of the EOS token, for the template.
    pub eos_text: Option<&'a str>,
    /// Texts of other special tokens, for the template.
    pub special: &'a SpecialTexts,
}

/// What came of trying a model's text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TriedText {
    /// Why the chat template cannot be used; the model is then imported without it.
    pub template_refused: Option<String>,
    /// What a person should know, one sentence each.
    pub notes: Vec<String>,
}

/// Tries a model's text as serving it will; an error refuses the import. Serving is not this
/// crate's business, so whoever imports says how.
pub type TryText = fn(TextToTry<'_>) -> Result<TriedText, Box<dyn std::error::Error + Send + Sync>>;

/// Choices that only a person can make, and what is tried before anything is written.
#[derive(Clone, Debug, Default)]
pub struct ImportOptions {
    /// Name of the model in place of the one that the source suggests.
    pub name: Option<String>,
    /// Layout of I2_S tensors in place of [`I2sLayout::default`]. Refused if there are none.
    pub i2s_layout: Option<I2sLayout>,
    /// Activation in place of the one that the source states, or leaves to its family.
    pub activation: Option<Activation>,
    /// What the scales of a model of the family of BitNet b1.58 2B4T are; without it, those that look
    /// inverted are refused or warned of.
    pub scales: Option<Scales>,
    /// Tries the model's text before the store is written.
    pub try_text: Option<TryText>,
}

/// What the scales of a source are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scales {
    /// What they should be.
    Stored,
    /// The inverses of that.
    Inverted,
}

impl fmt::Display for Scales {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stored => "stored",
            Self::Inverted => "inverted",
        })
    }
}

/// A text names no kind of scales.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("scales {0:?} are neither stored nor inverted")]
pub struct ParseScalesError(String);

impl FromStr for Scales {
    type Err = ParseScalesError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let all = [Self::Stored, Self::Inverted];
        let found = all.into_iter().find(|scales| scales.to_string() == text);
        found.ok_or_else(|| ParseScalesError(text.into()))
    }
}

/// Vocabulary of Llama 3, and so of BitNet b1.58 2B4T.
const LLAMA3_VOCAB: u32 = 128_256;

/// Refuses a model whose family is SiLU's and whose vocabulary that of BitNet b1.58 2B4T, which is
/// squared ReLU's.
fn unstated_activation(key: &str) -> ImportError {
    ImportError::Unsupported(format!(
        "{key} is not given: {LLAMA3_VOCAB} tokens are those of BitNet b1.58 2B4T, which computes \
         relu2, but silu is usual for this architecture; say --activation relu2 (or silu)"
    ))
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
    /// Container and weight format, such as `gguf I2_S`.
    pub format: String,
    /// Decisions, one sentence each: scale rule, head, tokenizer, template, what was rounded.
    pub notes: Vec<String>,
}

/// Why a checkpoint was not imported. Nothing was left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The operating system refused a file of the source.
    #[error("failed to read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The source is nothing that holds a model.
    #[error("{} is neither a GGUF file nor a directory with a config.json: {hint}", path.display())]
    Unrecognised {
        /// The source.
        path: PathBuf,
        /// What to do.
        hint: String,
    },
    /// A safetensors file is bad.
    #[error("failed to use {}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: SafetensorsError,
    },
    /// A GGUF file is bad.
    #[error("failed to use the GGUF file")]
    Gguf(#[from] GgufError),
    /// A JSON file is bad.
    #[error("failed to use {}{}", path.display(), of_key(key))]
    Json {
        /// The file.
        path: PathBuf,
        /// The key that holds it, with those around it; empty if the file as a whole is meant.
        key: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A file of the source names a file it may not name.
    #[error("{} names the file {name:?}, expected a plain name ending in .safetensors", path.display())]
    FileName {
        /// The file that names it.
        path: PathBuf,
        /// The name.
        name: String,
    },
    /// A required key is absent.
    #[error("{file} has no {key}")]
    MissingKey {
        /// The file, or `metadata`.
        file: &'static str,
        /// The key.
        key: String,
    },
    /// A key has a value that cannot be used.
    #[error("{key} is {found}, expected {expected}")]
    Value {
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What was expected.
        expected: String,
    },
    /// A feature that is not there.
    #[error("{0}")]
    Unsupported(String),
    /// The shape is impossible.
    #[error("the model's shape cannot be used")]
    Config(#[from] ConfigError),
    /// A tensor is absent.
    #[error("tensor {tensor} is missing")]
    MissingTensor {
        /// Its name.
        tensor: String,
    },
    /// A tensor that the model should not have: an ignored norm or bias silently spoils output.
    #[error("tensor {tensor} is unknown{hint}")]
    UnknownTensor {
        /// Its name.
        tensor: String,
        /// What it probably is; empty or begins with a colon.
        hint: &'static str,
    },
    /// The same tensor is in two files.
    #[error("tensor {tensor} is in two files")]
    DuplicateTensor {
        /// Its name.
        tensor: String,
    },
    /// A tensor has another type or shape than the model demands.
    #[error("tensor {tensor} is {found}, expected {expected}")]
    Tensor {
        /// Its name.
        tensor: String,
        /// Its type and shape.
        found: String,
        /// What was expected.
        expected: String,
    },
    /// A matrix holds a code that is no trit.
    #[error(
        "tensor {tensor} holds the invalid code 3 in row {row}: it is corrupt or has another layout"
    )]
    InvalidCode {
        /// Its name.
        tensor: String,
        /// The row.
        row: usize,
    },
    /// A matrix has no usable scale.
    #[error(
        "tensor {tensor} has the scale {found}, expected a positive number up to {}",
        matrix::SCALE_MAX
    )]
    Scale {
        /// Its name.
        tensor: String,
        /// Its scale.
        found: f32,
    },
    /// A layout was chosen for tensors that are not there.
    #[error("the model has no I2_S tensors: no layout can be chosen for them")]
    NoI2s,
    /// The blocks of a matrix have different scales.
    #[error(
        "tensor {tensor} of type {type_name} has blocks of different scales, only one scale per tensor is supported"
    )]
    BlockScales {
        /// Its name.
        tensor: String,
        /// Its type.
        type_name: &'static str,
    },
    /// A matrix of floats is not ternary.
    #[error("tensor {tensor} is not ternary: {detail}")]
    NotTernary {
        /// Its name.
        tensor: String,
        /// Why not.
        detail: String,
    },
    /// A matrix is all zero, or never zero.
    #[error(
        "tensor {tensor} has {zeros} zeros among {trits} weights: this is not a trained ternary matrix"
    )]
    Zeros {
        /// Its name.
        tensor: String,
        /// Zeros.
        zeros: u64,
        /// Weights.
        trits: u64,
    },
    /// A float is an infinity or not a number.
    #[error("tensor {tensor} holds a number that is not finite")]
    NotFinite {
        /// Its name.
        tensor: String,
    },
    /// The tokenizer cannot be used.
    #[error("the tokenizer cannot be used: {0}")]
    Tokenizer(String),
    /// `tokenizer.json` cannot be used.
    #[error("the tokenizer cannot be used")]
    TokenizerFile(#[source] TokenizerFileError),
    /// The text was tried, and could not be served.
    #[error("the model's text cannot be served")]
    Text(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The store could not be written.
    #[error("failed to write the store")]
    Write(#[from] WriteError),
}

/// Reads the model at `source` and writes it to `dest`, which must not exist.
///
/// `source` is a Hugging Face directory, a GGUF file, or a directory with exactly one GGUF file.
///
/// # Errors
///
/// [`ImportError`]; then `dest` does not exist.
pub fn import(
    source: &Path,
    dest: &Path,
    options: &ImportOptions,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> Result<Imported, ImportError> {
    match source::find_gguf(source)? {
        Some(path) => {
            let file = map(&path)?;
            file.advise_sequential();
            let mut checkpoint = gguf::read(&Gguf::parse(file.bytes())?, &name_of(&path), options)?;
            write(&mut checkpoint, dest, options, progress)
        }
        None if options.i2s_layout.is_some() => Err(ImportError::NoI2s),
        None => {
            let directory = huggingface::Directory::open(source)?;
            write(&mut directory.read(options)?, dest, options, progress)
        }
    }
}

/// Imports the bytes of a GGUF file as far as that goes without writing: every table, every
/// tensor, every row. For fuzzing and tests.
///
/// # Errors
///
/// [`ImportError`] as [`import`] would give it.
pub fn check_gguf(bytes: &[u8]) -> Result<ModelConfig, ImportError> {
    gguf::read(&Gguf::parse(bytes)?, "checked", &ImportOptions::default())?.check()
}

/// Imports a Hugging Face model of one file, given its `config.json` and `model.safetensors`, as
/// far as that goes without writing. For fuzzing and tests.
///
/// # Errors
///
/// [`ImportError`] as [`import`] would give it.
pub fn check_safetensors(config: &[u8], file: &[u8]) -> Result<ModelConfig, ImportError> {
    huggingface::check(config, file)
}

fn write(
    checkpoint: &mut Checkpoint<'_>,
    dest: &Path,
    options: &ImportOptions,
    progress: &mut dyn FnMut(&Progress<'_>),
) -> Result<Imported, ImportError> {
    if let Some(name) = &options.name {
        checkpoint.config.name.clone_from(name);
    }
    if let Some(try_text) = options.try_text {
        tried(checkpoint, try_text)?;
    }
    let id = write_store(checkpoint, dest, progress)?;
    let Provenance { format, notes, .. } = checkpoint.provenance();
    let (store, config) = (dest.to_owned(), checkpoint.config.clone());
    Ok(Imported { id, store, config, format, notes })
}

/// How a message names the key that is meant.
fn of_key(key: &str) -> String {
    if key.is_empty() { String::new() } else { format!(": {key}") }
}

/// Tries the text; a chat template that cannot be used is left out.
fn tried(checkpoint: &mut Checkpoint<'_>, try_text: TryText) -> Result<(), ImportError> {
    let text = &checkpoint.text;
    let tried = try_text(TextToTry {
        config: &checkpoint.config,
        tokenizer: text.tokenizer.as_deref(),
        chat_template: text.chat_template.as_deref(),
        bos_text: text.bos_text.as_deref(),
        eos_text: text.eos_text.as_deref(),
        special: &text.special,
    });
    let tried = tried.map_err(ImportError::Text)?;
    checkpoint.notes.extend(tried.notes);
    if let Some(reason) = tried.template_refused {
        checkpoint.notes.push(format!("chat template: left out, for it cannot be used: {reason}"));
        checkpoint.text.chat_template = None;
        checkpoint.text.special = SpecialTexts::default();
    }
    Ok(())
}

fn map(path: &Path) -> Result<MappedFile, ImportError> {
    MappedFile::open(path).map_err(|source| ImportError::Read { path: path.to_owned(), source })
}

/// The last part of a path, for people.
fn name_of(path: &Path) -> String {
    let canonical = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    canonical.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}
