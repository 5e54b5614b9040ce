//! A model's tokenizer: runs of text to ids, ids to bytes. Users' text never becomes a special
//! token: the library is told not to look for them, and [`Tokenizer::encode_rendered`] finds those
//! of the chat template itself.

use std::collections::HashMap;
use std::time::Duration;

use model::tokenizer::AddedToken;
use model::{Bpe, TokenizerFile, TokenizerFileError, TokenizerModel};
use serde_json::Value;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::models::unigram::Unigram;
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::{
    DecoderWrapper, ModelWrapper, NormalizedString, Normalizer, PostProcessorWrapper,
    PreTokenizedString, PreTokenizer, TokenizerImpl,
};

use super::TextError;
use super::guard::Guard;
use super::patterns::{self, PatternError, TimedNormalizer, TimedPreTokenizer};

/// Bytes that normalizer and pre-tokenizer may make of one prompt: the library keeps some forty
/// bytes for each. The longest prompt of the default body limit fits with the usual tokenizers.
const EXPANDED_BYTES_MAX: usize = 32 << 20;

/// How long the patterns of a tokenizer may take on one prompt, beside what its length gives:
/// where processors are scarce, work that takes a millisecond may wait this long for its turn.
const SPLIT_TIME: Duration = Duration::from_secs(2);

/// Bytes that patterns are given a second for. Those in use do a third of a MB or more, of the texts that
/// they like least, and a third of that without optimisation.
const SPLIT_BYTES_PER_S: f64 = 32_768.0;

/// Why a `tokenizer.json` cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// It is not what it should be, or beyond a limit.
    #[error(transparent)]
    File(#[from] TokenizerFileError),
    /// The library refuses a part of it.
    #[error("tokenizer.json has a {part} that cannot be used")]
    Part {
        /// Which part.
        part: &'static str,
        /// What the library said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// An added token would have another id than the file says.
    #[error(
        "tokenizer.json has the added token {text:?} as {listed}, yet the ids before it end at \
         {given}"
    )]
    AddedId {
        /// The token.
        text: String,
        /// Its id in the file.
        listed: u32,
        /// The id that it would have.
        given: u32,
    },
    /// Its tokens cannot be turned into bytes one by one.
    #[error(
        "tokenizer.json has the decoder {found}, expected ByteLevel, ByteFallback or Metaspace"
    )]
    Decoder {
        /// What it has.
        found: String,
    },
}

/// Text to ids and ids to bytes.
pub(crate) struct Tokenizer {
    library: Library,
    /// Written at the beginning of every prompt, exactly once.
    bos: Option<u32>,
    /// Longest first, so that the first that fits is the longest.
    specials: Vec<Special>,
    /// First letters of the specials, ascending.
    special_letters: Vec<char>,
    /// Of every id below the vocabulary's size.
    tokens: Vec<Token>,
    longest_token_bytes: usize,
    /// Bytes of text that are tokenised at once.
    text_bytes_max: usize,
}

/// The library's tokenizer with patterns that look at the clock.
type Library = TokenizerImpl<
    ModelWrapper,
    TimedNormalizer,
    TimedPreTokenizer,
    PostProcessorWrapper,
    DecoderWrapper,
>;

#[derive(Clone, Default)]
struct Token {
    bytes: Box<[u8]>,
    special: bool,
}

struct Special {
    text: String,
    id: u32,
    /// It swallows blanks before it.
    strips_left: bool,
    /// It swallows blanks after it.
    strips_right: bool,
}

/// How the text of a token stands for its bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Alphabet {
    /// One printable character for each byte (GPT-2).
    ByteLevel,
    /// U+2581 for a blank, `<0xNN>` for a byte (SentencePiece).
    SentencePiece,
}

impl Tokenizer {
    /// Reads a `tokenizer.json` for a model of `vocab` tokens; `bos` begins every prompt.
    ///
    /// # Errors
    ///
    /// [`TokenizerError`]
    pub(crate) fn from_json(
        json: &[u8],
        vocab: u32,
        bos: Option<u32>,
    ) -> Result<Self, TokenizerError> {
        let file = TokenizerFile::parse(json, vocab)?;
        let alphabet = alphabet(&file)?;
        let expansion = file.expansion as usize;
        let library = build(file)?;

        let mut tokens = vec![Token::default(); vocab as usize];
        let byte_of_letter = byte_of_letter();
        for (text, id) in library.get_vocab(false) {
            if let Some(token) = tokens.get_mut(id as usize) {
                token.bytes = token_bytes(&text, alphabet, &byte_of_letter).into();
            }
        }
        let mut specials = Vec::new();
        for (id, added) in library.get_added_tokens_decoder() {
            if let Some(token) = tokens.get_mut(id as usize) {
                *token = Token { bytes: added.content.as_bytes().into(), special: added.special };
            }
            if added.special && !added.content.is_empty() {
                specials.push(Special {
                    text: added.content,
                    id,
                    strips_left: added.lstrip,
                    strips_right: added.rstrip,
                });
            }
        }
        specials.sort_by(|a, b| b.text.len().cmp(&a.text.len()).then(a.id.cmp(&b.id)));
        let mut special_letters: Vec<char> =
            specials.iter().filter_map(|special| special.text.chars().next()).collect();
        special_letters.sort_unstable();
        special_letters.dedup();
        let longest_token_bytes =
            tokens.iter().map(|token| token.bytes.len()).max().unwrap_or(0).max(1);
        let text_bytes_max = EXPANDED_BYTES_MAX / expansion.max(1);
        Ok(Self {
            library,
            bos,
            specials,
            special_letters,
            tokens,
            longest_token_bytes,
            text_bytes_max,
        })
    }

    /// The ids of a text that is completed as it is.
    ///
    /// # Errors
    ///
    /// [`TextError::Encode`] if the library fails.
    pub(crate) fn encode_plain(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::from_iter(self.bos);
        within(split_time(text), || self.encode_run(text, &mut ids))?;
        Ok(ids)
    }

    /// The ids of a text that is completed as it is, and at which of its characters each begins. A
    /// tokenizer may change a text before it cuts it (a blank in front, composed letters): these are
    /// places in what it was given.
    ///
    /// # Errors
    ///
    /// As [`Tokenizer::encode_plain`].
    pub(crate) fn encode_with_offsets(
        &self,
        text: &str,
    ) -> Result<(Vec<u32>, Vec<u32>), TextError> {
        let mut ids = Vec::from_iter(self.bos);
        let mut offsets = vec![0; ids.len()];
        if !text.is_empty() {
            // In bytes: the library counts characters with a table of the whole text.
            let encode = || self.library.encode(text, false).map_err(failed);
            let encoding = within(split_time(text), encode)?;
            ids.extend_from_slice(encoding.get_ids());
            let starts = encoding.get_offsets().iter().map(|(start, _)| *start);
            offsets.extend(characters_before(text, starts));
        }
        Ok((ids, offsets))
    }

    /// The ids of a rendered template whose users' texts went through `guard`. The template's
    /// special tokens split the text first, as they do when the whole is parsed for them.
    ///
    /// # Errors
    ///
    /// [`TextError::Encode`] if the library fails.
    pub(crate) fn encode_rendered(
        &self,
        rendered: &str,
        guard: &Guard,
    ) -> Result<Vec<u32>, TextError> {
        within(split_time(rendered), || self.encode_runs(rendered, guard))
    }

    fn encode_runs(&self, rendered: &str, guard: &Guard) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::new();
        let mut rest = rendered;
        while let Some((start, special)) = self.find_special(rest) {
            let mut run = &rest[..start];
            rest = &rest[start + special.text.len()..];
            if special.strips_left {
                run = run.trim_end();
            }
            if special.strips_right {
                rest = rest.trim_start();
            }
            self.encode_run(&guard.restore(run), &mut ids)?;
            ids.push(special.id);
        }
        self.encode_run(&guard.restore(rest), &mut ids)?;
        if let Some(bos) = self.bos
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Normalises and cuts a text, in `time` by the clock: what the patterns do, without the rest.
    ///
    /// # Errors
    ///
    /// [`TextError::Pattern`] if it takes longer; [`TextError::Encode`].
    pub(crate) fn cut_within(&self, time: Duration, text: &str) -> Result<(), TextError> {
        within(time, || {
            let mut text = NormalizedString::from(text);
            if let Some(normalizer) = self.library.get_normalizer() {
                normalizer.normalize(&mut text).map_err(failed)?;
            }
            let mut parts = PreTokenizedString::from(text);
            match self.library.get_pre_tokenizer() {
                Some(part) => part.pre_tokenize(&mut parts).map_err(failed),
                None => Ok(()),
            }
        })
    }

    /// The regular expressions that texts go through.
    pub(crate) fn patterns(&self) -> Vec<&str> {
        let mut found = Vec::new();
        self.library.get_normalizer().inspect(|part| part.patterns(&mut found));
        self.library.get_pre_tokenizer().inspect(|part| part.patterns(&mut found));
        found
    }

    /// The bytes that a token stands for; none for an id without a token.
    pub(crate) fn token_bytes(&self, id: u32) -> &[u8] {
        self.tokens.get(id as usize).map_or(&[], |token| &token.bytes)
    }

    /// The bytes that a token adds to the text of an answer: none for a special one.
    pub(crate) fn text_bytes(&self, id: u32) -> &[u8] {
        self.tokens
            .get(id as usize)
            .filter(|token| !token.special)
            .map_or(&[], |token| &token.bytes)
    }

    /// Bytes of the longest token: bounds how much text a number of tokens can hold.
    pub(crate) fn longest_token_bytes(&self) -> usize {
        self.longest_token_bytes
    }

    /// Bytes of the longest text that is tokenised: more memory than that takes is never taken.
    pub(crate) fn text_bytes_max(&self) -> usize {
        self.text_bytes_max
    }

    /// The texts of the special tokens.
    pub(crate) fn special_texts(&self) -> impl Iterator<Item = &str> + Clone {
        self.specials.iter().map(|special| special.text.as_str())
    }

    /// Whether a token is special, for tests.
    #[cfg(test)]
    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.tokens.get(id as usize).is_some_and(|token| token.special)
    }

    /// The leftmost special token in `text`, the longest of those that begin there.
    fn find_special(&self, text: &str) -> Option<(usize, &Special)> {
        text.char_indices()
            .filter(|(_, letter)| self.special_letters.binary_search(letter).is_ok())
            .find_map(|(start, _)| {
                let rest = &text[start..];
                let special = self.specials.iter().find(|s| rest.starts_with(s.text.as_str()))?;
                Some((start, special))
            })
    }

    fn encode_run(&self, run: &str, ids: &mut Vec<u32>) -> Result<(), TextError> {
        if !run.is_empty() {
            let encoding = self.library.encode_fast(run, false).map_err(failed)?;
            ids.extend_from_slice(encoding.get_ids());
        }
        Ok(())
    }
}

/// How long the patterns may take on this text, or part of one.
pub(super) fn split_time(text: &str) -> Duration {
    SPLIT_TIME + Duration::from_secs_f64(text.len() as f64 / SPLIT_BYTES_PER_S)
}

/// Does `work` with the library in `time` by the clock of its patterns.
fn within<T>(time: Duration, work: impl FnOnce() -> Result<T, TextError>) -> Result<T, TextError> {
    patterns::within(time, work).map_err(failed)?
}

fn failed(error: Box<dyn std::error::Error + Send + Sync>) -> TextError {
    match error.downcast::<PatternError>() {
        Ok(error) => TextError::Pattern(*error),
        Err(error) => TextError::Encode(error),
    }
}

/// How many characters stand before each of `starts`, in bytes. Tokens stand in order: one that would
/// begin before its predecessor shares its place.
fn characters_before(text: &str, starts: impl Iterator<Item = usize>) -> impl Iterator<Item = u32> {
    let (mut at, mut characters) = (0, 0);
    starts.map(move |start| {
        let mut start = start.min(text.len());
        while !text.is_char_boundary(start) {
            start -= 1;
        }
        if start > at {
            characters += text[at..start].chars().count() as u32;
            at = start;
        }
        characters
    })
}

/// The library's tokenizer, of the parts that are used: never its truncation and padding, which
/// would change a prompt in silence, nor its post-processor and decoder, whose work is done here.
fn build(file: TokenizerFile) -> Result<Library, TokenizerError> {
    let part = |part| move |source| TokenizerError::Part { part, source };
    let TokenizerFile { model, added_tokens, normalizer, pre_tokenizer, .. } = file;
    let mut library = Library::new(library_model(model).map_err(part("model"))?);
    if !normalizer.is_null() {
        let normalizer = TimedNormalizer::from_json(&normalizer).map_err(part("normalizer"))?;
        library.with_normalizer(Some(normalizer)).map_err(part("normalizer"))?;
    }
    if !pre_tokenizer.is_null() {
        let pre_tokenizer =
            TimedPreTokenizer::from_json(&pre_tokenizer).map_err(part("pre-tokenizer"))?;
        library.with_pre_tokenizer(Some(pre_tokenizer));
    }
    let listed: Vec<(String, u32)> =
        added_tokens.iter().map(|token| (token.content.clone(), token.id)).collect();
    let added_tokens = added_tokens.into_iter().map(|token| {
        let AddedToken { content, single_word, lstrip, rstrip, normalized, special, .. } = token;
        tokenizers::AddedToken { content, single_word, lstrip, rstrip, normalized, special }
    });
    library.add_tokens(added_tokens).map_err(part("list of added tokens"))?;
    // The library numbers them itself.
    for (text, listed) in listed.into_iter().filter(|(text, _)| !text.is_empty()) {
        if let Some(given) = library.token_to_id(&text).filter(|given| *given != listed) {
            return Err(TokenizerError::AddedId { text, listed, given });
        }
    }
    library.set_encode_special_tokens(true);
    Ok(library)
}

fn library_model(model: TokenizerModel) -> tokenizers::Result<ModelWrapper> {
    Ok(match model {
        TokenizerModel::Bpe(bpe) => {
            let Bpe { vocab, merges, fuse_unk, byte_fallback, ignore_merges, .. } = bpe;
            let mut builder = BPE::builder()
                .vocab_and_merges(vocab.into_iter().collect::<Vocab>(), merges)
                .fuse_unk(fuse_unk)
                .byte_fallback(byte_fallback)
                .ignore_merges(ignore_merges);
            if let Some(unknown) = bpe.unk_token {
                builder = builder.unk_token(unknown);
            }
            if let Some(prefix) = bpe.continuing_subword_prefix {
                builder = builder.continuing_subword_prefix(prefix);
            }
            if let Some(suffix) = bpe.end_of_word_suffix {
                builder = builder.end_of_word_suffix(suffix);
            }
            builder.build()?.into()
        }
        TokenizerModel::Unigram { vocab, unk_id, byte_fallback } => {
            Unigram::from(vocab, unk_id, byte_fallback)?.into()
        }
        TokenizerModel::WordLevel { vocab, unk_token } => {
            let vocab = vocab.into_iter().collect();
            WordLevel::builder().vocab(vocab).unk_token(unk_token).build()?.into()
        }
    })
}

fn alphabet(file: &TokenizerFile) -> Result<Alphabet, TokenizerError> {
    let TokenizerFile { decoder, pre_tokenizer, .. } = file;
    if names_type(decoder, "ByteLevel")
        || decoder.is_null() && names_type(pre_tokenizer, "ByteLevel")
    {
        Ok(Alphabet::ByteLevel)
    } else if names_type(decoder, "ByteFallback") || names_type(decoder, "Metaspace") {
        Ok(Alphabet::SentencePiece)
    } else {
        let found = decoder.get("type").and_then(Value::as_str).unwrap_or("none");
        Err(TokenizerError::Decoder { found: found.chars().take(32).collect() })
    }
}

/// Whether a part of a tokenizer, or a part of a sequence, is of the given type.
fn names_type(part: &Value, wanted: &str) -> bool {
    let own = part.get("type").and_then(Value::as_str) == Some(wanted);
    let inner = ["decoders", "pretokenizers"].iter().filter_map(|key| part.get(key)?.as_array());
    own || inner.flatten().any(|part| part.get("type").and_then(Value::as_str) == Some(wanted))
}

fn token_bytes(text: &str, alphabet: Alphabet, byte_of_letter: &HashMap<char, u8>) -> Vec<u8> {
    match alphabet {
        Alphabet::ByteLevel => {
            let bytes: Option<Vec<u8>> =
                text.chars().map(|letter| byte_of_letter.get(&letter).copied()).collect();
            // A token outside the alphabet stands for itself, as in the library's decoder.
            bytes.unwrap_or_else(|| text.as_bytes().to_vec())
        }
        Alphabet::SentencePiece => {
            let byte = text
                .strip_prefix("<0x")
                .and_then(|rest| rest.strip_suffix('>'))
                .filter(|digits| digits.len() == 2)
                .and_then(|digits| u8::from_str_radix(digits, 16).ok());
            byte.map_or_else(|| text.replace('\u{2581}', " ").into_bytes(), |byte| vec![byte])
        }
    }
}

/// GPT-2's alphabet: printable bytes stand for themselves, the other 68 follow from U+0100.
fn byte_of_letter() -> HashMap<char, u8> {
    let printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut others = 0x100;
    (0..=255)
        .map(|byte| {
            let letter = if printable(byte) {
                char::from(byte)
            } else {
                others += 1;
                char::from_u32(others - 1).unwrap_or(char::REPLACEMENT_CHARACTER)
            };
            (letter, byte)
        })
        .collect()
}

#[cfg(test)]
mod tests;
