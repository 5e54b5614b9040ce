//! Normalizer, pre-tokenizer, decoder and post-processor: which types are supported, and how much
//! longer they may make a text.
//!
//! Each part multiplies: eight replacements of one letter by twenty make 20^8 letters of one. So
//! the factors of all that a text goes through are multiplied here, before any text does.

use serde_json::Value;

use super::{TokenizerFileError, shown};

/// Bytes that normalizer and pre-tokenizer may make of one byte. The longest chain in use comes to
/// 88 in the worst case: NFKC (11), blanks joined by a regular expression (2), Metaspace (4).
pub(super) const EXPANSION_MAX: u64 = 128;
/// Parts of a normalizer, pre-tokenizer or decoder: each goes once through the text.
const PARTS_MAX: usize = 32;
/// Longest regular expression, in bytes: the longest in use has 1200.
const PATTERN_BYTES_MAX: usize = 8 << 10;
/// Tokens that a post-processor may put around a text.
const WRAPPED_TOKENS_MAX: usize = 16;
/// SentencePiece's blank.
const SPACE: &str = "\u{2581}";

/// Growth of UTF-8 under Unicode's normal forms, from Unicode's FAQ on normalization.
const CANONICAL: u64 = 3;
/// The same under the compatibility forms: U+FDFA has 3 bytes and becomes 33.
const COMPATIBLE: u64 = 11;
/// Growth of lower case: U+0130 has 2 bytes and becomes 3.
const LOWER_CASE: u64 = 2;
/// Each byte becomes a character of at most 2 bytes.
const BYTE_LEVEL: u64 = 2;

const NORMALIZERS: &str = "NFC, NFD, NFKC, NFKD, Lowercase, Nmt, Strip, StripAccents, Replace, \
                           Prepend, ByteLevel, BertNormalizer or a Sequence of them";
const PRE_TOKENIZERS: &str = "ByteLevel, Metaspace, Split, Digits, Punctuation, Whitespace, \
                              WhitespaceSplit, BertPreTokenizer, CharDelimiterSplit, \
                              UnicodeScripts, FixedLength or a Sequence of them";
const DECODERS: &str = "ByteLevel, ByteFallback, Metaspace, Replace, Fuse, Strip or a Sequence of \
                        them";
const POST_PROCESSORS: &str = "ByteLevel, TemplateProcessing, BertProcessing, RobertaProcessing or \
                               a Sequence of them";

/// What a post-processor puts around a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wrapped {
    /// Ids in front.
    pub before: Vec<u32>,
    /// Ids at the end.
    pub after: Vec<u32>,
}

/// Checks a part of the type that is given first; `None`: no such type is supported.
type Check<'a> = dyn FnMut(&str, &Value) -> Result<Option<()>, TokenizerFileError> + 'a;

/// Walks through a part and those it is a sequence of.
struct Walk {
    part: &'static str,
    /// Where a sequence has its parts.
    inner: &'static str,
    expected: &'static str,
    parts: usize,
}

impl Walk {
    fn each(&mut self, value: &Value, check: &mut Check<'_>) -> Result<(), TokenizerFileError> {
        if value.is_null() {
            return Ok(());
        }
        self.parts += 1;
        if self.parts > PARTS_MAX {
            let what = format!("the number of parts of the {}", self.part);
            return Err(TokenizerFileError::limit(what, self.parts, PARTS_MAX));
        }
        let kind = value.get("type").and_then(Value::as_str).unwrap_or("none");
        if kind == "Sequence" {
            let inner = value.get(self.inner).and_then(Value::as_array).ok_or_else(|| {
                TokenizerFileError::Wrong(format!("its {} is a Sequence without parts", self.part))
            })?;
            return inner.iter().try_for_each(|value| self.each(value, check));
        }
        check(kind, value)?.ok_or_else(|| TokenizerFileError::Type {
            part: self.part,
            found: shown(kind),
            expected: self.expected.into(),
        })
    }
}

/// Bytes that normalizer and pre-tokenizer make of one byte, at most.
pub(super) fn expansion(
    normalizer: &Value,
    pre_tokenizer: &Value,
) -> Result<u32, TokenizerFileError> {
    let mut factor = 1u64;
    let mut grow = |by: Option<u64>| {
        factor = factor.saturating_mul(by.unwrap_or(1));
        by.map(|_| ())
    };
    Walk { part: "normalizer", inner: "normalizers", expected: NORMALIZERS, parts: 0 }
        .each(normalizer, &mut |kind, value| Ok(grow(normalizer_growth(kind, value)?)))?;
    Walk { part: "pre-tokenizer", inner: "pretokenizers", expected: PRE_TOKENIZERS, parts: 0 }
        .each(pre_tokenizer, &mut |kind, value| Ok(grow(pre_tokenizer_growth(kind, value)?)))?;
    match u32::try_from(factor) {
        Ok(factor) if u64::from(factor) <= EXPANSION_MAX => Ok(factor),
        _ => Err(TokenizerFileError::Limit {
            what: "how many bytes normalizer and pre-tokenizer may make of one".into(),
            found: factor,
            most: EXPANSION_MAX,
        }),
    }
}

/// `None`: not a supported type.
fn normalizer_growth(kind: &str, value: &Value) -> Result<Option<u64>, TokenizerFileError> {
    Ok(Some(match kind {
        "NFC" | "NFD" => CANONICAL,
        "NFKC" | "NFKD" => COMPATIBLE,
        "Lowercase" => LOWER_CASE,
        "Nmt" | "Strip" | "StripAccents" => 1,
        "ByteLevel" => BYTE_LEVEL,
        // Blanks around a character of 3 bytes; marks taken apart; lower case.
        "BertNormalizer" => 2 * CANONICAL * LOWER_CASE,
        // Once for each run of text, which may be one byte.
        "Prepend" => 1 + text(value, "prepend")?.len() as u64,
        "Replace" => {
            let content = text(value, "content")?.len() as u64;
            match pattern(value)? {
                Pattern::Text(found) => content.div_ceil(found.len() as u64).max(1),
                // It may match nothing, between any two letters.
                Pattern::Regex => 1 + content,
            }
        }
        _ => return Ok(None),
    }))
}

fn pre_tokenizer_growth(kind: &str, value: &Value) -> Result<Option<u64>, TokenizerFileError> {
    Ok(Some(match kind {
        "ByteLevel" => {
            let prefix = value.get("add_prefix_space") != Some(&Value::Bool(false));
            // A blank in front of each word, which may be one byte.
            BYTE_LEVEL * (1 + u64::from(prefix))
        }
        "Metaspace" => {
            let replacement = text(value, "replacement")?.len() as u64;
            // In place of each blank, or in front of each word.
            1 + replacement
        }
        "Split" => {
            pattern(value)?;
            1
        }
        "FixedLength" => {
            let length = value.get("length").map_or(Some(1), Value::as_u64);
            if length.is_none_or(|length| length == 0) {
                return Err(TokenizerFileError::Wrong(
                    "its pre-tokenizer FixedLength has no positive length".into(),
                ));
            }
            1
        }
        "Digits" | "Punctuation" | "Whitespace" | "WhitespaceSplit" | "BertPreTokenizer"
        | "CharDelimiterSplit" | "UnicodeScripts" => 1,
        _ => return Ok(None),
    }))
}

fn text<'a>(value: &'a Value, key: &str) -> Result<&'a str, TokenizerFileError> {
    value.get(key).and_then(Value::as_str).ok_or_else(|| {
        let kind = value.get("type").and_then(Value::as_str).unwrap_or("none");
        TokenizerFileError::Wrong(format!("its {} has no text {key}", shown(kind)))
    })
}

/// What a `Replace` or `Split` looks for.
enum Pattern<'a> {
    Text(&'a str),
    Regex,
}

fn pattern(value: &Value) -> Result<Pattern<'_>, TokenizerFileError> {
    let pattern = value.get("pattern");
    let form = |key: &str| pattern.and_then(|pattern| pattern.get(key)?.as_str());
    let (found, text) = match (form("String"), form("Regex")) {
        (Some(text), None) => (Pattern::Text(text), text),
        (None, Some(text)) => (Pattern::Regex, text),
        _ => {
            return Err(TokenizerFileError::Wrong(
                "a pattern is neither a String nor a Regex".into(),
            ));
        }
    };
    if text.is_empty() {
        return Err(TokenizerFileError::Wrong("a pattern is empty".into()));
    }
    if text.len() > PATTERN_BYTES_MAX {
        let what = "the length of a pattern in bytes";
        return Err(TokenizerFileError::limit(what, text.len(), PATTERN_BYTES_MAX));
    }
    Ok(found)
}

/// Refuses what turns tokens into text in another way than the program does, token by token.
pub(super) fn check_decoder(decoder: &Value) -> Result<(), TokenizerFileError> {
    let mut walk = Walk { part: "decoder", inner: "decoders", expected: DECODERS, parts: 0 };
    walk.each(decoder, &mut |kind, value| match kind {
        "ByteLevel" | "ByteFallback" | "Fuse" | "Strip" => Ok(Some(())),
        "Metaspace" if text(value, "replacement")? == SPACE => Ok(Some(())),
        "Replace" => match (pattern(value)?, text(value, "content")?) {
            (Pattern::Text(SPACE), " ") => Ok(Some(())),
            _ => Err(TokenizerFileError::Wrong(format!(
                "its decoder replaces something other than {SPACE:?} by a blank, which is not \
                 supported"
            ))),
        },
        "Metaspace" => Err(TokenizerFileError::Wrong(format!(
            "its decoder's replacement is not {SPACE:?}, which is not supported"
        ))),
        _ => Ok(None),
    })
}

/// What the post-processor puts around a text. It is never run: the program writes BOS itself.
pub(super) fn wrapped(post_processor: &Value) -> Result<Wrapped, TokenizerFileError> {
    let mut wrapped = Wrapped::default();
    let mut walk =
        Walk { part: "post-processor", inner: "processors", expected: POST_PROCESSORS, parts: 0 };
    walk.each(post_processor, &mut |kind, value| {
        match kind {
            "ByteLevel" => {}
            "BertProcessing" | "RobertaProcessing" => {
                // Each is a pair of text and id.
                let id = |key: &str| {
                    let id = value.get(key)?.get(1)?.as_u64()?;
                    u32::try_from(id).ok()
                };
                wrapped.before.extend(id("cls"));
                wrapped.after.extend(id("sep"));
            }
            "TemplateProcessing" => template(value, &mut wrapped)?,
            _ => return Ok(None),
        }
        let tokens = wrapped.before.len() + wrapped.after.len();
        if tokens > WRAPPED_TOKENS_MAX {
            let what = "the number of tokens that the post-processor puts around a text";
            return Err(TokenizerFileError::limit(what, tokens, WRAPPED_TOKENS_MAX));
        }
        Ok(Some(()))
    })?;
    Ok(wrapped)
}

/// `single` of a template: special tokens, and the text once.
fn template(value: &Value, wrapped: &mut Wrapped) -> Result<(), TokenizerFileError> {
    let wrong = |what: String| TokenizerFileError::Wrong(what);
    let pieces = value.get("single").and_then(Value::as_array);
    let pieces = pieces.ok_or_else(|| wrong("its post-processor has no list single".into()))?;
    let mut texts = 0;
    for piece in pieces {
        if piece.get("Sequence").is_some() {
            texts += 1;
            continue;
        }
        let name = piece.get("SpecialToken").and_then(|token| token.get("id")?.as_str());
        let name = name.ok_or_else(|| {
            wrong("its post-processor has what is neither Sequence nor SpecialToken".into())
        })?;
        let ids = value.get("special_tokens").and_then(|all| all.get(name)?.get("ids")?.as_array());
        let ids = ids.ok_or_else(|| {
            wrong(format!("its post-processor does not say which token {:?} is", shown(name)))
        })?;
        for id in ids {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            let id = id.ok_or_else(|| {
                wrong(format!("its post-processor has no id for {:?}", shown(name)))
            })?;
            let side = if texts == 0 { &mut wrapped.before } else { &mut wrapped.after };
            side.push(id);
            if side.len() > WRAPPED_TOKENS_MAX {
                let what = "the number of tokens that the post-processor puts around a text";
                return Err(TokenizerFileError::limit(what, side.len(), WRAPPED_TOKENS_MAX));
            }
        }
    }
    if texts != 1 {
        return Err(wrong(format!(
            "its post-processor writes the text {texts} times, expected once"
        )));
    }
    Ok(())
}
