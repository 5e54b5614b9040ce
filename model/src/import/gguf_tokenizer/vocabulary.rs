//! The words of a GGUF file: texts, types, ids.

use std::borrow::Cow;
use std::collections::HashMap;

use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::{Value as Json, json};

use super::super::ImportError;
use crate::gguf::Metadata;

/// `tokenizer.ggml.token_type` of special tokens.
const CONTROL: u64 = 3;
/// … of tokens added by users.
const USER_DEFINED: u64 = 4;

/// One word of a vocabulary.
pub(super) struct Token<'a> {
    pub(super) text: &'a str,
    pub(super) token_type: u64,
}

impl Token<'_> {
    pub(super) fn is_control(&self) -> bool {
        self.token_type == CONTROL
    }

    fn is_added(&self) -> bool {
        matches!(self.token_type, CONTROL | USER_DEFINED)
    }
}

/// `tokenizer.ggml.tokens` and `.token_type`; the id is the index.
pub(super) struct Vocabulary<'a> {
    pub(super) tokens: Vec<Token<'a>>,
    pub(super) ids: HashMap<&'a str, u32>,
}

/// The texts of `tokenizer.ggml.tokens`. One without letters is named after its id, as in llama.cpp.
pub(super) fn token_texts<'a>(
    metadata: &Metadata<'a>,
    notes: &mut Vec<String>,
) -> Result<Vec<Cow<'a, str>>, ImportError> {
    const TOKENS: &str = "tokenizer.ggml.tokens";
    let array = metadata.array(TOKENS)?;
    let array =
        array.ok_or_else(|| ImportError::MissingKey { file: "metadata", key: TOKENS.into() })?;
    let texts = array.strings().ok_or_else(|| {
        let found = array.element_type().name();
        ImportError::Tokenizer(format!("{TOKENS} is an array of {found}, expected strings"))
    })?;
    let (mut empty, mut first) = (0, None);
    let named = texts.enumerate().map(|(id, text)| {
        if !text.is_empty() {
            return Cow::Borrowed(text);
        }
        empty += 1;
        first.get_or_insert(id);
        Cow::Owned(format!("[EMPTY_{id}]"))
    });
    let named = named.collect();
    if let Some(first) = first {
        notes.push(format!(
            "warning: tokenizer: tokens without a text ({empty}, the first is {first}) are called \
             [EMPTY_{first}] and so on, as llama.cpp calls them"
        ));
    }
    Ok(named)
}

impl<'a> Vocabulary<'a> {
    pub(super) fn read(
        metadata: &Metadata<'_>,
        texts: &'a [Cow<'_, str>],
    ) -> Result<Self, ImportError> {
        const TYPES: &str = "tokenizer.ggml.token_type";
        let tokens = texts.iter().map(|text| Token { text: text.as_ref(), token_type: 1 });
        let mut tokens: Vec<Token<'_>> = tokens.collect();
        if let Some(types) = metadata.array(TYPES)? {
            if types.len() != tokens.len() {
                let (found, expected) = (types.len(), tokens.len());
                return Err(ImportError::Tokenizer(format!(
                    "{TYPES} has {found} elements for {expected} tokens"
                )));
            }
            for (token, value) in tokens.iter_mut().zip(types.iter()) {
                token.token_type = value.unsigned().ok_or_else(|| {
                    ImportError::Tokenizer(format!("{TYPES} holds something other than integers"))
                })?;
            }
        }
        let mut ids = HashMap::new();
        for (id, token) in tokens.iter().enumerate() {
            if let Some(other) = ids.insert(token.text, id as u32) {
                return Err(ImportError::Tokenizer(format!(
                    "tokens {other} and {id} have the same text {:?}",
                    token.text
                )));
            }
        }
        Ok(Self { tokens, ids })
    }

    /// Whether the added tokens come after all others: they then keep their ids without being
    /// words of the vocabulary proper, as in Llama 3.
    fn added_last(&self) -> bool {
        self.tokens.is_sorted_by_key(Token::is_added)
    }

    pub(super) fn added_tokens(&self) -> Json {
        let added = self.tokens.iter().enumerate().filter(|(_, token)| token.is_added());
        let entries = added.map(|(id, token)| {
            json!({
                "id": id, "content": token.text, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": token.token_type == CONTROL,
            })
        });
        entries.collect()
    }

    pub(super) fn words(&self) -> Words<'_> {
        let added_last = self.added_last();
        let is_word = |(_, token): &(usize, &Token<'_>)| !(added_last && token.is_added());
        let tokens = self.tokens.iter().enumerate().filter(is_word);
        Words(tokens.map(|(id, token)| (token.text, id)).collect())
    }
}

/// A vocabulary as a JSON object in the order of ids.
pub(super) struct Words<'a>(Vec<(&'a str, usize)>);

impl Serialize for Words<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (text, id) in &self.0 {
            map.serialize_entry(text, id)?;
        }
        map.end()
    }
}
