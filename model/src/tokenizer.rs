//! `tokenizer.json`: read under limits and checked whole, at import and again when a store is
//! served. What it makes of a text is computed elsewhere; here is decided that it can be, in
//! bounded memory and time.
//!
//! ```text
//! json ─ sections, none copied ─┬─ model: vocabulary, merges ──────────────┐
//!                               ├─ added tokens                            ├─▶ TokenizerFile
//!                               └─ normalizer … post-processor (parts.rs) ─┘
//! ```

mod parts;
mod vocabulary;

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

pub use parts::Wrapped;
use vocabulary::{Merges, Vocabulary};

/// Longest text of a token: a run of blanks of 128 bytes is the longest in common use, and some
/// vocabularies hold lines of a few hundred.
pub const TOKEN_BYTES_MAX: usize = 1024;
/// Longest piece of a unigram vocabulary: every prefix of every place in a text is looked up.
/// SentencePiece makes none longer than 16 characters.
pub const UNIGRAM_PIECE_BYTES_MAX: usize = 128;
/// Merges for each word of a vocabulary. Those made from SentencePiece's scores have up to 2.3.
pub const MERGES_PER_TOKEN_MAX: usize = 8;
/// Longest `continuing_subword_prefix` and `end_of_word_suffix`: each letter may be looked up with
/// one. Those in use have four.
const AFFIX_BYTES_MAX: usize = 16;
/// Longest normalizer, pre-tokenizer, decoder or post-processor, as JSON: the longest in use has
/// 10 KB.
const SECTION_BYTES_MAX: usize = 256 << 10;

/// Why a `tokenizer.json` cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerFileError {
    /// It is not JSON of the expected form.
    #[error("tokenizer.json is not a tokenizer")]
    Json(#[from] serde_json::Error),
    /// A part is of a type that is unknown or not supported.
    #[error("tokenizer.json has the {part} {found:?}, expected {expected}")]
    Type {
        /// Which part.
        part: &'static str,
        /// Its type.
        found: String,
        /// The types that are supported.
        expected: String,
    },
    /// Something is longer or more than is accepted.
    #[error("tokenizer.json: {what} is {found}, at most {most} is accepted")]
    Limit {
        /// What.
        what: String,
        /// How long or many.
        found: u64,
        /// The limit.
        most: u64,
    },
    /// Two things in it contradict each other, or one makes no sense.
    #[error("tokenizer.json: {0}")]
    Wrong(String),
}

impl TokenizerFileError {
    fn limit(what: impl Into<String>, found: usize, most: usize) -> Self {
        Self::Limit { what: what.into(), found: found as u64, most: most as u64 }
    }
}

/// A token beside the vocabulary proper.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct AddedToken {
    /// Its id, as the file has it.
    pub id: u32,
    /// Its text.
    pub content: String,
    /// Only found as a whole word.
    #[serde(default)]
    pub single_word: bool,
    /// Swallows blanks before it.
    #[serde(default)]
    pub lstrip: bool,
    /// Swallows blanks after it.
    #[serde(default)]
    pub rstrip: bool,
    /// Looked for in the normalized text.
    #[serde(default)]
    pub normalized: bool,
    /// Controls; never text.
    #[serde(default)]
    pub special: bool,
}

/// How words become tokens.
#[derive(Debug)]
pub enum TokenizerModel {
    /// Byte pairs, merged by rank.
    Bpe(Bpe),
    /// The most probable pieces.
    Unigram {
        /// Text and score; the id is the index.
        vocab: Vec<(String, f64)>,
        /// The piece that stands for what is unknown.
        unk_id: Option<usize>,
        /// Whether bytes stand for what is unknown.
        byte_fallback: bool,
    },
    /// Whole words.
    WordLevel {
        /// Text and id.
        vocab: Vec<(String, u32)>,
        /// The word that stands for what is unknown.
        unk_token: String,
    },
}

/// A byte-pair model. Its `dropout`, which training wants and serving must not have, is left out.
#[derive(Debug)]
pub struct Bpe {
    /// Text and id.
    pub vocab: Vec<(String, u32)>,
    /// Pairs, best first. Both sides and what they make are words of the vocabulary.
    pub merges: Vec<(String, String)>,
    /// Stands for what is unknown.
    pub unk_token: Option<String>,
    /// Stands before every letter but a word's first.
    pub continuing_subword_prefix: Option<String>,
    /// Stands after a word's last letter.
    pub end_of_word_suffix: Option<String>,
    /// Whether unknown letters in a row are one.
    pub fuse_unk: bool,
    /// Whether bytes stand for what is unknown.
    pub byte_fallback: bool,
    /// Whether a word of the vocabulary is taken without looking at merges.
    pub ignore_merges: bool,
}

/// A checked `tokenizer.json`.
#[derive(Debug)]
pub struct TokenizerFile {
    /// How words become tokens.
    pub model: TokenizerModel,
    /// Tokens beside the vocabulary.
    pub added_tokens: Vec<AddedToken>,
    /// What is done to a text first; null: nothing.
    pub normalizer: Value,
    /// How it is split into words; null: not at all.
    pub pre_tokenizer: Value,
    /// How tokens become text.
    pub decoder: Value,
    /// What its post-processor puts around a text.
    pub wrapped: Wrapped,
    /// Bytes that normalizer and pre-tokenizer make of one byte, at most.
    pub expansion: u32,
    /// What was left out, one sentence each.
    pub notes: Vec<String>,
}

/// The sections of the file, unread.
#[derive(Deserialize)]
struct Sections<'a> {
    version: Option<String>,
    #[serde(borrow)]
    truncation: Option<&'a RawValue>,
    #[serde(borrow)]
    padding: Option<&'a RawValue>,
    #[serde(borrow)]
    added_tokens: Option<&'a RawValue>,
    #[serde(borrow)]
    normalizer: Option<&'a RawValue>,
    #[serde(borrow)]
    pre_tokenizer: Option<&'a RawValue>,
    #[serde(borrow)]
    post_processor: Option<&'a RawValue>,
    #[serde(borrow)]
    decoder: Option<&'a RawValue>,
    #[serde(borrow)]
    model: &'a RawValue,
}

/// The fields of every kind of model; what else stands there is ignored, as the library does.
#[derive(Deserialize)]
struct ModelFields<'a> {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(borrow)]
    vocab: &'a RawValue,
    #[serde(borrow)]
    merges: Option<&'a RawValue>,
    dropout: Option<f64>,
    unk_token: Option<String>,
    unk_id: Option<usize>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    fuse_unk: Option<bool>,
    byte_fallback: Option<bool>,
    ignore_merges: Option<bool>,
}

impl TokenizerFile {
    /// Reads and checks a `tokenizer.json` for a model of `vocab` tokens. Nothing is allocated that
    /// such a model does not need.
    ///
    /// # Errors
    ///
    /// [`TokenizerFileError`]: the first thing that is wrong.
    pub fn parse(json: &[u8], vocab: u32) -> Result<Self, TokenizerFileError> {
        let sections: Sections<'_> = serde_json::from_slice(json)?;
        if let Some(version) = sections.version.filter(|version| version != "1.0") {
            return Err(TokenizerFileError::Type {
                part: "version",
                found: shown(&version),
                expected: "1.0".into(),
            });
        }
        let mut notes = Vec::new();
        for (name, section) in [("truncation", sections.truncation), ("padding", sections.padding)]
        {
            if section.is_some() {
                notes.push(format!("tokenizer: its {name} of texts is switched off"));
            }
        }
        let model = read_model(sections.model, vocab, &mut notes)?;
        let added_tokens = read_added_tokens(sections.added_tokens, vocab)?;
        let normalizer = section("normalizer", sections.normalizer)?;
        let pre_tokenizer = section("pre-tokenizer", sections.pre_tokenizer)?;
        let decoder = section("decoder", sections.decoder)?;
        let expansion = parts::expansion(&normalizer, &pre_tokenizer)?;
        parts::check_decoder(&decoder)?;
        let post_processor = section("post-processor", sections.post_processor)?;
        let wrapped = parts::wrapped(&post_processor)?;
        let file = Self {
            model,
            added_tokens,
            normalizer,
            pre_tokenizer,
            decoder,
            wrapped,
            expansion,
            notes,
        };
        file.check_ids(vocab)?;
        Ok(file)
    }

    /// The highest id, the added tokens' included; none without any token.
    pub fn highest_id(&self) -> Option<u32> {
        let added = self.added_tokens.iter().map(|token| token.id);
        match &self.model {
            TokenizerModel::Bpe(Bpe { vocab, .. }) | TokenizerModel::WordLevel { vocab, .. } => {
                vocab.iter().map(|(_, id)| *id).chain(added).max()
            }
            TokenizerModel::Unigram { vocab, .. } => {
                let last = u32::try_from(vocab.len()).unwrap_or(u32::MAX).checked_sub(1);
                last.into_iter().chain(added).max()
            }
        }
    }

    /// The id of a token by its text; the added ones go first.
    pub fn id_of(&self, text: &str) -> Option<u32> {
        let added = self.added_tokens.iter().find(|token| token.content == text);
        added.map(|token| token.id).or_else(|| match &self.model {
            TokenizerModel::Bpe(Bpe { vocab, .. }) | TokenizerModel::WordLevel { vocab, .. } => {
                vocab.iter().find(|(word, _)| word == text).map(|(_, id)| *id)
            }
            TokenizerModel::Unigram { vocab, .. } => {
                vocab.iter().position(|(word, _)| word == text).map(|id| id as u32)
            }
        })
    }

    /// The words of the vocabulary proper with their ids.
    pub fn words(&self) -> Box<dyn Iterator<Item = (&str, u32)> + '_> {
        match &self.model {
            TokenizerModel::Bpe(Bpe { vocab, .. }) | TokenizerModel::WordLevel { vocab, .. } => {
                Box::new(vocab.iter().map(|(word, id)| (&**word, *id)))
            }
            TokenizerModel::Unigram { vocab, .. } => {
                Box::new((0..).zip(vocab).map(|(id, (word, _))| (&**word, id)))
            }
        }
    }

    /// The text of an added token by its id.
    pub fn added_text(&self, id: u32) -> Option<&str> {
        self.added_tokens.iter().find(|token| token.id == id).map(|token| token.content.as_str())
    }

    fn check_ids(&self, vocab: u32) -> Result<(), TokenizerFileError> {
        let Some(highest) = self.highest_id() else {
            return Err(TokenizerFileError::Wrong("it has no token".into()));
        };
        if highest >= vocab {
            return Err(TokenizerFileError::Wrong(format!(
                "it has token {highest}, the model's vocabulary ends before {vocab}"
            )));
        }
        if let TokenizerModel::Bpe(Bpe { vocab, .. }) | TokenizerModel::WordLevel { vocab, .. } =
            &self.model
        {
            let mut seen = HashSet::with_capacity(vocab.len());
            if let Some((text, id)) = vocab.iter().find(|(_, id)| !seen.insert(*id)) {
                let text = shown(text);
                return Err(TokenizerFileError::Wrong(format!(
                    "two texts have the id {id}, one is {text:?}"
                )));
            }
        }
        Ok(())
    }
}

fn section(part: &'static str, raw: Option<&RawValue>) -> Result<Value, TokenizerFileError> {
    let Some(raw) = raw else { return Ok(Value::Null) };
    let bytes = raw.get().len();
    if bytes > SECTION_BYTES_MAX {
        let what = format!("the length of the {part} in bytes");
        return Err(TokenizerFileError::limit(what, bytes, SECTION_BYTES_MAX));
    }
    Ok(serde_json::from_str(raw.get())?)
}

fn read_added_tokens(
    raw: Option<&RawValue>,
    vocab: u32,
) -> Result<Vec<AddedToken>, TokenizerFileError> {
    let Some(raw) = raw else { return Ok(Vec::new()) };
    let tokens: Vec<AddedToken> = vocabulary::list(raw, vocab as usize, "added tokens")?;
    for token in &tokens {
        if token.content.len() > TOKEN_BYTES_MAX {
            let what = format!("the length of added token {} in bytes", token.id);
            return Err(TokenizerFileError::limit(what, token.content.len(), TOKEN_BYTES_MAX));
        }
        // For each place where one stands in a text, the library reads the whole text before it.
        if !token.special && (token.lstrip || token.single_word) {
            return Err(TokenizerFileError::Wrong(format!(
                "the added token {:?} is not special, yet has lstrip or single_word, which is not \
                 supported",
                shown(&token.content)
            )));
        }
    }
    Ok(tokens)
}

fn read_model(
    raw: &RawValue,
    vocab: u32,
    notes: &mut Vec<String>,
) -> Result<TokenizerModel, TokenizerFileError> {
    let fields: ModelFields<'_> = serde_json::from_str(raw.get())?;
    // Old files do not name the type: their fields tell it.
    let by_fields = match fields.merges {
        Some(_) => "BPE",
        None if fields.vocab.get().starts_with('[') => "Unigram",
        None => "WordLevel",
    };
    let kind = fields.kind.as_deref().unwrap_or(by_fields);
    let most = vocab as usize;
    match kind {
        "BPE" => {
            if fields.dropout.is_some_and(|dropout| dropout != 0.0) {
                notes.push("tokenizer: its dropout, a setting of training, is switched off".into());
            }
            let vocab = Vocabulary::ids(fields.vocab, most)?;
            let merges = fields.merges.ok_or_else(|| {
                TokenizerFileError::Wrong("its model is BPE and has no merges".into())
            })?;
            let merges_most = vocab.len().saturating_mul(MERGES_PER_TOKEN_MAX);
            let merges = Merges::read(merges, merges_most)?;
            let bpe = Bpe {
                vocab,
                merges,
                unk_token: fields.unk_token,
                continuing_subword_prefix: not_empty(fields.continuing_subword_prefix),
                end_of_word_suffix: not_empty(fields.end_of_word_suffix),
                fuse_unk: fields.fuse_unk.unwrap_or(false),
                byte_fallback: fields.byte_fallback.unwrap_or(false),
                ignore_merges: fields.ignore_merges.unwrap_or(false),
            };
            check_bpe(&bpe)?;
            Ok(TokenizerModel::Bpe(bpe))
        }
        "Unigram" => {
            let vocab = Vocabulary::scores(fields.vocab, most)?;
            if let Some(id) = fields.unk_id.filter(|id| *id >= vocab.len()) {
                return Err(TokenizerFileError::Wrong(format!(
                    "unk_id is {id}, the vocabulary has {} pieces",
                    vocab.len()
                )));
            }
            let byte_fallback = fields.byte_fallback.unwrap_or(false);
            Ok(TokenizerModel::Unigram { vocab, unk_id: fields.unk_id, byte_fallback })
        }
        "WordLevel" => {
            let vocab = Vocabulary::ids(fields.vocab, most)?;
            let unk_token = fields.unk_token.unwrap_or_default();
            Ok(TokenizerModel::WordLevel { vocab, unk_token })
        }
        other => Err(TokenizerFileError::Type {
            part: "model",
            found: shown(other),
            expected: "BPE, Unigram or WordLevel".into(),
        }),
    }
}

/// What the library takes for granted of a byte-pair model, or pays for with every letter.
fn check_bpe(bpe: &Bpe) -> Result<(), TokenizerFileError> {
    let affixes = [
        ("continuing_subword_prefix", &bpe.continuing_subword_prefix),
        ("end_of_word_suffix", &bpe.end_of_word_suffix),
    ];
    for (name, affix) in affixes {
        let bytes = affix.as_ref().map_or(0, String::len);
        if bytes > AFFIX_BYTES_MAX {
            let what = format!("the length of {name} in bytes");
            return Err(TokenizerFileError::limit(what, bytes, AFFIX_BYTES_MAX));
        }
    }
    let words: HashSet<&str> = bpe.vocab.iter().map(|(text, _)| text.as_str()).collect();
    if let Some(unknown) = &bpe.unk_token
        && !words.contains(unknown.as_str())
    {
        return Err(TokenizerFileError::Wrong(format!(
            "unk_token {:?} is not in the vocabulary",
            shown(unknown)
        )));
    }
    let prefix = bpe.continuing_subword_prefix.as_deref().unwrap_or_default();
    let mut made = String::new();
    for (left, right) in &bpe.merges {
        let outside = |text: &str| {
            let (pair, text) = (shown(&format!("{left} {right}")), shown(text));
            TokenizerFileError::Wrong(format!(
                "merge {pair:?} names {text:?}, which is not in the vocabulary"
            ))
        };
        for side in [left, right] {
            if !words.contains(side.as_str()) {
                return Err(outside(side));
            }
        }
        // The library cuts as many bytes as the prefix has, whatever stands there.
        let rest = right.get(prefix.len()..).ok_or_else(|| {
            TokenizerFileError::Wrong(format!(
                "merge {:?} has a right side without the prefix {prefix:?}",
                shown(&format!("{left} {right}"))
            ))
        })?;
        made.clear();
        made.push_str(left);
        made.push_str(rest);
        if !words.contains(made.as_str()) {
            return Err(outside(&made));
        }
    }
    Ok(())
}

fn not_empty(text: Option<String>) -> Option<String> {
    text.filter(|text| !text.is_empty())
}

/// A text of the file for a message: its beginning.
fn shown(text: &str) -> String {
    const SHOWN_CHARS: usize = 48;
    text.chars().take(SHOWN_CHARS).collect()
}

#[cfg(test)]
mod tests;
