//! A model's tokenizer: runs of text to ids, ids to bytes. Users' text never becomes a special
//! token: the library is told not to look for them, and [`Tokenizer::encode_rendered`] finds those
//! of the chat template itself.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;

use super::TextError;
use super::guard::Guard;

/// Why a `tokenizer.json` cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// It is not JSON of the expected form.
    #[error("tokenizer.json is not a tokenizer")]
    Parse(#[source] Box<dyn std::error::Error + Send + Sync>),
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
    library: tokenizers::Tokenizer,
    /// Written at the beginning of every prompt, exactly once.
    bos: Option<u32>,
    /// Longest first, so that the first that fits is the longest.
    specials: Vec<Special>,
    /// First letters of the specials, ascending.
    special_letters: Vec<char>,
    /// Of every id below the vocabulary's size.
    tokens: Vec<Token>,
    longest_token_bytes: usize,
}

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

/// The parts of `tokenizer.json` that say how tokens become bytes.
#[derive(Deserialize)]
struct Shape {
    #[serde(default)]
    decoder: Value,
    #[serde(default)]
    pre_tokenizer: Value,
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
        let shape: Shape =
            serde_json::from_slice(json).map_err(|error| TokenizerError::Parse(error.into()))?;
        let alphabet = alphabet(&shape)?;
        let mut library = tokenizers::Tokenizer::from_bytes(json).map_err(TokenizerError::Parse)?;
        library.set_encode_special_tokens(true);
        // Cutting and filling would silently change a prompt.
        library.with_truncation(None).map_err(TokenizerError::Parse)?;
        library.with_padding(None);

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
        Ok(Self { library, bos, specials, special_letters, tokens, longest_token_bytes })
    }

    /// The ids of a text that is completed as it is.
    ///
    /// # Errors
    ///
    /// [`TextError::Encode`] if the library fails.
    pub(crate) fn encode_plain(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::from_iter(self.bos);
        self.encode_run(text, &mut ids)?;
        Ok(ids)
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
            let encoding = self.library.encode_fast(run, false).map_err(TextError::Encode)?;
            ids.extend_from_slice(encoding.get_ids());
        }
        Ok(())
    }
}

fn alphabet(shape: &Shape) -> Result<Alphabet, TokenizerError> {
    if names_type(&shape.decoder, "ByteLevel")
        || shape.decoder.is_null() && names_type(&shape.pre_tokenizer, "ByteLevel")
    {
        Ok(Alphabet::ByteLevel)
    } else if names_type(&shape.decoder, "ByteFallback") || names_type(&shape.decoder, "Metaspace")
    {
        Ok(Alphabet::SentencePiece)
    } else {
        let found = shape.decoder.get("type").and_then(Value::as_str).unwrap_or("none");
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
