//! Long lists of a `tokenizer.json`, read entry by entry and given up at the first too many.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::{TOKEN_BYTES_MAX, TokenizerFileError, UNIGRAM_PIECE_BYTES_MAX, shown};

/// Words of a model.
pub(super) struct Vocabulary;

impl Vocabulary {
    /// A map from text to id.
    pub(super) fn ids(
        raw: &RawValue,
        most: usize,
    ) -> Result<Vec<(String, u32)>, TokenizerFileError> {
        let mut deserializer = serde_json::Deserializer::from_str(raw.get());
        let words = Entries { most }.deserialize(&mut deserializer)?;
        for (text, id) in &words {
            if text.len() > TOKEN_BYTES_MAX {
                let what = format!("the length of token {id} in bytes");
                return Err(TokenizerFileError::limit(what, text.len(), TOKEN_BYTES_MAX));
            }
        }
        Ok(words)
    }

    /// A list of texts and scores.
    pub(super) fn scores(
        raw: &RawValue,
        most: usize,
    ) -> Result<Vec<(String, f64)>, TokenizerFileError> {
        let pieces: Vec<(String, f64)> = list(raw, most, "pieces")?;
        for (id, (text, _)) in pieces.iter().enumerate() {
            // The library would walk back from an empty piece to itself for ever.
            if text.is_empty() {
                return Err(TokenizerFileError::Wrong(format!("piece {id} is empty")));
            }
            if text.len() > UNIGRAM_PIECE_BYTES_MAX {
                let what = format!("the length of piece {id} in bytes");
                return Err(TokenizerFileError::limit(what, text.len(), UNIGRAM_PIECE_BYTES_MAX));
            }
        }
        Ok(pieces)
    }
}

/// The merges of a byte-pair model.
pub(super) struct Merges;

/// Two forms are in use: `["a", "b"]`, and `"a b"` before 2024.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a merge: two texts, or one with a blank between them")]
enum Merge {
    Pair((String, String)),
    Text(String),
}

impl Merges {
    pub(super) fn read(
        raw: &RawValue,
        most: usize,
    ) -> Result<Vec<(String, String)>, TokenizerFileError> {
        let merges: Vec<Merge> = list(raw, most, "merges")?;
        let pairs = merges.into_iter().filter_map(|merge| match merge {
            Merge::Pair(pair) => Some(Ok(pair)),
            // A comment, as at the head of a `merges.txt`.
            Merge::Text(text) if text.starts_with("#version") => None,
            Merge::Text(text) => Some(match text.split_once(' ') {
                Some((left, right)) if !right.contains(' ') => Ok((left.into(), right.into())),
                _ => Err(TokenizerFileError::Wrong(format!(
                    "merge {:?} is not two texts with a blank between",
                    shown(&text)
                ))),
            }),
        });
        pairs.collect()
    }
}

/// A list of at most so many elements.
pub(super) fn list<'a, T: Deserialize<'a>>(
    raw: &'a RawValue,
    most: usize,
    what: &'static str,
) -> Result<Vec<T>, TokenizerFileError> {
    let mut deserializer = serde_json::Deserializer::from_str(raw.get());
    Ok(List { most, what, element: PhantomData }.deserialize(&mut deserializer)?)
}

struct List<T> {
    most: usize,
    what: &'static str,
    element: PhantomData<T>,
}

impl<'de, T: Deserialize<'de>> DeserializeSeed<'de> for List<T> {
    type Value = Vec<T>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<T>, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for List<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of {}", self.what)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
        let mut elements = Vec::new();
        while let Some(element) = seq.next_element()? {
            if elements.len() == self.most {
                let Self { most, what, .. } = self;
                return Err(A::Error::custom(format_args!("more than {most} {what}")));
            }
            elements.push(element);
        }
        Ok(elements)
    }
}

/// The entries of a map from text to id.
struct Entries {
    most: usize,
}

impl<'de> DeserializeSeed<'de> for Entries {
    type Value = Vec<(String, u32)>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Entries {
    type Value = Vec<(String, u32)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of texts to ids")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            if entries.len() == self.most {
                return Err(A::Error::custom(format_args!("more than {} words", self.most)));
            }
            entries.push(entry);
        }
        Ok(entries)
    }
}
