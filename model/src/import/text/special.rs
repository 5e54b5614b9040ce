//! What files say of one special token, and whom to believe.

use serde::Deserialize;

use super::super::ImportError;
use crate::tokenizer::TokenizerFile;

/// An id, a list of ids, or none: absent, null, or -1 as some programs write it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(untagged, expecting = "expected a token id, a list of them, or null")]
pub(in super::super) enum TokenIds {
    #[default]
    None,
    One(i64),
    Many(Vec<Option<i64>>),
}

impl TokenIds {
    /// Those that can be ids, ascending.
    pub(in super::super) fn sorted(&self) -> Vec<u32> {
        let mut ids = self.listed();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// The first that can be an id.
    pub(in super::super) fn first(&self) -> Option<u32> {
        self.listed().first().copied()
    }

    fn listed(&self) -> Vec<u32> {
        let all = match self {
            Self::None => vec![],
            Self::One(id) => vec![*id],
            Self::Many(ids) => ids.iter().flatten().copied().collect(),
        };
        // Beyond u32 is beyond every vocabulary: kept, to be noted as such.
        let id = |id: i64| (id >= 0).then(|| u32::try_from(id).unwrap_or(u32::MAX));
        all.into_iter().filter_map(id).collect()
    }
}

/// A token by its text.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a text, or an object with `content`")]
pub(in super::super) enum SpecialToken {
    Text(String),
    Object { content: String },
}

impl SpecialToken {
    pub(super) fn text(self) -> String {
        match self {
            Self::Text(text) | Self::Object { content: text } => text,
        }
    }
}

/// What one place says.
#[derive(Debug)]
pub(super) struct Claim {
    place: &'static str,
    /// Ascending; never empty.
    ids: Vec<u32>,
}

/// What all places say of one kind of token, those that are believed first in front.
#[derive(Debug)]
pub(in super::super) struct Claims {
    name: &'static str,
    vocab: u32,
    claims: Vec<Claim>,
}

impl Claims {
    pub(in super::super) fn new(name: &'static str, vocab: u32) -> Self {
        Self { name, vocab, claims: Vec::new() }
    }

    /// A place that gives ids; none is silence.
    ///
    /// # Errors
    ///
    /// [`ImportError::Value`] if one is outside the vocabulary.
    pub(in super::super) fn ids(
        &mut self,
        place: &'static str,
        ids: impl IntoIterator<Item = u32>,
    ) -> Result<(), ImportError> {
        let ids: Vec<u32> = ids.into_iter().collect();
        if let Some(outside) = ids.iter().find(|id| **id >= self.vocab) {
            return Err(ImportError::Value {
                key: format!("{} of {place}", self.name),
                found: format!("special token {outside}"),
                expected: format!("an id below {}", self.vocab),
            });
        }
        if !ids.is_empty() {
            self.claims.push(Claim { place, ids });
        }
        Ok(())
    }

    /// A place that gives a text. One that is no token is noted and otherwise silence.
    pub(super) fn text(
        &mut self,
        place: &'static str,
        text: Option<&str>,
        tokenizer: Option<&TokenizerFile>,
        notes: &mut Vec<String>,
    ) -> Result<(), ImportError> {
        let (Some(text), Some(tokenizer)) = (text.filter(|text| !text.is_empty()), tokenizer)
        else {
            return Ok(());
        };
        match tokenizer.id_of(text) {
            Some(id) => self.ids(place, [id]),
            None => {
                let text: String = text.chars().take(48).collect();
                let name = self.name;
                notes.push(format!("{name}: {place} says {text:?}, which is no token: ignored"));
                Ok(())
            }
        }
    }

    /// The token of which there can be one: what the first place says that says anything.
    pub(in super::super) fn first(&self, notes: &mut Vec<String>) -> Option<u32> {
        let believed = self.claims.first()?;
        let id = *believed.ids.first()?;
        let others = self.claims.iter().filter(|claim| claim.ids != believed.ids);
        for other in others {
            notes.push(format!(
                "{}: {} says {id}, {} says {:?}: the first is believed",
                self.name, believed.place, other.place, other.ids
            ));
        }
        Some(id)
    }

    /// Tokens of which there may be several: what any place says.
    pub(in super::super) fn all(&self, notes: &mut Vec<String>) -> Vec<u32> {
        let mut all: Vec<u32> =
            self.claims.iter().flat_map(|claim| claim.ids.iter().copied()).collect();
        all.sort_unstable();
        all.dedup();
        if let [first, others @ ..] = self.claims.as_slice()
            && others.iter().any(|claim| !claim.ids.iter().all(|id| first.ids.contains(id)))
        {
            let said: Vec<String> =
                self.claims.iter().map(|c| format!("{} says {:?}", c.place, c.ids)).collect();
            notes.push(format!("{}: {}: all of them count", self.name, said.join(", ")));
        }
        all
    }
}
