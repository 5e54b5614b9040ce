//! Tokens that stand beside a vocabulary in other files than `tokenizer.json`.
//!
//! `tokenizer_config.json` lists them in `added_tokens_decoder`, old models in `added_tokens.json`,
//! and every special token counts as one. transformers adds what `tokenizer.json` lacks of them when
//! it loads a tokenizer; so it is written into the store's `tokenizer.json` once.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::value::RawValue;

use super::super::ImportError;
use crate::tokenizer::{AddedToken, TokenizerFile};

/// `added_tokens_decoder`, or what `added_tokens.json` says: the ids are keys or values.
pub(in super::super) type Decoder = BTreeMap<String, DecodedToken>;

/// A token of `added_tokens_decoder`; its id is its key.
#[derive(Clone, Debug, serde::Deserialize)]
pub(in super::super) struct DecodedToken {
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    normalized: bool,
    #[serde(default)]
    special: bool,
}

/// What the other files say.
pub(super) struct Elsewhere<'a> {
    pub(super) decoder: Decoder,
    /// `added_tokens.json`.
    pub(super) listed: BTreeMap<String, u32>,
    /// Texts of special tokens.
    pub(super) special: Vec<&'a str>,
}

/// The file's added tokens with those that only other files name, and a note of each change;
/// nothing if there is none.
pub(super) fn merged(
    file: &TokenizerFile,
    elsewhere: Elsewhere<'_>,
    vocab: u32,
    notes: &mut Vec<String>,
) -> Option<Vec<AddedToken>> {
    let mut tokens = file.added_tokens.clone();
    // There may be as many as there are words: each is looked up at once.
    let mut places: HashMap<String, usize> =
        tokens.iter().enumerate().map(|(place, token)| (token.content.clone(), place)).collect();
    let mut ids: HashMap<String, u32> = HashMap::new();
    let mut taken: HashSet<u32> = HashSet::new();
    for (text, id) in file.words().chain(tokens.iter().map(|token| (&*token.content, token.id))) {
        ids.insert(text.to_owned(), id);
        taken.insert(id);
    }
    let mut changed = false;
    let plain = |id: u32, content: &str, special: bool| AddedToken {
        id,
        content: content.to_owned(),
        single_word: false,
        lstrip: false,
        rstrip: false,
        normalized: !special,
        special,
    };
    let decoded = elsewhere.decoder.into_iter().filter_map(|(id, token)| {
        let id = id.parse().ok()?;
        let DecodedToken { content, single_word, lstrip, rstrip, normalized, special } = token;
        let token = AddedToken { id, content, single_word, lstrip, rstrip, normalized, special };
        Some(("tokenizer_config.json", token, true))
    });
    let listed = elsewhere.listed.iter();
    let listed = listed.map(|(text, id)| ("added_tokens.json", plain(*id, text, false), false));
    let words: Vec<_> = elsewhere
        .special
        .into_iter()
        .filter_map(|text| {
            let id = *ids.get(text)?;
            Some(("the list of special tokens", plain(id, text, true), false))
        })
        .collect();
    let mut said = Said::default();
    for (place, token, says_how) in decoded.chain(listed).chain(words) {
        match places.get(&token.content).and_then(|&place| tokens.get_mut(place)) {
            Some(known) if known.id != token.id => said.ignored(place, &token, known.id),
            // How one is looked for is believed to the file that was written last.
            Some(known) if says_how && *known != token => {
                said.otherwise(place, &token);
                *known = token;
                changed = true;
            }
            Some(_) => {}
            None => match ids.get(&token.content) {
                _ if token.id >= vocab || token.content.is_empty() => said.outside(place, &token),
                Some(&other) if other != token.id => said.ignored(place, &token, other),
                None if taken.contains(&token.id) => said.taken(place, &token),
                _ => {
                    said.added(place, &token);
                    taken.insert(token.id);
                    places.insert(token.content.clone(), tokens.len());
                    tokens.push(token);
                    changed = true;
                }
            },
        }
    }
    notes.extend(said.into_notes());
    tokens.sort_by_key(|token| token.id);
    changed.then_some(tokens)
}

/// What is noted, a few names of each kind.
#[derive(Default)]
struct Said(BTreeMap<String, Vec<String>>);

impl Said {
    fn say(&mut self, what: String, token: &AddedToken) {
        const KINDS_MAX: usize = 16;
        if self.0.len() >= KINDS_MAX && !self.0.contains_key(&what) {
            return;
        }
        let name: String = token.content.chars().take(32).collect();
        self.0.entry(what).or_default().push(format!("{name:?}"));
    }

    fn added(&mut self, place: &str, token: &AddedToken) {
        self.say(format!("tokenizer.json lacks what {place} names: added"), token);
    }

    fn otherwise(&mut self, place: &str, token: &AddedToken) {
        let what = format!("{place} has other properties than tokenizer.json: believed");
        self.say(what, token);
    }

    fn ignored(&mut self, place: &str, token: &AddedToken, id: u32) {
        let what =
            format!("{place} says {}, tokenizer.json {id}: the latter is believed", token.id);
        self.say(what, token);
    }

    fn taken(&mut self, place: &str, token: &AddedToken) {
        let what = format!("{place} gives the id {} of another token: ignored", token.id);
        self.say(what, token);
    }

    fn outside(&mut self, place: &str, token: &AddedToken) {
        self.say(format!("{place} names what is outside the vocabulary: ignored"), token);
    }

    fn into_notes(self) -> impl Iterator<Item = String> {
        const NAMES_SHOWN: usize = 8;
        self.0.into_iter().map(|(what, mut names)| {
            let more = names.len().saturating_sub(NAMES_SHOWN);
            names.truncate(NAMES_SHOWN);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            format!("tokens: {what}: {}{more}", names.join(", "))
        })
    }
}

/// The same `tokenizer.json` with these added tokens; all else stays as it was written.
pub(super) fn rewritten(json: &[u8], tokens: &[AddedToken]) -> Result<Vec<u8>, ImportError> {
    let bad = |error| ImportError::TokenizerFile(crate::tokenizer::TokenizerFileError::from(error));
    let mut sections: BTreeMap<&str, &RawValue> = serde_json::from_slice(json).map_err(bad)?;
    let added = serde_json::value::to_raw_value(tokens).map_err(bad)?;
    sections.insert("added_tokens", &added);
    serde_json::to_vec(&sections).map_err(bad)
}
