//! `manifest.json`: what a store holds, and the size and hash of each of its files.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::config::{ConfigError, ModelConfig};
use crate::id::{ModelId, parse_hash};
use crate::layout::{LAYOUT, LAYOUT_VERSION, STORE_FORMAT, TOKENIZER_FILE, shard_files};
use crate::sampling::SamplingDefaults;
use crate::special::{SpecialTexts, TOKEN_TEXT_BYTES_MAX};
use crate::values;

/// Longest manifest: a model of 1024 layers needs under 1 MB, a chat template at most another.
pub const MANIFEST_BYTES_MAX: u64 = 16 << 20;
/// Values and keys of a manifest: a model of 1024 layers has 8,000, and a list of special tokens 4,096.
const VALUES_MAX: usize = 1 << 16;
/// Longest chat template: the longest in use has about 30 KB.
pub const CHAT_TEMPLATE_BYTES_MAX: usize = 1 << 20;

/// A BLAKE3 hash of a file.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileHash(pub [u8; 32]);

impl fmt::Display for FileHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for FileHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FileHash({self})")
    }
}

impl Serialize for FileHash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for FileHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_hash(&text).map(Self).map_err(serde::de::Error::custom)
    }
}

/// One file of a store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Plain name inside the store's directory.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Its hash.
    pub blake3: FileHash,
}

/// The layout of packed tensors that a store was written with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layout {
    /// Name.
    pub name: String,
    /// Version.
    pub version: u32,
}

impl Layout {
    /// The one that this program reads and writes.
    pub fn current() -> Self {
        Self { name: LAYOUT.into(), version: LAYOUT_VERSION }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} version {}", self.name, self.version)
    }
}

/// Where a model came from and what was decided on the way; for people.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// Name of the file or directory that was imported, without its path; or how it was made.
    pub source: String,
    /// Container and weight format, such as `gguf i2_s`.
    pub format: String,
    /// Decisions of the import, one sentence each.
    pub notes: Vec<String>,
}

/// The contents of `manifest.json`.
///
/// A field that is added must be one that is left out where it is absent
/// (`#[serde(default, skip_serializing_if = …)]`): else the digests of older stores are wrong.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the store's format.
    pub format: u32,
    /// Layout of its packed tensors.
    pub layout: Layout,
    /// Hash of the model's logical content.
    pub id: ModelId,
    /// Shapes and constants.
    pub config: ModelConfig,
    /// The tokenizer, if the model has one; else only token ids work.
    pub tokenizer: Option<FileEntry>,
    /// Jinja source that renders a conversation.
    pub chat_template: Option<String>,
    /// Text of the BOS token, for templates.
    pub bos_token_text: Option<String>,
    /// Text of the EOS token, for templates.
    pub eos_token_text: Option<String>,
    /// Texts of other special tokens, those that the template names. Absent where there is none, and in
    /// stores of before there was it.
    #[serde(default, skip_serializing_if = "SpecialTexts::is_empty")]
    pub special_token_texts: SpecialTexts,
    /// What requests get that do not say. Absent in stores of before there was it.
    #[serde(default, skip_serializing_if = "SamplingDefaults::is_empty")]
    pub sampling: SamplingDefaults,
    /// Where the model came from.
    pub provenance: Provenance,
    /// The shards: embedding, head unless tied, norm, screen of the head, layers.
    pub files: Vec<FileEntry>,
    /// Hash of all of the above; absent in stores of before there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<FileHash>,
}

/// Why a manifest cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// Not JSON, or not a manifest.
    #[error("it is not a manifest")]
    Json(#[source] serde_json::Error),
    /// More than any manifest holds.
    #[error("it has more than {VALUES_MAX} values")]
    Values,
    /// Written by another version of this program.
    #[error(
        "the store has format {found}, this program reads {STORE_FORMAT}: import the model again"
    )]
    Format {
        /// Version of the store.
        found: u32,
    },
    /// The packed tensors have another layout.
    #[error(
        "the store has layout {found}, this program reads {}: import the model again",
        Layout::current()
    )]
    Layout {
        /// Layout of the store.
        found: Layout,
    },
    /// The shape is impossible.
    #[error("the model's shape cannot be used")]
    Config(#[source] ConfigError),
    /// The list of files is not that of a model of this shape.
    #[error("file {found} in place of {expected}")]
    Files {
        /// The name that the shape demands there; `none` at the end.
        expected: String,
        /// The name that is there.
        found: String,
    },
    /// Something in it is not what it was when the store was made.
    #[error(
        "its content has hash {found}, it says {expected}: it is damaged or was edited, import the \
         model again"
    )]
    Digest {
        /// The hash of what it holds. Boxed as the other: an error is to be small.
        found: Box<FileHash>,
        /// The hash that it names.
        expected: Box<FileHash>,
    },
    /// A default of sampling is out of range.
    #[error("the default of {field} is {found}, which no request may ask for")]
    Sampling {
        /// The field.
        field: &'static str,
        /// Its value.
        found: f32,
    },
    /// There are more texts of special tokens than there may be, or longer ones.
    #[error("{what} is {found}, at most {most} is accepted")]
    SpecialTexts {
        /// What.
        what: String,
        /// How many or long.
        found: usize,
        /// The limit.
        most: usize,
    },
    /// A template may not know a token by this name.
    #[error(
        "special_token_texts has {found:?}, expected names that templates know nothing else by, with a text each"
    )]
    SpecialName {
        /// The name.
        found: String,
    },
    /// A text is longer than it may be.
    #[error("{field} has {found_bytes} bytes, at most {most_bytes} are accepted")]
    TooLong {
        /// The field.
        field: &'static str,
        /// Its length.
        found_bytes: usize,
        /// The limit.
        most_bytes: usize,
    },
}

/// The part of a manifest that every version has: read first, so that an old store is refused for
/// its age and not for a missing field.
#[derive(Deserialize)]
struct Versions {
    format: u32,
    layout: Layout,
}

impl Manifest {
    /// Reads and checks a manifest.
    ///
    /// # Errors
    ///
    /// [`ManifestError`]; among them one for every older store.
    pub fn parse(json: &[u8]) -> Result<Self, ManifestError> {
        if values::exceed(json, VALUES_MAX) {
            return Err(ManifestError::Values);
        }
        let versions: Versions = serde_json::from_slice(json).map_err(ManifestError::Json)?;
        if versions.format != STORE_FORMAT {
            return Err(ManifestError::Format { found: versions.format });
        }
        if versions.layout != Layout::current() {
            return Err(ManifestError::Layout { found: versions.layout });
        }
        let manifest: Self = serde_json::from_slice(json).map_err(ManifestError::Json)?;
        manifest.config.validate().map_err(ManifestError::Config)?;
        manifest.check_files()?;
        manifest.check_texts()?;
        if let Some((field, found)) = manifest.sampling.wrong() {
            return Err(ManifestError::Sampling { field, found });
        }
        manifest.check_digest()?;
        Ok(manifest)
    }

    /// The same with the digest of what it holds.
    pub fn with_digest(self) -> Self {
        let digest = Some(self.content_digest());
        Self { digest, ..self }
    }

    /// Whether a changed bit anywhere in it would be noticed when it is read.
    pub fn has_digest(&self) -> bool {
        self.digest.is_some()
    }

    fn check_digest(&self) -> Result<(), ManifestError> {
        let Some(expected) = self.digest else { return Ok(()) };
        let found = self.content_digest();
        if found == expected {
            return Ok(());
        }
        Err(ManifestError::Digest { found: found.into(), expected: expected.into() })
    }

    /// BLAKE3 of the manifest without its digest, as JSON without spaces. Reading and writing change no
    /// number: floats are written as the decimals of the same f64.
    fn content_digest(&self) -> FileHash {
        let content = Self { digest: None, ..self.clone() };
        let json = serde_json::to_vec(&content).expect("a manifest is plain data");
        FileHash(blake3::hash(&json).into())
    }

    /// The entry of a shard by its name.
    pub fn file(&self, name: &str) -> Option<&FileEntry> {
        self.files.iter().find(|file| file.name == name)
    }

    /// Bytes of all files but the manifest.
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().chain(&self.tokenizer).map(|file| file.bytes).sum()
    }

    /// File names follow from the shape, so no name of a manifest ever leads out of the directory.
    fn check_files(&self) -> Result<(), ManifestError> {
        let expected = shard_files(&self.config);
        let none = || "none".to_owned();
        for index in 0..expected.len().max(self.files.len()) {
            let expected = expected.get(index).cloned().unwrap_or_else(none);
            let found = self.files.get(index).map_or_else(none, |file| file.name.clone());
            if expected != found {
                return Err(ManifestError::Files { expected, found });
            }
        }
        match &self.tokenizer {
            Some(file) if file.name != TOKENIZER_FILE => Err(ManifestError::Files {
                expected: TOKENIZER_FILE.into(),
                found: file.name.clone(),
            }),
            _ => Ok(()),
        }
    }

    fn check_texts(&self) -> Result<(), ManifestError> {
        let texts = [
            ("the chat template", &self.chat_template, CHAT_TEMPLATE_BYTES_MAX),
            ("the BOS token's text", &self.bos_token_text, TOKEN_TEXT_BYTES_MAX),
            ("the EOS token's text", &self.eos_token_text, TOKEN_TEXT_BYTES_MAX),
        ];
        for (field, text, most_bytes) in texts {
            let found_bytes = text.as_ref().map_or(0, String::len);
            if found_bytes > most_bytes {
                return Err(ManifestError::TooLong { field, found_bytes, most_bytes });
            }
        }
        if let Some((what, found, most)) = self.special_token_texts.wrong() {
            return Err(ManifestError::SpecialTexts { what, found, most });
        }
        match self.special_token_texts.wrong_name() {
            Some(name) => {
                Err(ManifestError::SpecialName { found: name.chars().take(64).collect() })
            }
            None => Ok(()),
        }
    }

    /// Names of all files of a store of this model, the manifest included.
    pub fn file_names(&self) -> BTreeSet<&str> {
        let files = self.files.iter().chain(&self.tokenizer);
        files.map(|file| file.name.as_str()).chain([crate::layout::MANIFEST_FILE]).collect()
    }
}
